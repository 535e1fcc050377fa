"""``bits_budget``: weight bits, rank and group size of every site, from their measured effect on the model's output.

The model is quantized uniformly in closed form, with the settings of the run where the budget allows them. In it one
site at a time is put back as it was, or given other weight bits: the difference in divergence of the output from the
exact one, on held-out calibration data, is what that site does to it at those bits. Other ranks and group sizes are not
put into the model: what a site does is taken to be in proportion to the squared error of its own output, and how that
changes is measured on one site of each shape. The choice minimises the sum over sites, which takes their effects for
independent; so at last the choice and the uniform model are measured, and the better is kept. Everything is as
deterministic as quantizing itself.
"""

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from tqcompile.calibration import Unit, collect_statistics, device_of, split_into_units
from tqcompile.config import SCHEMES, Config, Scheme
from tqcompile.data import Batch
from tqcompile.divergence import Divergence, rows_of
from tqcompile.errors import ConfigError
from tqcompile.methods.components import LinearSpec
from tqcompile.methods.hadamard import rotation_block
from tqcompile.methods.lattice import DIMENSION
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
# Groups are half, once and twice those of the settings, as far as kernels take them: multiples of this.
GROUP_STEP = 64
# The budget is spent in so many steps; every cost is rounded up to one.
STEPS = 20_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a site may get. rank: 0 where the method has none."""

    scheme: str
    rank: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.scheme}{f' rank {self.rank}' if self.rank else ''} in groups of {self.group_size}"

    def overrides(self) -> dict[str, str | int]:
        rank = {"rank": self.rank} if self.rank else {}
        return {"scheme": self.scheme, **rank, "group_size": self.group_size}


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a site. size: stored bits of all its linears, at most. loss: estimated divergence."""

    setting: Setting
    size: float
    loss: float = 0.0


def allocate(
    model: nn.Module, plan: Plan, batches: list[Batch], config: Config, job: Job, progress: bool
) -> tuple[Config, list[Choice]]:
    """Choose scheme, rank and group size of every site under ``config.bits_budget``; the model is as before when this
    returns.

    Sites that an override of the user matches keep its settings, and their bits count.

    Args:
        job: of the run: what may be absorbed, which linears read a rotated stream, and the report, which gets a note.
    Returns:
        ``config`` with one override a linear behind the user's, and no budget; and the choices, for the report.
    Raises:
        ConfigError: no calibration data, the method has nothing to choose from, or the budget is out of reach; before
            anything is measured.
    """
    if not batches:
        raise ConfigError("bits_budget needs calibration data: the effect of each layer is measured on it")
    options = _options(model, plan, batches, job)
    if all(len(found) == 1 for found in options.values()):
        raise ConfigError(
            f"bits_budget: {config.scheme} has one number of weight bits, one group size and no rank for these layers, "
            "so there is nothing to choose; use twin, 16-bit activations, or a group_size that is a multiple of 64"
        )
    sizes = {site: sum(model.get_submodule(name).weight.numel() for name in site.linears) for site in plan.sites}
    weights = sum(sizes.values())
    budget = config.bits_budget * weights
    uniform = _uniform(options, config, budget, weights)
    probe = Divergence(model, batches)
    with Progress(progress, f"bits_budget {config.bits_budget:g}", 3 * len(plan.sites)) as bar:
        scratch = dataclasses.replace(job, bar=Progress(False, "", 0), absorb=False)
        effects, divergence = _measure(scratch, probe, plan, batches, options, uniform, bar)
        for site, found in options.items():
            options[site] = [dataclasses.replace(o, loss=effects[site].loss(o.setting)) for o in found]
        picked = spend(list(options.values()), budget, weights)
        chosen = {site: found[index] for (site, found), index in zip(options.items(), picked, strict=True)}
        settings = {site: option.setting for site, option in chosen.items()}
        expected = sum(option.loss for option in chosen.values())
        found = divergence if settings == uniform else _check(scratch, probe, plan, batches, settings, bar)
    names = sorted({str(setting) for site, setting in uniform.items() if _free(config, site)})
    note = f"bits_budget: divergence on held-out calibration data {found:.4g} as chosen (expected {expected:.4g}), "
    note += f"{divergence:.4g} with {' or '.join(names)} everywhere"
    if found > divergence:
        note += ": that is kept"
        chosen = {site: next(o for o in options[site] if o.setting == uniform[site]) for site in plan.sites}
    job.report.notes.append(note)
    choices = [
        Choice(site.name, s.scheme, s.rank, s.group_size, option.size / sizes[site], option.loss, effects[site].bits)
        for site, option in chosen.items()
        for s in [option.setting]
    ]
    mine = [(name, o.setting.overrides()) for site, o in chosen.items() if _free(config, site) for name in site.linears]
    # A plain name matches inside longer ones, which must come first.
    mine.sort(key=lambda pair: -pair[0].count("."))
    return config.replace(overrides=[*config.to_dict()["overrides"], *mine], bits_budget=None), choices


def spend(options: list[list[Option]], budget: float, weights: int) -> list[int]:
    """Which option of every site minimises the summed loss within ``budget`` bits in all.

    A knapsack with one choice a site, solved exactly up to the STEPS in which the budget is counted.

    Raises:
        ConfigError: the cheapest options together cost more.
    """
    least = _least(options, budget, weights)
    step = max(budget - sum(least), 1.0) / STEPS
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


def _least(options: list[list[Option]], budget: float, weights: int) -> list[float]:
    """The size of the cheapest option of every site. Raises ConfigError if they cost more than the budget."""
    least = [min(option.size for option in site) for site in options]
    most = [max(option.size for option in site) for site in options]
    if budget < sum(least):
        raise ConfigError(
            f"bits_budget {budget / weights:.4g} is out of reach: this method stores from {sum(least) / weights:.4f} "
            f"(rounded up) to {sum(most) / weights:.4f} bits per weight of this model"
        )
    return least


def same_method(scheme: Scheme) -> list[Scheme]:
    """The schemes of the same method and activations, which differ in weight bits."""
    every = (dataclasses.replace(scheme, weight_bits=bits) for bits in WEIGHT_BITS)
    return [found for found in every if found.name in SCHEMES]


def _free(config: Config, site: Site) -> bool:
    return config.override_of(site.linears[0]) is None


def _setting(config: Config) -> Setting:
    recipe = recipe_of(Scheme.parse(config.scheme))
    return Setting(config.scheme, config.rank if recipe.low_rank_bits else 0, config.group_size)


def _options(model: nn.Module, plan: Plan, batches: list[Batch], job: Job) -> dict[Site, list[Option]]:
    """What every site may get, in the plan's order, and its size; no losses yet."""
    units = split_into_units(model, plan.sites, [next(rows_of(batches[0], 1))])
    unit_of = {site: unit for unit in units for site in unit.sites}
    options = {}
    for site in plan.sites:
        own = _setting(job.settings(site))
        settings = _menu(own, [model.get_submodule(name) for name in site.linears])
        settings = settings if _free(job.config, site) else [own]
        options[site] = [Option(setting, _size(job, unit_of[site], site, setting)) for setting in settings]
    return options


def _menu(own: Setting, linears: list[nn.Linear]) -> list[Setting]:
    """The settings that linears reading one input may get instead of ``own``."""
    k, schemes = linears[0].in_features, [scheme.name for scheme in same_method(Scheme.parse(own.scheme))]
    smallest = min(min(linear.out_features, k) for linear in linears)
    ranks = sorted({own.rank, *(rank for rank in RANKS if rank < smallest)}) if own.rank else [0]
    around = (own.group_size // 2, 2 * own.group_size)
    groups = sorted({own.group_size, *(g for g in around if g and g % GROUP_STEP == 0 and k % g == 0)})
    return [Setting(*found) for found in itertools.product(schemes, ranks, groups)]


def _size(job: Job, unit: Unit, site: Site, setting: Setting) -> float:
    """Stored bits of a site's linears, at most: a scale may be stored, and a rotation that is learned."""
    scheme, config = Scheme.parse(setting.scheme), job.settings(site)
    recipe = recipe_of(scheme)
    linears = [job.model.get_submodule(name) for name in site.linears]
    absorbed = job.absorb and site.absorber is not None and can_absorb(site.absorber, unit)
    block = rotation_block(linears[0].in_features) if recipe.rotate and not job.rotated.issuperset(site.linears) else 0
    if absorbed and rotates_heads(site.absorber):
        block = 0
    learned = recipe.learn and config.steps and affordable_rotation(block, [linear.weight for linear in linears])
    total = 0.0
    for linear in linears:
        spec = LinearSpec(
            out_features=linear.out_features,
            in_features=linear.in_features,
            rank=setting.rank,
            group_size=setting.group_size,
            act_bits=scheme.act_bits,
            low_rank_bits=recipe.low_rank_bits or 4,
            rotation_block=block if learned else 0,  # a Hadamard's signs take no room
            scaled=recipe.smooth and not absorbed,
            weight_bits=scheme.weight_bits,
            lattice=DIMENSION if recipe.lattice else 0,
            basis=recipe.learn_lattice,
        )
        total += stored_bits(empty_layer(spec, device="meta")) * linear.weight.numel()
    return total


def _uniform(options: dict[Site, list[Option]], config: Config, budget: float, weights: int) -> dict[Site, Setting]:
    """The same setting for every site that has it (else its cheapest): that of the run if the budget allows it, or the
    largest that it allows."""
    _least(list(options.values()), budget, weights)

    def everywhere(setting: Setting | None) -> list[Option]:
        return [
            next((o for o in found if o.setting == setting), None) or min(found, key=lambda o: o.size)
            for found in options.values()
        ]

    def total(setting: Setting | None) -> float:
        return sum(option.size for option in everywhere(setting))

    settings = {option.setting: None for found in options.values() for option in found}
    allowed = [setting for setting in settings if total(setting) <= budget + 1e-6 * weights]
    own = _setting(config)
    best = own if own in allowed else max(allowed, key=total, default=None)
    return {site: option.setting for site, option in zip(options, everywhere(best), strict=True)}


@dataclasses.dataclass(frozen=True)
class _Effect:
    """What a site does to the output. bits: scheme -> divergence that it adds at the uniform setting's rank and group
    size. ranks, groups: squared output error of the site at each, against that at the uniform setting."""

    bits: dict[str, float]
    ranks: dict[int, float]
    groups: dict[int, float]

    def loss(self, setting: Setting) -> float:
        return self.bits[setting.scheme] * self.ranks[setting.rank] * self.groups[setting.group_size]


def _measure(
    job: Job,
    probe: Divergence,
    plan: Plan,
    batches: list[Batch],
    options: dict[Site, list[Option]],
    uniform: dict[Site, Setting],
    bar: Progress,
) -> tuple[dict[Site, _Effect], float]:
    """The effect of every site in the uniform model, and the divergence of that."""
    model, journal, layers, errors = job.model, Journal(job.model), {}, {}
    examples = _examples(model, options, uniform)
    try:
        for unit, statistics_of in _units(job, plan, batches):
            for site in unit.sites:
                own = uniform[site]
                layers[site] = {"": {name: model.get_submodule(name) for name in site.linears}}
                for scheme in sorted({option.setting.scheme for option in options[site]}):
                    setting = dataclasses.replace(own, scheme=scheme)
                    layers[site][scheme], error = _quantized(job, unit, site, statistics_of, setting)
                    if setting == own and site in examples.values():
                        errors[site] = _errors(job, unit, site, statistics_of, options[site], own, error)
                _put(journal, layers[site].pop(own.scheme))
                bar.advance(site.name)
        divergence, effects = probe.now(), {}
        for site, others in layers.items():
            found = {uniform[site].scheme: divergence}
            for scheme, changed in others.items():
                with _changed(model, changed):
                    found[scheme] = probe.now()
            without = found.pop("")
            # Nothing costs less than nothing, whatever chance says.
            bits = {scheme: max(found[scheme] - without, 0.0) for scheme in sorted(found)}
            effects[site] = _Effect(bits, *errors[examples[site]])
            bar.advance(site.name)
    finally:
        journal.restore()
    return effects, divergence


def _examples(model: nn.Module, options: dict[Site, list[Option]], uniform: dict[Site, Setting]) -> dict[Site, Site]:
    """For every site the middle one of those with its shapes and choices, whose errors stand for all."""
    alike: dict[Any, list[Site]] = {}
    for site, found in options.items():
        shapes = tuple(model.get_submodule(name).weight.shape for name in site.linears)
        alike.setdefault((shapes, uniform[site], *(option.setting for option in found)), []).append(site)
    return {site: sites[len(sites) // 2] for sites in alike.values() for site in sites}


def _check(
    job: Job, probe: Divergence, plan: Plan, batches: list[Batch], settings: dict[Site, Setting], bar: Progress
) -> float:
    """The divergence of the model quantized with these settings."""
    journal = Journal(job.model)
    try:
        for unit, statistics_of in _units(job, plan, batches):
            for site in unit.sites:
                _put(journal, _quantized(job, unit, site, statistics_of, settings[site])[0])
                bar.advance(site.name)
        return probe.now()
    finally:
        journal.restore()


def _units(job: Job, plan: Plan, batches: list[Batch]) -> Iterator[tuple[Unit, dict[Site, SiteStatistics]]]:
    """Every unit with the statistics of its sites, each on the units before it as they are then."""
    device = job.config.device or device_of(job.model)
    for unit in split_into_units(job.model, plan.sites, batches):
        balanced = {site for site in unit.sites if job.recipe(site).balance}
        yield unit, collect_statistics(job.model, unit, batches, device, balanced)


def _errors(
    job: Job,
    unit: Unit,
    site: Site,
    statistics_of: dict[Site, SiteStatistics],
    options: list[Option],
    own: Setting,
    error: float,
) -> tuple[dict[int, float], dict[int, float]]:
    """rank -> and group size -> squared output error of a site, as a multiple of ``error``, at the setting ``own``."""

    def relative(**change: int) -> float:
        setting = dataclasses.replace(own, **change)
        found = error if setting == own else _quantized(job, unit, site, statistics_of, setting)[1]
        return max(found, 1e-30) / max(error, 1e-30)

    ranks, groups = (sorted({getattr(o.setting, field) for o in options}) for field in ("rank", "group_size"))
    return (
        {rank: relative(rank=rank) for rank in ranks},
        {group: relative(group_size=group) for group in groups},
    )


def _quantized(
    job: Job, unit: Unit, site: Site, statistics_of: dict[Site, SiteStatistics], setting: Setting
) -> tuple[dict[str, nn.Module], float]:
    """The linears of a site quantized in closed form, by name, and the mean of their squared output errors. The model
    is as before."""
    config = dataclasses.replace(job.settings(site), **setting.overrides(), steps=0, tune=0)
    journal, report = Journal(job.model), Report({})
    scratch = dataclasses.replace(job, config=config, journal=journal, report=report)
    try:
        quantize_unit(scratch, Unit(unit.name, [site], unit.run), {site: statistics_of[site]})
        layers = {name: job.model.get_submodule(name) for name in site.linears}
    finally:
        journal.restore()
    return layers, statistics.mean(layer.error**2 for layer in report.layers)


def _put(journal: Journal, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        journal.replace(name, layer)


@contextlib.contextmanager
def _changed(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    journal = Journal(model)
    try:
        _put(journal, layers)
        yield
    finally:
        journal.restore()
