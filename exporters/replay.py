"""The eager model with the quantized activations of an exported file in place of its own.

Two correct float32 programs differ in their last bits, and where activations are rounded such a difference now and
then tips a value to the next step. :mod:`tqcompile.exporters.verify` says why the comparison replays them.
"""

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from tqcompile import ops
from tqcompile.errors import ExportError
from tqcompile.modules import LatticeLinear, TwinLinear
from tqcompile.ops.quantize_activation import transform_activation

TIPPED = 5e-3
KEPT_BYTES = 1 << 30


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the ops on the CPU unpack every weight once and keep it, if all take at most ``KEPT_BYTES``.

    Unpacking takes nearly all of the time of a decoding step of the eager model.
    """
    layers = [module for module in model.modules() if isinstance(module, TwinLinear | LatticeLinear)]
    if sum(4 * layer.in_features * layer.out_features for layer in layers) > KEPT_BYTES:
        yield
        return
    kept: dict[tuple[int, int], torch.Tensor] = {}

    def keeping(original):
        def dequantize(packed, scale, *rest):
            key = packed.data_ptr(), scale.data_ptr()  # buffers of the model, which lives on
            if key not in kept:
                kept[key] = original(packed, scale, *rest)
            return kept[key]

        return dequantize

    with ExitStack() as patches:
        for op, name in (("twin_linear", "dequantize_int4"), ("lattice_linear", "dequantize_codes")):
            module = importlib.import_module(f"tqcompile.ops.{op}")
            patches.enter_context(mock.patch.object(module, name, keeping(getattr(module, name))))
        yield


class Replay:
    """Runs the eager model with the quantized activations of the file, and compares them with its own.

    unrounded: layers whose activations the file does not give out go on with float activations (the ``ort`` form
    leaves their rounding to ONNX Runtime); otherwise they round as always.
    """

    def __init__(self, model: nn.Module, *, unrounded: bool = False):
        self.unrounded = unrounded
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, TwinLinear)}
        self.seen: Counter[str] = Counter()
        self.tipped: Counter[str] = Counter()
        self.wrong: dict[str, int] = {}

    @contextmanager
    def using(
        self, codes: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]], valid: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Inside, every layer reads ``codes`` in place of what it would quantize itself.

        valid: (b, s) bool, the positions to compare; padding may hold anything.
        """
        queues = {name: iter(pairs) for name, pairs in codes.items()}
        original, current = ops.quantize_activation, []

        def quantize(x, input_scale=None, rotation=None):
            name = current[-1]
            if name not in queues and self.unrounded:
                dense = transform_activation(x, input_scale, rotation)
                return dense, torch.ones_like(dense[..., :1])
            own, scale = original(x, input_scale, rotation)
            if name not in queues:  # its output is not asked for: an encoder's pooler
                return own, scale
            given, given_scale = next(queues[name], (None, None))
            if given is None or given.shape != own.shape:
                raise ExportError(f"layer {name} of the model is not in the file with the same shape; export again.")
            steps = (own.int() - given.int()).abs()
            off = (scale - given_scale).abs() > 1e-3 * scale
            if valid is not None and own.shape[:-1] == valid.shape:
                steps, off = steps[valid], off[valid]
            self.seen[name] += steps.numel()
            self.tipped[name] += int((steps > 0).sum())
            self.wrong[name] = max(self.wrong.get(name, 0), int(steps.max()), 255 * int(off.any()))
            return given, given_scale

        hooks = []
        for name, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: current.append(name)))
        try:
            with mock.patch.object(ops, "quantize_activation", quantize):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def check(self, file: str) -> float:
        """The largest share of tipped values of a layer. Raises ExportError where it is not rounding."""
        shares = {name: self.tipped[name] / self.seen[name] for name in self.seen}
        for name, share in shares.items():
            if share > TIPPED or self.wrong[name] > 1:
                raise ExportError(
                    f"{file} does not quantize the input of {name} as the model does: {share:.2%} of the values "
                    f"differ, by up to {self.wrong[name]} steps; {TIPPED:.2%} by one step are rounding. Do not use "
                    "this file: try another opset, and report the model if that fails too."
                )
        return max(shares.values(), default=0.0)
