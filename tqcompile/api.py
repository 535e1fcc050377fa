"""``compile``: the main pipeline, from a model and calibration data to a quantized model.

check -> load data -> capture and analyse -> per block: calibrate -> choose scales -> absorb -> transform
-> quantize -> replace -> measure -> freeze -> torch.compile
"""

import collections
import contextlib
import copy
import dataclasses
import importlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tqcompile import recipes
from tqcompile.block_tuning import tune_block
from tqcompile.calibration import Unit, collect_statistics, device_of, held_out_batches, split_into_units
from tqcompile.checkpoint import quantization_config
from tqcompile.config import Config, Scheme
from tqcompile.data import Batch, load_calibration
from tqcompile.errors import ConfigError, ModelError
from tqcompile.methods.components import QuantizedLinear
from tqcompile.methods.hadamard import rotate_blocks, rotation_block
from tqcompile.methods.recipe import RECIPES
from tqcompile.methods.select import Solution, solve_site
from tqcompile.methods.statistics import SiteStatistics
from tqcompile.methods.twin import SiteProblem, absorbed
from tqcompile.modules import QUANTIZED, TwinLinear
from tqcompile.output_head import leave_head, quantize_head
from tqcompile.passes.absorb_head_rotation import rotate_value
from tqcompile.passes.absorb_scale import absorb_into_norm, producer_channel, producer_scale
from tqcompile.passes.analyze import analyze
from tqcompile.passes.online_cost import online_cost
from tqcompile.passes.plan import Absorber, Site
from tqcompile.passes.replace_linear import Journal
from tqcompile.progress import Progress
from tqcompile.reporting import BlockRecord, LayerRecord, Report, output_error, stored_bits

# A head's rotation is absorbed if it mixes at least this many channels; smaller ones stay on-line in larger blocks.
MIN_HEAD = 32


def compile(
    model: nn.Module,
    calib_data: Any = None,
    *,
    scheme: str | None = None,
    config: Config | None = None,
    tokenizer: Any = None,
    backend: str | None = "auto",
    progress: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Quantize the linear layers of a model in place.

    Args:
        model: any ``nn.Module``; Hugging Face models keep ``.generate()`` and ``save_pretrained``.
        calib_data: texts (with ``tokenizer``), token-id lists, a [B, S] tensor, dicts of model arguments, a
            DataLoader or other iterable of these, or a Hugging Face Dataset. None quantizes without data.
        scheme: e.g. ``"twin-w4a8"``; see ``tqcompile.SCHEMES``. config: all settings; overrides: single settings.
        backend: "twinquant" compiles the result in place with torch.compile, None leaves it eager, "auto" compiles
            where the model is on a GPU.
        progress: show a progress bar on stderr.
    Returns:
        the same model: quantized, in eval mode, parameters frozen. ``tqcompile.report(model)`` tells what was done.
    Raises:
        ConfigError, ModelError, CalibrationError, NumericError: named with the module or setting at fault; the
            model is then as it was.
    """
    config = _resolve(config, scheme, overrides)
    if backend not in ("auto", "twinquant", None):
        raise ConfigError(f"backend must be 'auto', 'twinquant' or None, got {backend!r}")
    with _frozen_while_working(model) as journal:
        _, report = _quantize(model, calib_data, tokenizer, config, journal, progress, absorb=True)
    model.requires_grad_(False)
    _mark(model, config, report)
    if backend == "twinquant" or (backend == "auto" and device_of(model).type == "cuda"):
        importlib.import_module("tqcompile.backend")  # a checkout that is not installed has no entry point
        # What was left alone here stays as it is, also in fragments that a graph break cuts off.
        model.compile(backend="twinquant", dynamic=True, options={"quantize": False})
    return model


def attach_recipe(
    model: nn.Module,
    calib_data: Any = None,
    *,
    scheme: str | None = None,
    config: Config | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **overrides: Any,
) -> Report:
    """Calibrate a model for ``torch.compile(model, backend="twinquant")`` and leave it as it is.

    The quantized components are remembered beside the model's parameters (weakly), and the backend uses them in
    place of quantizing without data. Nothing is absorbed, so every transform stays on-line.

    Arguments and errors are those of :func:`compile`. Returns the report.
    """
    config = _resolve(config, scheme, overrides)
    if config.lm_head != "keep":
        raise ConfigError(f"attach_recipe leaves the model as it is, so lm_head={config.lm_head!r} has no place in it")
    with _frozen_while_working(model) as journal:
        quantized, report = _quantize(model, calib_data, tokenizer, config, journal, progress, absorb=False)
        journal.restore()
    for name, result in quantized.items():
        recipes.attach(model.get_parameter(f"{name}.weight"), result)
    return report


def check_model(model: nn.Module) -> None:
    """Raise ModelError when a model cannot be quantized at all, before any work is done."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an nn.Module, got {type(model).__name__}. Load the model first.")
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise ModelError("the model is already quantized by tqcompile. Start from the original weights.")
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ModelError(f"{type(model).__name__} has no nn.Linear layer, so there is nothing to quantize.")
    for name, linear in linears:
        if linear.weight.is_meta:
            raise ModelError(f"{name}.weight is on the meta device. Load the weights before quantizing.")
        for leaf, tensor in (("weight", linear.weight), ("bias", linear.bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ModelError(f"{name}.{leaf} holds NaN or infinity: a damaged checkpoint, or training diverged.")


@contextlib.contextmanager
def _frozen_while_working(model: nn.Module) -> Iterator[Journal]:
    """Eval mode and no gradients inside; on any error the model is put back as it was."""
    check_model(model)
    journal = Journal(model)
    model.eval()
    try:
        with torch.no_grad():
            yield journal
    except BaseException:
        journal.restore()
        raise


def _resolve(config: Config | None, scheme: str | None, overrides: dict[str, Any]) -> Config:
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config must be a tqcompile.Config, got {type(config).__name__}")
    if scheme is not None:
        overrides = {**overrides, "scheme": scheme}
    return (config or Config()).replace(**overrides)


def _quantize(
    model: nn.Module,
    calib_data: Any,
    tokenizer: Any,
    config: Config,
    journal: Journal,
    progress: bool,
    absorb: bool,
) -> tuple[dict[str, QuantizedLinear], Report]:
    batches = _calibration_batches(model, calib_data, tokenizer, config)
    plan = analyze(model, _example(model, batches), leave_head(model, config))
    if not plan.sites:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(plan.skipped.items())[:5])
        raise ModelError(f"no layer of {type(model).__name__} can be quantized ({reasons}).")
    report = Report(config.to_dict(), skipped=dict(plan.skipped), notes=list(plan.notes))
    recipe = RECIPES[Scheme.parse(config.scheme).method]
    tune = recipe.tune and config.tune > 0
    units = [Unit("model", list(plan.sites), None)]
    if batches:
        units = split_into_units(model, plan.sites, batches, targets=tune)
    if not batches:
        report.notes.append("no calibration data: identity Hessian, no scales, errors not measured")
    elif len(batches) == 1:
        report.notes.append("a single calibration batch: errors are measured on the rows used for calibration")
    quantized: dict[str, QuantizedLinear] = {}
    with Progress(progress, f"tqcompile {config.scheme}", len(plan.sites)) as bar:
        for unit in units:
            device = config.device or device_of(model)
            statistics = collect_statistics(model, unit, batches, device, recipe.balance) if batches else {}
            results = _quantize_unit(model, unit, statistics, config, journal, report, bar, absorb)
            if tune and len(unit.calls) > 1:
                results = _tune_unit(model, unit, results, config, journal, report, bar, absorb)
            quantized |= results
    if config.lm_head != "keep":
        quantize_head(model, config, batches, journal, report)
    return quantized, report


def _quantize_unit(
    model: nn.Module,
    unit: Unit,
    statistics: dict[Site, SiteStatistics],
    config: Config,
    journal: Journal,
    report: Report,
    bar: Progress,
    absorb: bool,
) -> dict[str, QuantizedLinear]:
    """Quantize and replace the linears of one unit.

    Last site first: the scale of a site may divide rows of a linear before it, which must be known to quantize that.
    """
    row_changes: dict[str, _RowChange] = {}
    solved = []
    for site in reversed(unit.sites):
        work = _solve_site(model, unit, site, statistics.get(site), config, journal, row_changes, bar, absorb)
        bar.advance(site.name, work.solution.error)
        solved.append(work)
    results: dict[str, QuantizedLinear] = {}
    for work in reversed(solved):
        results |= _replace_site(model, work, journal, report)
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
    model: nn.Module,
    unit: Unit,
    site: Site,
    statistics: SiteStatistics | None,
    config: Config,
    journal: Journal,
    row_changes: dict[str, _RowChange],
    bar: Progress,
    absorb: bool,
) -> _Solved:
    """Quantize a site; its scale (and rotation) go to its absorber: into the norm now, or into ``row_changes``."""
    began = time.perf_counter()
    linears = [model.get_submodule(name) for name in site.linears]
    device = config.device or linears[0].weight.device
    weights = [linear.weight.detach().to(device, torch.float32) for linear in linears]
    biases = [None if linear.bias is None else linear.bias.detach().to(device) for linear in linears]
    absorber = site.absorber if site.absorber and absorb and _can_absorb(site.absorber, unit) else None
    tie = producer_channel(absorber, weights[0].shape[1]).to(device) if absorber else None
    head_dim = absorber.head_dim if absorber and _rotates_heads(absorber) else 0
    scheme = Scheme.parse(config.scheme)
    problem = SiteProblem(weights, biases, statistics, scheme, config, tie, site.name, head_dim)
    for index, name in enumerate(site.linears):
        if name in row_changes:
            row_changes[name].apply(problem, index)
    norm = model.get_submodule(absorber.module) if absorber and absorber.kind == "norm" else None

    def applied(scale: torch.Tensor) -> torch.Tensor:
        return scale if norm is None else absorb_into_norm(copy.deepcopy(norm), scale).to(scale)

    solution = solve_site(problem, applied, lambda loss: bar.show(site.name, loss))
    scale, rotation = solution.transform.scale, solution.transform.rotation if head_dim else None
    if scale is not None and norm is not None:
        journal.remember(norm)
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


def _replace_site(model: nn.Module, work: _Solved, journal: Journal, report: Report) -> dict[str, QuantizedLinear]:
    """Replace and measure the linears of one site."""
    problem, site, solution = work.problem, work.site, work.solution
    scale, rotation = work.scale_absorber is not None, work.rotation_absorber is not None
    quantized = [absorbed(result, scale, rotation) for result in solution.quantized]
    for name, weight, result in zip(site.linears, problem.weights, quantized, strict=True):
        layer, error = TwinLinear.from_quantized(result), None
        if problem.statistics is not None:
            held_out = problem.statistics.held_out
            error = output_error(layer, weight, held_out, work.read(held_out))
        report.layers.append(
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
        journal.replace(name, layer.to(model.get_submodule(name).weight.device))
    return dict(zip(site.linears, quantized, strict=True))


def _tune_unit(
    model: nn.Module,
    unit: Unit,
    results: dict[str, QuantizedLinear],
    config: Config,
    journal: Journal,
    report: Report,
    bar: Progress,
    absorb: bool,
) -> dict[str, QuantizedLinear]:
    """Tune a quantized block; keep it where its held-out output is closer to that of the full-precision block."""
    began = time.perf_counter()
    block, prefix = model.get_submodule(unit.name), f"{unit.name}."
    held = held_out_batches(len(unit.calls))
    # What is not absorbed is applied to a model that stays as it is, so its norms must not change.
    vectors = _own_vectors(model, block) if absorb else []
    tuned = tune_block(
        block,
        [{name.removeprefix(prefix): results[name] for name in site.linears} for site in unit.sites],
        vectors,
        unit.calls[:-held],
        unit.calls[-held:],
        config.tune,
        torch.Generator().manual_seed(config.seed),
        lambda loss: bar.show(f"tuning {unit.name}", loss),
    )
    kept = tuned.after < tuned.before
    report.blocks.append(BlockRecord(unit.name, tuned.before, tuned.after, kept, time.perf_counter() - began))
    if not kept:
        return results
    for name, values in tuned.vectors.items():
        owner = block.get_submodule(name.rpartition(".")[0])
        journal.remember(owner)
        block.get_parameter(name).copy_(values)
    for name, result in tuned.linears.items():
        device = block.get_submodule(name).residual.weight_packed.device
        journal.replace(prefix + name, TwinLinear.from_quantized(result).to(device))
    return {prefix + name: result for name, result in tuned.linears.items()}


def _own_vectors(model: nn.Module, block: nn.Module) -> list[str]:
    """Names of the one-dimensional floating-point parameters that this block alone reads."""
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [name for name, p in block.named_parameters() if p.dim() == 1 and p.is_floating_point() and uses[id(p)] == 1]


def _can_absorb(absorber: Absorber, unit: Unit) -> bool:
    """Whether the producer is calibrated with this unit: the unit's recorded inputs are those of an older producer."""
    if absorber.kind != "norm":
        return any(absorber.module in site.linears for site in unit.sites)
    return unit.name == "model" or absorber.module.startswith(f"{unit.name}.")


def _rotates_heads(absorber: Absorber) -> bool:
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
    if transform.scale is not None:
        absorber = work.scale_absorber
        parts.append(f"scale in {absorber.module}" if absorber else f"scale on-line ({site.reason or 'no absorber'})")
    shapes = [tuple(weight.shape) for weight in work.problem.weights]
    scaled = transform.scale is not None and work.scale_absorber is None
    cost = online_cost(shapes, 0 if work.rotation_absorber else block, scaled)
    return ", ".join(parts) + (f"; {cost.percent:.2f}% FLOPs on-line" if cost.flops else "") if parts else "none"


def _calibration_batches(model: nn.Module, calib_data: Any, tokenizer: Any, config: Config) -> list[Batch]:
    if calib_data is None:
        return []
    settings = getattr(model, "config", None)
    return load_calibration(
        calib_data,
        tokenizer=tokenizer,
        samples=config.samples,
        seq_len=config.seq_len,
        vocab_size=getattr(settings, "vocab_size", None),
    )


def _example(model: nn.Module, batches: list[Batch]) -> Batch:
    """A small input for capturing the graph: two rows of the data, or what the model itself suggests."""
    if not batches:
        return dict(getattr(model, "dummy_inputs", {}))
    return {k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in batches[0].items()}


def _mark(model: nn.Module, config: Config, report: Report) -> None:
    """Leave on the model what saving, reporting and ``save_pretrained`` need."""
    model.tqcompile_report = report
    specs = {name: m.spec.to_dict() for name, m in model.named_modules() if isinstance(m, QUANTIZED)}
    model.tqcompile_quantization = quantization_config(config, specs)
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        model.config.quantization_config = model.tqcompile_quantization
