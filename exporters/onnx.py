"""Portable ONNX export: a quantized model as custom ops whose meaning travels in the file.

A quantized linear becomes one or two nodes of the domain ``com.tqcompile``, version 1. Every such op comes with a
model-local function body made of standard operators, so any runtime that inlines functions, stock ONNX Runtime
among them, runs the file without a library of ours; a runtime that knows the op may replace it by a kernel.

A function body cannot test whether an input is there, and the ONNX reference evaluator ignores function overloads,
so every combination of inputs is an op of its own name. The plain names are the 8-bit form; a suffix says what
differs, always in this order:

    QuantizeActivation [Scaled] [Rotated] (x, [input_scale], [rotation]) -> (x_q, x_scale)
    TwinLinear [A4 | A16] [Single] [Bias] (x, [x_scale], residual, residual_scale,
                                           [down, down_scale, up, up_scale], [bias]) -> (y)
    Int8Linear [Bias] (x, weight, weight_scale, [bias]) -> (y)

A4 reads activations at 4 bits in the residual (attribute ``act_ratio``); A16 takes float activations and no
``x_scale``; Single has no low-rank component. Weights are INT4 (K, N), the K-major form that ONNX Runtime fuses into
its 4-bit matrix product, in blocks of ``group_size`` (``up_group_size`` for ``up``) along K with float32 scales
(K/g, N). See docs/onnx.md.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tqcompile.errors import ExportError
from tqcompile.exporters.portable import lower
from tqcompile.exporters.trace import decoder_program, plain_program, trace
from tqcompile.exporters.verify import Verification, is_causal_lm, require, verify
from tqcompile.modules import QUANTIZED, Int8Linear, PackedWeight, Transform, TwinLinear
from tqcompile.passes.capture import eval_mode

OPSETS = range(21, 24)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    opset: int = 21,
    with_past: bool = True,
    example: Mapping[str, torch.Tensor] | None = None,
) -> Verification:
    """Export a quantized model to ``path``, check it in ONNX Runtime, and only then put it in place.

    Causal language models get the inputs input_ids (b, s), attention_mask (b, p + s), position_ids (b, s), all int64,
    and past_key_values.N.key / .value (b, heads, p, d) float32, and the outputs logits (b, s, vocabulary) and
    present.N.key / .value (b, heads, p + s, d). One file serves prefill (p = 0) and decoding. Other models get the
    inputs of ``example`` and their first output under its own name, e.g. last_hidden_state.

    Args:
        model: a float32 model on the CPU that :func:`tqcompile.compile` quantized. It is not changed.
        path: the ``.onnx`` file; the weights go beside it into ``<path>.data``.
        opset: version of the standard operators, 21 to 23.
        with_past: key/value cache as inputs and outputs; False leaves them out (input_ids, attention_mask -> logits).
        example: arguments of ``model.forward`` by name, batch first, at least 2 in every dimension that varies.
            Dimension 0 is dynamic, and dimension 1 of integers and of tensors with three dimensions or more. The
            default is random input_ids and an attention_mask. A causal model takes only its ``input_ids``, as prompt
            of the verification.
    Returns:
        what was verified (:class:`tqcompile.exporters.verify.Verification`); it is path-like.
    Raises:
        ExportError: the onnx extra is missing, the model is not quantized, not float32 or not on the CPU, its cache
            is not one of plain keys and values, tracing failed, or the file does not reproduce the model. A file
            that was at ``path`` before is then still there, unchanged.
    """
    require("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    target = Path(path)
    if target.suffix != ".onnx" or not target.parent.is_dir():
        raise ExportError(f"cannot export to {target}: expected a name ending in .onnx in a directory that exists.")
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; choose {OPSETS[0]} to {OPSETS[-1]} (INT4 begins with 21).")
    check_exportable(model)
    with eval_mode(model), torch.no_grad():
        if is_causal_lm(model) and with_past:
            program = trace(*decoder_program(model), opset)
        else:
            program = trace(*plain_program(model, example), opset)
        lower(program, opset)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            _save(program, draft)
            verification = verify(draft, model, example=example)
            _move_into_place(draft, target)
    verification.path = target
    return verification


def check_exportable(model: nn.Module) -> None:
    """Raise ExportError, naming the tensor at fault, when a model is not quantized, not float32 or not on the CPU."""
    if not any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no quantized layer. Call tqcompile.compile(model, ...) first; "
            "for an unquantized model use torch.onnx.export."
        )
    for prefix, module in model.named_modules():
        ours = set(module._buffers) if isinstance(module, PackedWeight | Transform) else set()
        ours |= {"down", "up", "bias"} if isinstance(module, TwinLinear) else set()
        ours |= set(module._buffers) if isinstance(module, Int8Linear) else set()
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{prefix}.{key}".lstrip(".")
            if tensor.device.type != "cpu":
                raise ExportError(f"{name} is on {tensor.device}; export runs on the CPU. Call model.cpu() first.")
            if tensor.is_floating_point() and tensor.dtype != torch.float32 and key not in ours:
                raise ExportError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only float32 models can be exported so "
                    "far. Call model.float() first: packed weights and their scales stay as they are."
                )


def _save(program, draft: Path) -> None:
    """Write the model and its external data, never through one protobuf message: those end at 2 GB."""
    import onnx_ir as ir

    try:
        ir.save(program, draft, external_data=f"{draft.name}.data")
    except OSError as error:
        raise ExportError(f"writing {draft.name} failed: {error}. Free some space and export again.") from error


def _move_into_place(draft: Path, target: Path) -> None:
    """Put data and model at ``target``; should the second step fail, the old data is put back."""
    data, new_data = target.with_name(f"{target.name}.data"), draft.with_name(f"{draft.name}.data")
    kept = draft.with_name("previous.data")
    try:
        if data.exists():
            os.replace(data, kept)
        os.replace(new_data, data)
        os.replace(draft, target)
    except OSError as error:
        if kept.exists():
            os.replace(kept, data)
        raise ExportError(f"cannot move the exported model to {target}: {error}.") from error
