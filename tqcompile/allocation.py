"""``bits_budget``: the weight bits and the rank of every site, from its measured effect on the model's output.

For every site and every number of weight bits of the method, that site alone is quantized in closed form, and the
divergence of the model's output from the exact one is measured on held-out calibration data. Ranks are not measured
one by one: a rounding error is in proportion to what is rounded, so a divergence is to the energy that the low rank
leaves, known from the singular values. The choice then minimises the sum of the divergences over all sites, which
takes them for independent. Everything is as deterministic as quantizing itself.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from tqcompile.calibration import Unit, collect_statistics, device_of, held_out_batches, model_kwargs, split_into_units
from tqcompile.config import SCHEMES, Config, Scheme
from tqcompile.data import Batch
from tqcompile.errors import ConfigError
from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.lowrank import truncated_svd
from tqcompile.methods.recipe import recipe_of
from tqcompile.methods.select import affordable_rotation
from tqcompile.methods.statistics import SiteStatistics
from tqcompile.modules import empty_layer
from tqcompile.passes.plan import Plan, Site
from tqcompile.passes.replace_linear import Journal
from tqcompile.progress import Progress
from tqcompile.quantize_unit import Job, can_absorb, quantize_unit, rotates_heads
from tqcompile.reporting import Choice, Report, stored_bits

RANKS = (8, 16, 32, 64, 128)
WEIGHT_BITS = (2, 3, 4)
# Outputs are compared on held-out sequences of about this many positions in all ...
POSITIONS = 4096
# ... and at so many of them that no more values than this are kept: logits of a large vocabulary are large.
KEPT = 1 << 26
# The budget is spent in so many steps; every cost is rounded up to one.
STEPS = 20_000


@dataclasses.dataclass(frozen=True)
class Option:
    """What a site may get. size: stored bits of all its linears, at most. loss: estimated divergence."""

    scheme: str
    rank: int
    size: float
    loss: float


def allocate(
    model: nn.Module, plan: Plan, batches: list[Batch], config: Config, job: Job, progress: bool
) -> tuple[Config, list[Choice]]:
    """Choose scheme and rank of every site under ``config.bits_budget``; the model is as before when this returns.

    Sites that an override of the user matches keep its settings, and their bits count.

    Args:
        job: of the run: what may be absorbed, and which linears read a rotated stream.
    Returns:
        ``config`` with one override a site in front of the user's, and no budget; and the choices, for the report.
    Raises:
        ConfigError: no calibration data, the method has nothing to choose from, or the budget is out of reach.
    """
    menu = _menu(Scheme.parse(config.scheme))
    if not batches:
        raise ConfigError("bits_budget needs calibration data: the effect of each layer is measured on it")
    if len(menu) == 1 and not recipe_of(menu[0]).low_rank_bits:
        raise ConfigError(
            f"bits_budget: {config.scheme} has one number of weight bits and no rank, so there is nothing to choose; "
            "use twin, or 16-bit activations"
        )
    device = config.device or device_of(model)
    probe = _Probe(model, batches)
    found: dict[Site, tuple[list[Option], dict[str, float]]] = {}
    with Progress(progress, f"bits_budget {config.bits_budget:g}", len(plan.sites) * len(menu)) as bar:
        scratch = dataclasses.replace(job, bar=bar, absorb=False)
        for unit in split_into_units(model, plan.sites, batches):
            balanced = {site for site in unit.sites if job.recipe(site).balance}
            statistics = collect_statistics(model, unit, batches, device, balanced)
            for site in unit.sites:
                schemes = (
                    menu if config.override_of(site.linears[0]) is None else [Scheme.parse(job.settings(site).scheme)]
                )
                found[site] = _options(scratch, probe, unit, site, statistics[site], schemes, job.absorb)
    sizes = [_weights(model, site) for site in plan.sites]
    options = [found[site][0] for site in plan.sites]
    picked = spend(options, config.bits_budget * sum(sizes), sum(sizes))
    choices, overrides = [], []
    for site, index, size in zip(plan.sites, picked, sizes, strict=True):
        option, measured = found[site][0][index], found[site][1]
        choices.append(Choice(site.name, option.scheme, option.rank, option.size / size, option.loss, measured))
        if config.override_of(site.linears[0]) is None:
            settings = {"scheme": option.scheme} | ({"rank": option.rank} if option.rank else {})
            overrides += [(f"re:{re.escape(name)}", settings) for name in site.linears]
    return config.replace(overrides=[*overrides, *config.to_dict()["overrides"]], bits_budget=None), choices


def spend(options: list[list[Option]], budget: float, weights: int) -> list[int]:
    """Which option of every site minimises the summed loss within ``budget`` bits in all.

    A knapsack with one choice a site, solved exactly up to the STEPS in which the budget is counted.

    Raises:
        ConfigError: the cheapest options together cost more.
    """
    least = [min(option.size for option in site) for site in options]
    most = [max(option.size for option in site) for site in options]
    room = budget - sum(least)
    if room < 0:
        raise ConfigError(
            f"bits_budget {budget / weights:.4g} is out of reach: this method stores from {sum(least) / weights:.4f} "
            f"(rounded up) to {sum(most) / weights:.4f} bits per weight of this model"
        )
    step = max(room, 1.0) / STEPS
    best = np.zeros(STEPS + 1)  # smallest loss of the sites so far with at most so many steps spent
    taken = []
    for site, floor in zip(options, least, strict=True):
        costs = [int(np.ceil((option.size - floor) / step - 1e-9)) for option in site]
        totals = np.full((len(site), STEPS + 1), np.inf)
        for row, option, cost in zip(totals, site, costs, strict=True):
            if cost <= STEPS:
                row[cost:] = best[: STEPS + 1 - cost] + option.loss
        taken.append((totals.argmin(0), costs))
        best = totals.min(0)
    picked, left = [], STEPS
    for index, costs in reversed(taken):
        picked.append(int(index[left]))
        left -= costs[picked[-1]]
    return picked[::-1]


def _menu(scheme: Scheme) -> list[Scheme]:
    """The schemes of the same method and activations."""
    every = (dataclasses.replace(scheme, weight_bits=bits) for bits in WEIGHT_BITS)
    return [found for found in every if found.name in SCHEMES]


def _options(
    job: Job, probe: "_Probe", unit: Unit, site: Site, statistics: SiteStatistics, schemes: list[Scheme], absorb: bool
) -> tuple[list[Option], dict[str, float]]:
    """The options of a site, and what was measured: scheme -> divergence at the rank of its settings."""
    options, measured = [], {}
    free = job.config.override_of(site.linears[0]) is None
    for scheme in schemes:
        settings = dataclasses.replace(job.settings(site), scheme=scheme.name, steps=0, tune=0)
        journal = Journal(job.model)
        scratch = dataclasses.replace(job, config=settings, journal=journal, report=Report({}))
        weight = torch.cat([job.model.get_submodule(n).weight.detach().float() for n in site.linears])
        try:
            results = quantize_unit(scratch, Unit(unit.name, [site], unit.run), {site: statistics})
            loss = probe.divergence()
        finally:
            journal.restore()
        measured[scheme.name] = loss
        specs = [_largest(job, unit, site, scheme, result.spec, absorb) for result in results.values()]
        rank = specs[0].rank
        if not rank or not free:
            options.append(Option(scheme.name, rank, _size(specs, rank), loss))
            continue
        ranks = [r for r in RANKS if r < min(min(spec.out_features, spec.in_features) for spec in specs)]
        left = _energy_left(weight, next(iter(results.values())), settings.seed, [*ranks, rank])
        whole = loss / max(left[rank], 1e-12)
        options += [Option(scheme.name, r, _size(specs, r), whole * left[r]) for r in ranks]
    return options, measured


def _energy_left(weight: torch.Tensor, quantized: QuantizedLinear, seed: int, ranks: list[int]) -> dict[int, float]:
    """rank -> share of the energy of W diag(s) that its best approximation of that rank leaves. Rotations of the input
    change no singular value."""
    inverse = quantized.tensors.get("transform.input_scale")
    weight = weight if inverse is None else weight / inverse.to(weight)
    values = truncated_svd(weight, max(ranks), torch.Generator().manual_seed(seed))[1].double()
    total = float(weight.double().square().sum().clamp_min(1e-30))
    return {rank: max(0.0, 1 - float(values[:rank].square().sum()) / total) for rank in ranks}


def _largest(job: Job, unit: Unit, site: Site, scheme: Scheme, spec: LinearSpec, absorb: bool) -> LinearSpec:
    """The description of the largest layer that the run may make of this one: learning may add a rotation to store."""
    config, recipe = job.settings(site), recipe_of(scheme)
    absorbed = absorb and site.absorber is not None and can_absorb(site.absorber, unit)
    in_heads = absorbed and rotates_heads(site.absorber)
    spec = dataclasses.replace(spec, scaled=recipe.smooth and not absorbed)
    if in_heads:
        return dataclasses.replace(spec, rotation_block=0, rotation_signs="")
    weights = [job.model.get_submodule(name).weight for name in site.linears]
    if recipe.learn and config.steps and spec.rotation_block and affordable_rotation(spec.rotation_block, weights):
        return dataclasses.replace(spec, rotation_signs="")
    return spec


def _size(specs: list[LinearSpec], rank: int) -> float:
    """Stored bits of linears at a rank."""
    sized = [dataclasses.replace(spec, rank=rank) for spec in specs]
    return sum(stored_bits(empty_layer(spec, device="meta")) * spec.out_features * spec.in_features for spec in sized)


def _weights(model: nn.Module, site: Site) -> int:
    return sum(model.get_submodule(name).weight.numel() for name in site.linears)


class _Probe:
    """How far a model's output is from what it was: mean KL divergence of its logits over positions, or the relative
    squared error of an output that is no logits."""

    def __init__(self, model: nn.Module, batches: list[Batch]):
        self._model, self._inputs, positions = model, [], 0
        held_out = batches[-max(1, held_out_batches(len(batches))) :]
        for sequence in (sequence for batch in held_out for sequence in _sequences(batch)):
            self._inputs.append(sequence)
            positions += max(v.numel() for v in sequence.values() if isinstance(v, torch.Tensor))
            if positions >= POSITIONS:
                break
        self._exact = [self._output(sequence) for sequence in self._inputs]

    def divergence(self) -> float:
        parts = [self._compare(exact, self._output(s)) for exact, s in zip(self._exact, self._inputs, strict=True)]
        return float(torch.cat(parts).mean())

    def _output(self, batch: Batch) -> tuple[torch.Tensor, bool]:
        """(rows, C) float32 of the positions that are no padding, and whether they are log probabilities."""
        with torch.no_grad():
            out: Any = self._model(**model_kwargs(self._model, batch))
        logits = getattr(out, "logits", None)
        values = logits if logits is not None else _first_tensor(out)
        rows, mask = values.float(), batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == rows.shape[:-1]:
            rows = rows[mask.to(rows.device).bool()]
        rows = rows.reshape(-1, rows.shape[-1])
        count = max(1, min(len(rows), KEPT // (rows.shape[-1] * len(self._inputs))))
        rows = rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
        return (rows.log_softmax(-1), True) if logits is not None else (rows, False)

    @staticmethod
    def _compare(exact: tuple[torch.Tensor, bool], found: tuple[torch.Tensor, bool]) -> torch.Tensor:
        (p, is_log), (q, _) = exact, found
        if is_log:
            return (p.exp() * (p - q)).sum(-1)
        return (q - p).square().sum(-1) / p.square().sum(-1).mean().clamp_min(1e-30)


def _sequences(batch: Batch) -> Iterator[Batch]:
    """The rows of a batch one by one, which keeps the logits of one of them in memory."""
    size = next(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim())
    for i in range(size):
        yield {
            n: v[i : i + 1] if isinstance(v, torch.Tensor) and v.dim() and len(v) == size else v
            for n, v in batch.items()
        }


def _first_tensor(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    values = out.values() if isinstance(out, dict) else out
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())
