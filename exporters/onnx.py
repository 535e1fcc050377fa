"""ONNX export: a quantized model as custom ops whose meaning travels in the file, or as what they mean.

In the portable form a quantized linear becomes one or two nodes of the domain ``com.tqcompile``, version 1. Every such
op comes with a model-local function body made of standard operators, so any runtime that inlines functions, stock ONNX
Runtime among them, runs the file without a library of ours; a runtime that knows the op may replace it by a kernel.

A function body cannot test whether an input is there, and the ONNX reference evaluator ignores function overloads,
so every combination of inputs is an op of its own name. The plain names are the 8-bit form; a suffix says what
differs, always in this order:

    QuantizeActivation [Scaled] [Rotated] (x, [input_scale], [rotation]) -> (x_q, x_scale)
    TwinLinear [A4 | A16] [Single] [Bias] (x, [x_scale], residual, residual_scale,
                                           [down, down_scale, up, up_scale], [bias]) -> (y)
    Int8Linear [Bias] (x, weight, weight_scale, [bias]) -> (y)
    LatticeLinear W2|W3 [Zero] [Offset] [Bias] (x, codes, scale, [zero], [offset], [bias]) -> (y)

A4 reads activations at 4 bits in the residual (attribute ``act_ratio``); A16 takes float activations and no
``x_scale``; Single has no low-rank component. Weights are INT4 (K, N), the K-major form that ONNX Runtime fuses into
its 4-bit matrix product, in blocks of ``group_size`` (``up_group_size`` for ``up``) along K with float32 scales
(K/g, N). Codes of 2 and 3 bits (W2, W3) are packed bytes, also K-major. The inlined form has the bodies in place of
the ops; the ort form is in exporters/ort.py. See docs/onnx.md.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import tqcompile
from tqcompile.errors import ExportError
from tqcompile.exporters.beside import write_beside
from tqcompile.exporters.session import require
from tqcompile.exporters.trace import decoder_program, plain_program, trace
from tqcompile.exporters.verify import DECODE_STEPS, FORM, Verification, is_causal_lm, verify
from tqcompile.modules import QUANTIZED, LatticeLinear, LatticeTransform, PackedWeight, Transform
from tqcompile.passes.capture import eval_mode

HOLDERS = (PackedWeight, Transform, LatticeTransform)
FORMS = ("portable", "ort", "inlined")
OPSETS = range(21, 24)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    form: str = "portable",
    opset: int = 21,
    dtype: str | torch.dtype = "float32",
    with_past: bool = True,
    tokenizer=None,
    example: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    verify_steps: int = DECODE_STEPS,
) -> Verification:
    """Export a quantized model to ``path``, check it in ONNX Runtime, and only then put it in place.

    Causal language models get the inputs input_ids (b, s), attention_mask (b, p + s), position_ids (b, s), all int64,
    and past_key_values.N.key / .value (b, heads, p, d) float32, and the outputs logits (b, s, vocabulary) and
    present.N.key / .value (b, heads, p + s, d). One file serves prefill (p = 0) and decoding. Other models get the
    inputs of ``example`` and their first output under its own name, e.g. last_hidden_state.

    Args:
        model: a float32 model on the CPU that :func:`tqcompile.compile` quantized. It is not changed.
        path: the ``.onnx`` file; the weights go beside it into ``<path>.data``. A Hugging Face model's config.json
            and generation_config.json are written into the same folder.
        form: "portable", custom ops that carry bodies of standard operators; "inlined", those operators alone;
            "ort", ONNX Runtime's 4-bit products, the fastest there, with 8-bit activations rounded its way; not for
            layers of 2 or 3 bits.
        opset: version of the standard operators, 21 to 23.
        dtype: of activations, cache and logits; "float32" is the only one so far.
        with_past: key/value cache as inputs and outputs; False leaves them out (input_ids, attention_mask -> logits).
        tokenizer: a transformers tokenizer, or a folder that holds one; saved beside the file.
        example: arguments of ``model.forward`` by name, batch first, at least 2 in every dimension that varies.
            Dimension 0 is dynamic, and dimension 1 of integers and of tensors with three dimensions or more. The
            default is random input_ids and an attention_mask. A causal model takes only its ``input_ids``, as prompt
            of the verification.
        overwrite: replace files that exist; without it they are an error.
        verify_steps: tokens that the verification decodes; fewer save time with a model of many gigabytes.
    Returns:
        what was verified (:class:`tqcompile.exporters.verify.Verification`), the layers that stay in floating point
        and the reasons included; it is path-like.
    Raises:
        ExportError: the onnx extra is missing, a setting or the path is not usable, the model is not quantized, not
            float32 or not on the CPU, the form cannot hold a layer, its cache is not one of plain keys and values,
            tracing failed, or the file does not reproduce the model. Nothing is then left behind, and files that were
            there before are unchanged.
    """
    require("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    from tqcompile.exporters.pipeline import finish

    target = Path(path)
    check_settings(form, opset, dtype)
    check_target(target, overwrite)
    check_exportable(model, form)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error}. Choose a folder that can be written.") from error
    with scratch, eval_mode(model), torch.no_grad():
        draft = Path(scratch.name) / "new" / target.name
        draft.parent.mkdir()
        write_beside(model, tokenizer, draft.parent)
        _check_beside(draft.parent, target.parent, overwrite)
        if is_causal_lm(model) and with_past:
            program = trace(*decoder_program(model), opset)
        else:
            program = trace(*plain_program(model, example), opset)
        finish(program, form, opset)
        _describe(program, model, form)
        _save(program, draft)
        verification = verify(draft, model, example=example, steps=verify_steps)
        _move_into_place(draft.parent, target.parent, Path(scratch.name))
    verification.path = target
    return verification


def check_settings(form: str, opset: int, dtype: str | torch.dtype) -> None:
    """Raise ExportError on a form, opset or dtype that there is not."""
    if form not in FORMS:
        raise ExportError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}.")
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; choose {OPSETS[0]} to {OPSETS[-1]} (INT4 begins with 21).")
    name = str(dtype).removeprefix("torch.")
    if name != "float32":
        why = "ONNX Runtime on the CPU has no bfloat16 DequantizeLinear; " if name == "bfloat16" else ""
        raise ExportError(
            f"dtype {name} cannot be exported: {why}only float32 is supported so far. Use dtype='float32'."
        )


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ExportError when no file can or may be written at ``target``."""
    if target.suffix != ".onnx" or not target.parent.is_dir():
        raise ExportError(f"cannot export to {target}: expected a name ending in .onnx in a directory that exists.")
    if target.is_dir():
        raise ExportError(f"cannot export to {target}: it is a directory. Give the name of a file in it.")
    for file in (target, target.with_name(f"{target.name}.data")):
        if file.exists() and not overwrite:
            raise ExportError(
                f"{file} exists. Choose another name, or pass overwrite=True (--overwrite) to replace it."
            )


def check_exportable(model: nn.Module, form: str) -> None:
    """Raise ExportError, naming what is at fault, when a model is not quantized, not float32 or not on the CPU, or has
    layers that the form cannot hold."""
    if not any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no quantized layer. Call tqcompile.compile(model, ...) first; "
            "for an unquantized model use torch.onnx.export."
        )
    for prefix, module in model.named_modules():
        if form == "ort" and isinstance(module, LatticeLinear):
            raise ExportError(
                f"{prefix or type(model).__name__} has {module.spec.weight_bits}-bit codes, which the products of the "
                'ort form cannot read. Export form="portable" (--form portable) instead.'
            )
        ours = set(module._buffers) if isinstance(module, (*QUANTIZED, *HOLDERS)) else set()
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{prefix}.{key}".lstrip(".")
            if tensor.device.type != "cpu":
                raise ExportError(f"{name} is on {tensor.device}; export runs on the CPU. Call model.cpu() first.")
            if tensor.is_floating_point() and tensor.dtype != torch.float32 and key not in ours:
                raise ExportError(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only float32 models can be exported so "
                    "far. Call model.float() first: packed weights and their scales stay as they are."
                )


def _check_beside(new: Path, folder: Path, overwrite: bool) -> None:
    """Raise ExportError where a file of ``new`` would replace another one of ``folder`` that is not ours to replace."""
    for file in sorted(new.iterdir()):
        old = folder / file.name
        if not old.exists() or (old.is_file() and old.read_bytes() == file.read_bytes()):
            continue
        if any(folder.glob("*.safetensors")):
            raise ExportError(f"{folder} holds a checkpoint whose {file.name} would be replaced. Use another folder.")
        if not overwrite:
            raise ExportError(
                f"{old} exists and differs from the one of this model. Choose another folder, or pass overwrite=True "
                "(--overwrite) to replace it."
            )


def _describe(program, model: nn.Module, form: str) -> None:
    """Say in the file what it is: form, scheme and the versions that made it."""
    import onnx
    import transformers

    quantization = getattr(model, "tqcompile_quantization", None)
    program.metadata_props[FORM] = form
    if quantization:
        program.metadata_props["tqcompile.scheme"] = quantization["config"]["scheme"]
    versions = {"tqcompile": tqcompile, "torch": torch, "transformers": transformers, "onnx": onnx}
    for name, package in versions.items():
        program.metadata_props[f"{name}.version"] = str(package.__version__)
    program.producer_name, program.producer_version = "tqcompile", tqcompile.__version__


def _save(program, draft: Path) -> None:
    """Write the model and its external data, never through one protobuf message: those end at 2 GB."""
    import onnx_ir as ir

    try:
        ir.save(program, draft, external_data=f"{draft.name}.data")
    except OSError as error:
        raise ExportError(f"writing {draft.name} failed: {error}. Free some space and export again.") from error


def _move_into_place(new: Path, folder: Path, scratch: Path) -> None:
    """Move every file of ``new`` to ``folder``, the model last; should a step fail, everything is put back."""
    old = scratch / "old"
    old.mkdir()
    files = sorted(new.iterdir(), key=lambda file: file.suffix == ".onnx")
    before = {file.name for file in files if (folder / file.name).exists()}
    try:
        for file in files:
            if file.name in before:
                os.replace(folder / file.name, old / file.name)
            os.replace(file, folder / file.name)
    except OSError as error:
        for file in files:
            if (old / file.name).exists():
                os.replace(old / file.name, folder / file.name)
            elif file.name not in before:
                (folder / file.name).unlink(missing_ok=True)
        raise ExportError(f"cannot move the exported model to {folder}: {error}.") from error
