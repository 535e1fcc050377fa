"""One unit of a model, in and out: its linears quantized and replaced, its transforms absorbed, the block tuned.

Requires the unit's statistics, taken on the model as it is now. Ensures that what a neighbour absorbs is absorbed once,
that the journal can undo every change, and that the report names every linear.
"""

import collections
import copy
import dataclasses
import time

import torch
from torch import nn

from tqcompile.block_tuning import tune_block
from tqcompile.calibration import Unit, held_out_batches, mean_outputs
from tqcompile.config import Config, Scheme
from tqcompile.methods import low_bit, select
from tqcompile.methods.components import QuantizedLinear
from tqcompile.methods.hadamard import rotate_blocks, rotation_block
from tqcompile.methods.recipe import Recipe, recipe_of
from tqcompile.methods.select import Solution
from tqcompile.methods.statistics import SiteStatistics
from tqcompile.methods.twin import SiteProblem, absorbed
from tqcompile.modules import filled_layer
from tqcompile.passes.absorb_head_rotation import rotate_value
from tqcompile.passes.absorb_scale import absorb_into_norm, producer_channel, producer_scale
from tqcompile.passes.correct_norm_mean import correct_norm_mean
from tqcompile.passes.online_cost import online_cost
from tqcompile.passes.plan import Absorber, Site
from tqcompile.passes.replace_linear import Journal
from tqcompile.progress import Progress
from tqcompile.reporting import BlockRecord, LayerRecord, Report, output_error, spread, stored_bits

# A head's rotation is absorbed if it mixes at least this many channels; smaller ones stay on-line in larger blocks.
MIN_HEAD = 32


@dataclasses.dataclass
class Job:
    """What every unit of one run shares. absorb: whether transforms may move into neighbours. corrected: names of the
    parameters that took a mean correction. rotated: names of linears that read a rotated residual stream."""

    model: nn.Module
    config: Config
    journal: Journal
    report: Report
    bar: Progress
    absorb: bool
    corrected: list[str] = dataclasses.field(default_factory=list)
    rotated: frozenset[str] = frozenset()

    def settings(self, site: Site) -> Config:
        """Those of a site's linears, which are the same for all of them."""
        return self.config.for_layer(site.linears[0])

    def recipe(self, site: Site) -> Recipe:
        return recipe_of(Scheme.parse(self.settings(site).scheme))


def quantize_unit(job: Job, unit: Unit, statistics: dict[Site, SiteStatistics]) -> dict[str, QuantizedLinear]:
    """Quantize and replace the linears of one unit.

    Last site first: the scale of a site may divide rows of a linear before it, which must be known to quantize that.
    """
    row_changes: dict[str, _RowChange] = {}
    solved = []
    for site in reversed(unit.sites):
        work = _solve_site(job, unit, site, statistics.get(site), row_changes)
        job.bar.advance(site.name, work.solution.error)
        solved.append(work)
    results: dict[str, QuantizedLinear] = {}
    for work in reversed(solved):
        results |= _replace_site(job, work)
    return results


@dataclasses.dataclass
class _RowChange:
    """What a site asks of the linear that produces its input: rows divided by scale (rows,), then heads rotated."""

    absorber: Absorber
    scale: torch.Tensor | None
    rotation: torch.Tensor | None

    def apply(self, problem: SiteProblem, index: int) -> None:
        if self.scale is not None:
            problem.divide_rows(index, self.scale)
        if self.rotation is not None:
            weight, bias = problem.weights[index], problem.biases[index]
            problem.weights[index], problem.biases[index] = rotate_value(self.absorber, self.rotation, weight, bias)


@dataclasses.dataclass
class _Solved:
    """A quantized site; the absorbers of the reciprocal of its scale and of its rotation, or None: on-line."""

    site: Site
    problem: SiteProblem
    solution: Solution
    scale_absorber: Absorber | None
    rotation_absorber: Absorber | None
    seconds: float

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What the site's linears read when x (T, K) is what they read before."""
        transform = self.solution.transform
        if self.scale_absorber is not None:
            x = x / transform.scale
        return x if self.rotation_absorber is None else rotate_blocks(x, transform.rotation)


def _solve_site(
    job: Job, unit: Unit, site: Site, statistics: SiteStatistics | None, row_changes: dict[str, _RowChange]
) -> _Solved:
    """Quantize a site; its scale (and rotation) go to its absorber: into the norm now, or into ``row_changes``."""
    began = time.perf_counter()
    linears = [job.model.get_submodule(name) for name in site.linears]
    config = job.settings(site)
    device = config.device or linears[0].weight.device
    weights = [linear.weight.detach().to(device, torch.float32) for linear in linears]
    biases = [None if linear.bias is None else linear.bias.detach().to(device) for linear in linears]
    absorber = site.absorber if site.absorber and job.absorb and can_absorb(site.absorber, unit) else None
    tie = producer_channel(absorber, weights[0].shape[1]).to(device) if absorber else None
    head_dim = absorber.head_dim if absorber and rotates_heads(absorber) else 0
    scheme = Scheme.parse(config.scheme)
    dual = absorber is not None and absorber.kind == "linear"
    rotated = job.rotated.issuperset(site.linears)
    problem = SiteProblem(weights, biases, statistics, scheme, config, tie, site.name, head_dim, dual, rotated)
    for index, name in enumerate(site.linears):
        if name in row_changes:
            row_changes[name].apply(problem, index)
    norm = job.model.get_submodule(absorber.module) if absorber and absorber.kind == "norm" else None

    def applied(scale: torch.Tensor) -> torch.Tensor:
        return scale if norm is None else absorb_into_norm(copy.deepcopy(norm), scale).to(scale)

    solve = low_bit.solve_site if scheme.weight_bits < 4 else select.solve_site
    solution = solve(problem, applied, lambda loss: job.bar.show(site.name, loss))
    scale, rotation = solution.transform.scale, solution.transform.rotation if head_dim else None
    if scale is not None and norm is not None:
        job.journal.remember(norm)
        absorb_into_norm(norm, scale)
    elif absorber is not None and norm is None:
        rows = None if scale is None else producer_scale(absorber, scale)
        row_changes[absorber.module] = _RowChange(absorber, rows, rotation)
    return _Solved(
        site,
        problem,
        solution,
        None if scale is None else absorber,
        None if rotation is None else absorber,
        time.perf_counter() - began,
    )


def _replace_site(job: Job, work: _Solved) -> dict[str, QuantizedLinear]:
    """Replace and measure the linears of one site."""
    problem, site, solution = work.problem, work.site, work.solution
    scale, rotation = work.scale_absorber is not None, work.rotation_absorber is not None
    quantized = [absorbed(result, scale, rotation) for result in solution.quantized]
    if problem.statistics is not None:
        seen = problem.statistics.held_out
        job.report.spreads.append(spread(site.name, seen, solution.transform.activations(seen)))
    for name, weight, result in zip(site.linears, problem.weights, quantized, strict=True):
        layer, error = filled_layer(result), None
        if problem.statistics is not None:
            held_out = problem.statistics.held_out
            error = output_error(layer, weight, held_out, work.read(held_out))
        job.report.layers.append(
            LayerRecord(
                name=name,
                shape=tuple(weight.shape),
                scheme=problem.scheme.name,
                rank=result.spec.rank,
                error=error,
                bits=stored_bits(layer),
                transform=_describe(work),
                seconds=work.seconds / len(site.linears),
                closed_error=solution.closed_error,
                learned_error=solution.learned_error,
            )
        )
        job.journal.replace(name, layer.to(job.model.get_submodule(name).weight.device))
    return dict(zip(site.linears, quantized, strict=True))


def norm_gains(job: Job, unit: Unit) -> dict[str, torch.Tensor]:
    """The gains (K,) of the norms that :func:`correct_unit` may correct, before scales are absorbed into them."""
    return {name: job.model.get_parameter(f"{name}.weight").detach().clone() for name in unit.means}


def correct_unit(job: Job, unit: Unit, gains: dict[str, torch.Tensor]) -> None:
    """Shift the mean of a quantized block's inner norms back to that of the full-precision model.

    gains: from :func:`norm_gains`; a scale that a norm absorbed since divides the mean too.
    """
    if not unit.means:
        if unit.calls:
            why = next((s.reason for s in unit.sites[1:] if s.reason), "no norm is read by its later linears alone")
            job.report.notes.append(f"{unit.name}: the mean of no norm is corrected ({why})")
        return
    block = job.model.get_submodule(unit.name)
    with mean_outputs(job.model, list(unit.means), [call.mask for call in unit.calls]) as means:
        for call in unit.calls:
            block(call.hidden, *call.args, **call.kwargs)
    for name, mean in means.items():
        gain = job.model.get_parameter(f"{name}.weight")
        kept = torch.where(gains[name] == 0, torch.ones_like(gain), gain / gains[name]).float()
        job.corrected.append(correct_norm_mean(job.model, name, unit.means[name] * kept - mean, job.journal))


def tune_unit(job: Job, unit: Unit, results: dict[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """Tune a quantized block; keep it where its held-out output is closer to that of the full-precision block."""
    dense = next((name for name, q in results.items() if q.spec.rank and q.spec.low_rank_bits == 16), None)
    if dense is not None:
        job.report.notes.append(f"{unit.name}: not tuned, the low rank of {dense} is not quantized")
        return results
    began = time.perf_counter()
    block, prefix = job.model.get_submodule(unit.name), f"{unit.name}."
    held = held_out_batches(len(unit.calls))
    # What is not absorbed is applied to a model that stays as it is, so its norms must not change.
    vectors = _own_vectors(job.model, block) if job.absorb else []
    tuned = tune_block(
        block,
        [{name.removeprefix(prefix): results[name] for name in site.linears} for site in unit.sites],
        vectors,
        unit.calls[:-held],
        unit.calls[-held:],
        job.config.tune * max(job.recipe(site).tune for site in unit.sites),
        torch.Generator().manual_seed(job.config.seed),
        lambda loss: job.bar.show(f"tuning {unit.name}", loss),
        job.config.shards,
    )
    kept = tuned.after < tuned.before
    job.report.blocks.append(BlockRecord(unit.name, tuned.before, tuned.after, kept, time.perf_counter() - began))
    if not kept:
        return results
    for name, values in tuned.vectors.items():
        owner = block.get_submodule(name.rpartition(".")[0])
        job.journal.remember(owner)
        block.get_parameter(name).copy_(values)
    for name, result in tuned.linears.items():
        device = next(block.get_submodule(name).buffers()).device
        job.journal.replace(prefix + name, filled_layer(result).to(device))
    return {prefix + name: result for name, result in tuned.linears.items()}


def _own_vectors(model: nn.Module, block: nn.Module) -> list[str]:
    """Names of the one-dimensional floating-point parameters that this block alone reads."""
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [name for name, p in block.named_parameters() if p.dim() == 1 and p.is_floating_point() and uses[id(p)] == 1]


def can_absorb(absorber: Absorber, unit: Unit) -> bool:
    """Whether the producer is calibrated with this unit: the unit's recorded inputs are those of an older producer."""
    if absorber.kind != "norm":
        return any(absorber.module in site.linears for site in unit.sites)
    return unit.name == "model" or absorber.module.startswith(f"{unit.name}.")


def rotates_heads(absorber: Absorber) -> bool:
    """Whether the rotation of a site goes into the value projection: heads are kept, and large enough to mix well."""
    return absorber.kind == "attn_v" and not absorber.unrotatable and rotation_block(absorber.head_dim) >= MIN_HEAD


def _describe(work: _Solved) -> str:
    """What happens to a site's input, where, and the cost of what stays on-line."""
    transform, site, parts = work.solution.transform, work.site, []
    block = 0 if transform.rotation is None else transform.rotation.shape[0]
    if block:
        kind = "hadamard" if transform.rotation_signs else "learned rotation "
        where = f"in {work.rotation_absorber.module}" if work.rotation_absorber else "on-line"
        parts.append(f"{kind}{block} {where}")
    if work.problem.rotated:
        parts.append("hadamard of the residual stream")
    if transform.scale is not None:
        absorber = work.scale_absorber
        where = f"in {absorber.module}" if absorber else f"on-line ({site.reason or 'no absorber'})"
        parts.append(f"{transform.scale_name} {where}")
    if work.problem.recipe.dual and site.absorber is None:
        parts.append(f"no column scale ({site.reason})")
    shapes = [tuple(weight.shape) for weight in work.problem.weights]
    scaled = transform.scale is not None and work.scale_absorber is None
    cost = online_cost(shapes, 0 if work.rotation_absorber else block, scaled)
    return ", ".join(parts) + (f"; {cost.percent:.2f}% FLOPs on-line" if cost.flops else "") if parts else "none"
