"""Tracing: what is exported of a model, and torch.onnx.export with our ops kept as single nodes."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tqcompile.errors import ExportError
from tqcompile.exporters.portable import DOMAIN, INT8_INPUTS, LATTICE_INPUTS, QUANTIZE_INPUTS, TWIN_INPUTS
from tqcompile.exporters.verify import is_causal_lm, usual_inputs

TRACE_BATCH, TRACE_PAST, TRACE_NEW = 2, 9, 3  # 0 and 1 would be specialised into the program


class _Decoder(nn.Module):
    """forward(input_ids, attention_mask, position_ids, key 0, value 0, key 1, ...) -> (logits, key 0, value 0, ...)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *kv):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer in range(len(kv) // 2):
            cache.update(kv[2 * layer], kv[2 * layer + 1], layer)
        # .forward and not a call: a model may carry a compiled call, which must not be traced
        output = self.model.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present


class _Plain(nn.Module):
    """forward(tensors by position) -> the model's first output."""

    def __init__(self, model: nn.Module, names: list[str], fixed: dict):
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *tensors):
        output = self.model.forward(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        return output if isinstance(output, torch.Tensor) else output[0]


def decoder_program(model: nn.Module):
    """(module, arguments, dynamic shapes, input names, output names) of a causal model with its cache."""
    from transformers.cache_utils import DynamicLayer

    b, p, s = TRACE_BATCH, TRACE_PAST, TRACE_NEW
    ids = torch.arange(b * (p + s)).reshape(b, p + s) % model.config.get_text_config().vocab_size
    cache = model.forward(input_ids=ids[:, :p], use_cache=True).past_key_values
    for index, layer in enumerate(getattr(cache, "layers", [cache])):
        if type(layer) is not DynamicLayer:
            raise ExportError(
                f"layer {index} of {type(model).__name__} caches a {type(layer).__name__}; only plain keys and values "
                "can be exported. Use with_past=False."
            )
    kv = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    mask, positions = torch.ones(b, p + s, dtype=torch.int64), torch.arange(p, p + s).expand(b, s).contiguous()
    shapes = {
        "input_ids": {0: "b", 1: "s"},
        "attention_mask": {0: "b", 1: "t"},
        "position_ids": {0: "b", 1: "s"},
        "kv": tuple({0: "b", 2: "p"} for _ in kv),
    }
    pairs = [f"{layer}.{part}" for layer in range(len(kv) // 2) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in pairs)]
    outputs = ["logits", *(f"present.{name}" for name in pairs)]
    return _Decoder(model), (ids[:, p:].contiguous(), mask, positions, *kv), shapes, inputs, outputs


def plain_program(model: nn.Module, example: Mapping[str, torch.Tensor] | None):
    """As :func:`decoder_program`, for every other model and for a causal model without its cache."""
    causal = is_causal_lm(model)
    if example is None or causal:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None:
            raise ExportError(f"{type(model).__name__} has no config.vocab_size: pass example={{argument: tensor}}.")
        ids = torch.arange(TRACE_BATCH * TRACE_PAST).reshape(TRACE_BATCH, TRACE_PAST) % vocabulary
        example = usual_inputs(model, ids, torch.ones_like(ids))
    fixed = {"use_cache": False} if causal else {}
    output = model.forward(**example, **fixed)
    name = next(iter(output.keys())) if isinstance(output, Mapping) else "output"
    shapes = []
    for tensor in example.values():
        sequence = tensor.dim() > 2 or (tensor.dim() == 2 and not tensor.is_floating_point())
        shapes.append({0: "b", 1: "s"} if sequence else {0: "b"})
    module = _Plain(model, list(example), fixed)
    return module, tuple(example.values()), {"tensors": tuple(shapes)}, list(example), [name]


def trace(module: nn.Module, arguments: tuple, shapes: dict, inputs: list[str], outputs: list[str], opset: int):
    """torch.onnx.export to an ``onnx_ir.Model`` in which our ops are still single nodes with torch's layout."""
    with _schemas() as translations, _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=translations,
                verbose=False,
            )
        except Exception as error:
            cause = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"torch.onnx.export could not trace {type(module.model).__name__}: {cause}. A forward whose control "
                "flow depends on its data cannot be exported; try another `example` or with_past=False."
            ) from error
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about packages and axis names that are no concern of the user."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _schemas() -> Iterator[dict]:
    """Registers our ops with onnx while torch builds nodes of them; yields the translation table."""
    import onnx
    from onnxscript import values

    kinds = onnx.defs.OpSchema
    types = ["tensor(float)", "tensor(bfloat16)", "tensor(uint8)", "tensor(int8)"]
    specification = {
        "QuantizeActivation": (QUANTIZE_INPUTS, ("x_q", "x_scale"), []),
        "Int8Linear": (INT8_INPUTS, ("y",), []),
        "TwinLinear": (TWIN_INPUTS, ("y",), [kinds.Attribute("act_ratio", kinds.AttrType.FLOAT, required=False)]),
        "LatticeLinear": (LATTICE_INPUTS, ("y",), [kinds.Attribute("bits", kinds.AttrType.INT, required=False)]),
    }
    for name, (inputs, outputs, attributes) in specification.items():
        optional = kinds.FormalParameterOption.Optional
        taken = [kinds.FormalParameter(n, f"T_{n}", param_option=optional) for n in inputs]
        given = [kinds.FormalParameter(n, f"T_{n}") for n in outputs]
        constraints = [(f"T_{n}", types, "") for n in (*inputs, *outputs)]
        onnx.defs.register_schema(
            kinds(name, DOMAIN, 1, inputs=taken, outputs=given, type_constraints=constraints, attributes=attributes)
        )
    ours = values.Opset(DOMAIN, 1)

    def quantize_activation(x, input_scale=None, rotation=None):
        return ours.QuantizeActivation(x, input_scale, rotation)

    def twin_linear(x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype):
        tensors = (x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias)
        return ours.TwinLinear(*tensors, act_ratio=float(act_ratio))

    def int8_linear(x, weight, weight_scale, bias):
        return ours.Int8Linear(x, weight, weight_scale, bias)

    def lattice_linear(x, codes, scale, zero, offset, bias, bits):
        return ours.LatticeLinear(x, codes, scale, zero, offset, bias, bits=bits)

    registered = torch.ops.tqcompile
    try:
        yield {
            registered.quantize_activation.default: quantize_activation,
            registered.twin_linear.default: twin_linear,
            registered.int8_linear.default: int8_linear,
            registered.lattice_linear.default: lattice_linear,
        }
    finally:
        for name in specification:
            onnx.defs.deregister_schema(name, 1, DOMAIN)
