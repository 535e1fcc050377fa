"""``compile``: the main pipeline, from a model and calibration data to a quantized model.

check -> load data -> capture and analyse -> per block (quantize_unit.py): calibrate -> learn transforms -> absorb
-> quantize -> replace -> measure -> correct norms -> tune -> freeze -> torch.compile
"""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqcompile import distributed, recipes
from tqcompile.allocation import allocate
from tqcompile.calibration import Unit, check_finite, collect_statistics, device_of, split_into_units
from tqcompile.checkpoint import quantization_config
from tqcompile.config import Config
from tqcompile.data import Batch, load_calibration
from tqcompile.errors import ConfigError, ModelError
from tqcompile.finished_blocks import FinishedBlocks, counts, fingerprint
from tqcompile.methods.components import QuantizedLinear
from tqcompile.methods.hadamard import random_hadamard
from tqcompile.modules import QUANTIZED
from tqcompile.output_head import leave_head, quantize_head
from tqcompile.passes.analyze import analyze
from tqcompile.passes.correct_norm_mean import shifted_norms
from tqcompile.passes.plan import Plan
from tqcompile.passes.replace_conv1d import replace_conv1d, restore_conv1d
from tqcompile.passes.replace_linear import Journal
from tqcompile.passes.rotate_residual_stream import rotate_residual_stream, rotated_norms
from tqcompile.progress import Progress
from tqcompile.quantize_unit import Job, correct_unit, norm_gains, quantize_unit, tune_unit
from tqcompile.reporting import Report
from tqcompile.streaming import StreamedModel, check_config


@distributed.together()
def compile(
    model: nn.Module,
    calib_data: Any = None,
    *,
    scheme: str | None = None,
    config: Config | None = None,
    tokenizer: Any = None,
    backend: str | None = "auto",
    progress: bool = True,
    resume: str | Path | None = None,
    **settings: Any,
) -> nn.Module:
    """Quantize the linear layers of a model in place.

    Where torch.distributed is initialised with several processes, all of them must call this with equal arguments:
    they share the work and end up with equal models. Only process 0 writes to ``resume`` and shows progress.

    Args:
        model: any ``nn.Module``; Hugging Face models keep ``.generate()`` and ``save_pretrained``.
        calib_data: texts (with ``tokenizer``), token-id lists, a [B, S] tensor, dicts of model arguments, a
            DataLoader or other iterable of these, or a Hugging Face Dataset. None quantizes without data.
        scheme: e.g. ``"twin-w4a8"``; see ``tqcompile.SCHEMES``. config: all settings; settings: single ones.
        backend: "twinquant" compiles the result in place with torch.compile, None leaves it eager, "auto" compiles
            where the model is on a GPU.
        progress: show a progress bar on stderr.
        resume: a folder for finished blocks. A run that was interrupted and is started again with the same folder,
            model, data and settings goes on behind the last of them, and gives the same bytes. Delete it afterwards.
    Returns:
        the same model: quantized, in eval mode, parameters frozen. ``tqcompile.report(model)`` tells what was done.
    Raises:
        ConfigError, ModelError, CalibrationError, NumericError: named with the module or setting at fault; the
            model is then as it was. CheckpointError: of ``resume``, a finished block cannot be written or read.
            DistributedError: another process failed, is gone, or was given something else.
    """
    config = _resolve(config, scheme, settings)
    if backend not in ("auto", "twinquant", None):
        raise ConfigError(f"backend must be 'auto', 'twinquant' or None, got {backend!r}")
    with _frozen_while_working(model) as journal:
        transposed = replace_conv1d(model, journal)
        _, report = _quantize(model, calib_data, tokenizer, config, journal, progress, absorb=True, resume=resume)
        restore_conv1d(model, transposed, journal)
    model.requires_grad_(False)
    _mark(model, config, report)
    if backend == "twinquant" or (backend == "auto" and device_of(model).type == "cuda"):
        importlib.import_module("tqcompile.backend")  # a checkout that is not installed has no entry point
        # What was left alone here stays as it is, also in fragments that a graph break cuts off.
        model.compile(backend="twinquant", dynamic=True, options={"quantize": False})
    return model


@distributed.together()
def compile_streamed(
    source: StreamedModel,
    calib_data: Any,
    *,
    config: Config,
    resume: str | Path,
    tokenizer: Any = None,
    progress: bool = True,
) -> nn.Module:
    """:func:`compile` for a model larger than memory: each block is read, quantized, kept in ``resume`` and let go.

    Arguments and errors are those of :func:`compile`. Returns the model's structure and report, without the tensors of
    its blocks; ``source.save`` writes the checkpoint.
    """
    check_config(config)
    if calib_data is None:
        raise ConfigError("a model is streamed over calibration data, and calib_data is None; pass some")
    model = source.model
    with torch.no_grad():
        journal = Journal(model, undo=False)
        _, report = _quantize(model, calib_data, tokenizer, config, journal, progress, True, resume, source)
    _mark(model, config, report)
    return model


@distributed.together()
def attach_recipe(
    model: nn.Module,
    calib_data: Any = None,
    *,
    scheme: str | None = None,
    config: Config | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Calibrate a model for ``torch.compile(model, backend="twinquant")`` and leave it as it is.

    The quantized components are remembered beside the model's parameters (weakly), and the backend uses them in
    place of quantizing without data. Nothing is absorbed, so every transform stays on-line.

    Arguments and errors are those of :func:`compile`. Returns the report.
    """
    config = _resolve(config, scheme, settings)
    for name, kept in (("lm_head", "keep"), ("rotate_stream", False)):
        if getattr(config, name) != kept:
            value = getattr(config, name)
            raise ConfigError(f"attach_recipe leaves the model as it is, so {name}={value!r} has no place in it")
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
            if tensor is not None:
                check_finite(f"{name}.{leaf}", tensor)


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


def _resolve(config: Config | None, scheme: str | None, settings: dict[str, Any]) -> Config:
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config must be a tqcompile.Config, got {type(config).__name__}")
    if scheme is not None:
        settings = {**settings, "scheme": scheme}
    return (config or Config()).replace(**settings)


def _quantize(
    model: nn.Module,
    calib_data: Any,
    tokenizer: Any,
    config: Config,
    journal: Journal,
    progress: bool,
    absorb: bool,
    resume: str | Path | None = None,
    stream: StreamedModel | None = None,
) -> tuple[dict[str, QuantizedLinear], Report]:
    """Quantize in place; the report, and where nothing is absorbed the components by name of their linear."""
    batches = _calibration_batches(model, calib_data, tokenizer, config)
    plan = analyze(model, _example(model, batches), leave_head(model, config))
    if stream is not None and plan.sites:
        plan = stream.prepare(plan)
    if not plan.sites:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(plan.skipped.items())[:5])
        raise ModelError(f"no layer of {type(model).__name__} can be quantized ({reasons}).")
    original = model.state_dict() if stream is None else stream.original_state()
    if resume is None and distributed.active():
        distributed.require_same(fingerprint(model, batches, config, original))
    finished = None if resume is None else FinishedBlocks(resume, model, batches, config, original)
    progress = progress and distributed.first()
    report = Report(config.to_dict(), skipped=dict(plan.skipped), notes=list(plan.notes))
    rotated = _rotate_stream(model, plan, config, journal, report) if config.rotate_stream else frozenset()
    units = [Unit("model", list(plan.sites), None)]
    if not batches:
        report.notes.append("no calibration data: identity Hessian, no scales, errors not measured")
    elif len(batches) == 1:
        report.notes.append("a single calibration batch: errors are measured on the rows used for calibration")
    if config.bits_budget is not None:
        bar = Progress(False, "", 0)
        job = Job(model, config, journal, report, bar, absorb, rotated=rotated)
        config, report.choices = allocate(model, plan, batches, config, job, progress)
    quantized: dict[str, QuantizedLinear] = {}
    with Progress(progress, f"tqcompile {config.scheme}", len(plan.sites)) as bar:
        job = Job(model, config, journal, report, bar, absorb, rotated=rotated)
        recipes_of = {site: job.recipe(site) for site in plan.sites}
        balanced = {site for site, recipe in recipes_of.items() if recipe.balance}
        corrected = {site for site, recipe in recipes_of.items() if recipe.correct}
        tuned = {site for site, recipe in recipes_of.items() if recipe.tune * config.tune}
        if batches:
            units = split_into_units(model, plan.sites, batches, bool(tuned | corrected), corrected, stream)
        for unit in units:
            if finished is not None and finished.restore(job, unit):
                continue
            before = counts(job)
            device = config.device or device_of(model)
            statistics = collect_statistics(model, unit, batches, device, balanced) if batches else {}
            correct = absorb and not corrected.isdisjoint(unit.sites)
            gains = norm_gains(job, unit) if correct else {}
            results = quantize_unit(job, unit, statistics)
            if correct:
                correct_unit(job, unit, gains)
            if len(unit.calls) > 1 and not tuned.isdisjoint(unit.sites):
                results = tune_unit(job, unit, results)
            if not absorb:
                quantized |= results
            if finished is not None and unit.name != "model":
                finished.save(job, unit, before)
            elif finished is not None:
                report.notes.append(f"not kept for resuming: {len(unit.sites)} inputs of linears outside of its blocks")
    if distributed.active():
        report.notes.append(f"quantized by {distributed.size()} processes, learning in {config.shards} shards")
    if corrected:
        report.notes.append(_correction_note(model, job, report))
    if config.lm_head != "keep":
        quantize_head(model, config, batches, journal, report)
    return quantized, report


def _rotate_stream(model: nn.Module, plan: Plan, config: Config, journal: Journal, report: Report) -> frozenset[str]:
    """Rotate the residual stream by a signed Hadamard matrix; the names of the linears that read it."""
    if plan.stream is None:
        report.notes.append(f"the residual stream was not rotated: {plan.stream_reason}")
        return frozenset()
    rotation = random_hadamard(plan.stream.channels, torch.Generator().manual_seed(config.seed))
    # A head that is quantized anyway gets a weight of its own.
    tied_head = "insert" if config.lm_head == "keep" else "untie"
    size = rotation.shape[-1]
    report.notes.append(f"the residual stream was rotated by a random Hadamard matrix in blocks of {size} channels")
    report.notes += rotate_residual_stream(model, plan.stream, rotation, journal, tied_head)
    return frozenset(plan.stream.consumers)


def _correction_note(model: nn.Module, job: Job, report: Report) -> str:
    """What D2Quant's mean correction did, and what its biases cost beside the layers' own bits."""
    if not job.corrected:
        why = "no block has calibration data and such a norm" if job.absorb else "the model is left as it is"
        return f"the mean of no norm was corrected: {why}"
    stored = sum(8 * p.numel() * p.element_size() for p in map(model.get_parameter, job.corrected))
    bits = stored / sum(record.shape[0] * record.shape[1] for record in report.layers)
    return f"mean corrected by {len(job.corrected)} biases of norms: {bits:.4f} bits per weight more"


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
    model.tqcompile_quantization = quantization_config(config, specs, rotated_norms(model), shifted_norms(model))
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        model.config.quantization_config = model.tqcompile_quantization
