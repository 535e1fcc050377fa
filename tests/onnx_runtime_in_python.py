"""A second implementation of the domain com.tqcompile, written from docs/onnx.md alone, for onnx's evaluator."""

import itertools

import numpy as np
from onnx.reference.op_run import OpRun

DOMAIN = "com.tqcompile"


def _dequantized(weight: np.ndarray, scale: np.ndarray, group_size: int) -> np.ndarray:
    k = np.arange(weight.shape[0])
    return weight.astype(np.float32) * scale[k // group_size]


class _QuantizeActivation(OpRun):
    op_domain = DOMAIN

    def _run(self, x, *rest):
        rest = list(rest)
        h = x * rest.pop(0) if "Scaled" in type(self).__name__ else x
        if "Rotated" in type(self).__name__:
            rotation = rest.pop(0)
            b = rotation.shape[0]
            h = np.concatenate([h[..., i : i + b] @ rotation for i in range(0, h.shape[-1], b)], -1)
        assert not rest
        x_scale = np.maximum(np.abs(h).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
        return np.clip(np.rint(h / x_scale), -127, 127).astype(np.int8), x_scale


class _TwinLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, *inputs, group_size=None, up_group_size=None, act_ratio=None):
        name, inputs = type(self).__name__, list(inputs)
        wide = inputs.pop(0).astype(np.float32)
        x_scale = np.float32(1) if "A16" in name else inputs.pop(0)
        operand = wide
        if name.startswith("TwinLinearA4"):
            ratio = np.float32(act_ratio)
            operand = np.clip(np.rint(wide * ratio), -8, 7) / ratio
        y = operand @ _dequantized(inputs.pop(0), inputs.pop(0), group_size) * x_scale
        if "Single" not in name:
            t = wide @ _dequantized(inputs.pop(0), inputs.pop(0), group_size) * x_scale
            y = y + t @ _dequantized(inputs.pop(0), inputs.pop(0), up_group_size)
        if name.endswith("Bias"):
            y = y + inputs.pop(0)
        assert not inputs
        return (y,)


class _Int8Linear(OpRun):
    op_domain = DOMAIN

    def _run(self, x, weight, weight_scale, *bias, group_size=None):
        assert len(bias) == type(self).__name__.endswith("Bias")
        return (sum(bias, x @ _dequantized(weight, weight_scale, group_size)),)


def _classes() -> list[type[OpRun]]:
    """One class an op name, since onnx finds an implementation by the name of its class."""
    found = [_named(_QuantizeActivation, *parts) for parts in itertools.product(("", "Scaled"), ("", "Rotated"))]
    suffixes = itertools.product(("", "A4", "A16"), ("", "Single"), ("", "Bias"))
    found += [_named(_TwinLinear, *parts) for parts in suffixes]
    return found + [_named(_Int8Linear, bias) for bias in ("", "Bias")]


def _named(base: type[OpRun], *suffixes: str) -> type[OpRun]:
    return type(base.__name__[1:] + "".join(suffixes), (base,), {})


OPS = _classes()
