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


class _LatticeLinear(OpRun):
    op_domain = DOMAIN

    def _run(self, x, codes, scale, *rest):
        name, rest = type(self).__name__, list(rest)
        bits, k = (2, 4 * len(codes)) if "W2" in name else (3, 8 * len(codes) // 3)
        columns = np.arange(k)
        code = codes[columns // 4] >> (2 * (columns % 4))[:, None].astype(np.uint8) & 3
        if bits == 3:
            code = code + 4 * (codes[k // 4 + columns // 8] >> (columns % 8)[:, None].astype(np.uint8) & 1)
        group = columns * len(scale) // k
        weight = code.astype(np.float32)
        if "Zero" in name:
            weight = weight - rest.pop(0)[group].astype(np.float32) / np.float32(32)
        if "Offset" in name:
            offset = rest.pop(0)
            weight = weight + offset[columns % len(offset), None]
        y = x @ (weight * scale[group])
        if name.endswith("Bias"):
            y = y + rest.pop(0)
        assert not rest
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
    found += [
        _named(_LatticeLinear, *parts) for parts in itertools.product(("W2", "W3"), ("Zero", "Offset"), ("", "Bias"))
    ]
    return found + [_named(_Int8Linear, bias) for bias in ("", "Bias")]


def _named(base: type[OpRun], *suffixes: str) -> type[OpRun]:
    return type(base.__name__[1:] + "".join(suffixes), (base,), {})


OPS = _classes()
