"""The output head as an option (``Config.lm_head``): weights rounded to 8 or 4 bits, activations left as they are.

At 4 bits it is a ``TwinLinear`` without a low rank and without a transform; at 8 bits an ``Int8Linear``. A head that
shares its weight with the embeddings is untied: it gets its own rounded copy, and the embeddings stay.
"""

import contextlib
import dataclasses
import time

import torch
from torch import nn

from tqcompile.calibration import model_kwargs
from tqcompile.config import Config
from tqcompile.data import Batch
from tqcompile.errors import ConfigError
from tqcompile.methods.components import LinearSpec
from tqcompile.methods.gptq import gptq, inverse_factor
from tqcompile.methods.rounding import group_scales, require_finite, round_to_codes, storable
from tqcompile.methods.statistics import SiteStatistics, StatisticsCollector
from tqcompile.modules import Int8Linear, TwinLinear, empty_layer
from tqcompile.ops.packing import pack_int4
from tqcompile.passes.replace_linear import Journal, declare_untied
from tqcompile.reporting import LayerRecord, Report, output_error, stored_bits

_BITS = {"w8a16": 8, "w4a16": 4}


def find_head(model: nn.Module) -> str:
    """The name of the model's output head.

    Raises:
        ConfigError: the model has none, or it is no plain ``nn.Linear``.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else getattr(model, "lm_head", None)
    if type(head) is not nn.Linear:
        what = "no output head" if head is None else f"an output head of type {type(head).__name__}"
        raise ConfigError(f"lm_head: {type(model).__name__} has {what}, so there is no nn.Linear to round; use 'keep'")
    return next(name for name, module in model.named_modules() if module is head)


def leave_head(model: nn.Module, config: Config) -> Config:
    """The settings for the rest of the model: the head is ignored where this file quantizes it."""
    if config.lm_head == "keep":
        return config
    return config.replace(ignore=(*config.ignore, find_head(model)))


def quantize_head(model: nn.Module, config: Config, batches: list[Batch], journal: Journal, report: Report) -> None:
    """Replace the head of a model whose other layers are done, and report its error on the last calibration batch.

    Raises:
        ConfigError: the group size does not divide its input features.
    """
    began, name = time.perf_counter(), find_head(model)
    head = model.get_submodule(name)
    if head.in_features % config.group_size:
        raise ConfigError(f"lm_head: group_size {config.group_size} does not divide {name}'s {head.in_features} inputs")
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight and n != f"{name}.weight"]
    seen = _head_statistics(model, head, batches, config.device) if batches else None
    layer = round_head(head, _BITS[config.lm_head], config.group_size, seen)
    error = None if seen is None else output_error(layer, head.weight.detach().float(), seen.held_out, None)
    seconds = time.perf_counter() - began
    report.layers.append(
        LayerRecord(
            name=name,
            shape=(head.out_features, head.in_features),
            scheme=config.lm_head,
            rank=0,
            error=error,
            bits=stored_bits(layer),
            transform="none",
            seconds=seconds,
        )
    )
    report.skipped.pop(name, None)
    if tied:
        report.notes.append(f"{name} was tied to {', '.join(tied)}: it has a rounded copy of its own, they stay")
        declare_untied(model, f"{name}.weight", journal)
    journal.replace(name, layer)


def round_head(head: nn.Linear, bits: int, group_size: int, seen: SiteStatistics | None) -> TwinLinear | Int8Linear:
    """Round a linear's weights: to nearest at 8 bits; at 4 bits by GPTQ, or to nearest when ``seen`` is None.

    Raises:
        NumericError: a weight is not finite, or the calibration Hessian cannot be factored.
    """
    weight = head.weight.detach().float()
    require_finite(weight, "the output head's weight", "Check the checkpoint.")
    spec = LinearSpec(
        out_features=head.out_features,
        in_features=head.in_features,
        rank=0,
        group_size=group_size,
        act_bits=16,
        bias_dtype=None if head.bias is None else str(head.bias.dtype).removeprefix("torch."),
        weight_bits=bits,
    )
    if bits == 8:
        groups = weight.unflatten(1, (-1, group_size))
        largest = groups.abs().amax(-1)
        scale = storable(torch.where(largest > 0, largest / 127, torch.ones_like(largest)))
        codes = (groups / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8).flatten(1)
        tensors = {"weight_int8": codes, "weight_scale": scale.to(torch.bfloat16)}
    else:
        if seen is None:
            scale = group_scales(weight, group_size, search=True)
            codes = round_to_codes(weight, scale)
        else:
            factor = inverse_factor(seen.hessian, "the output head")
            codes, scale = gptq(weight, factor, seen.hessian.diagonal(), group_size)
        tensors = {"residual.weight_packed": pack_int4(codes), "residual.weight_scale": scale.to(torch.bfloat16)}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().clone()
    layer = empty_layer(spec, device="meta")
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer


class _Reached(Exception):
    """The head was called; the rest of the forward pass is of no interest."""


def _head_statistics(model: nn.Module, head: nn.Linear, batches: list[Batch], device: str | None) -> SiteStatistics:
    """What the head reads on the calibration data, with the quantized layers in front of it; the last batch is held
    out where there are several."""
    device = device or head.weight.device
    collector = StatisticsCollector(head.in_features, device, len(batches), int(len(batches) > 1))
    held_out, reached = False, False

    def keep(_module, args):
        nonlocal reached
        reached = True
        collector.add(args[0].detach().reshape(-1, head.in_features), held_out)
        raise _Reached

    handle = head.register_forward_pre_hook(keep)
    try:
        for index, batch in enumerate(batches):
            held_out = 0 < index == len(batches) - 1
            with contextlib.suppress(_Reached):
                model(**model_kwargs(model, batch))
    finally:
        handle.remove()
    if not reached:
        raise ConfigError("lm_head: the model's forward does not reach its output head; use 'keep'")
    found = collector.finish()
    where = head.weight.device
    return dataclasses.replace(found, hessian=found.hessian.to(where), held_out=found.held_out.to(where))
