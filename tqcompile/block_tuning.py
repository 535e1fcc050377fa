"""Block tuning: a quantized decoder block is adjusted until its output is that of the full-precision block.

Input: what the quantized blocks before it give; target: what the full-precision model has behind the block. Tuned are
the scales of the low-rank factors, biases, the clip of 4-bit activations and the block's other vectors (gains and
biases of norms). Codes, scales of the residual and transforms stay; LR_CODES > 0 tunes codes too, straight through.
Below four bits all scales, zero points, offsets and bases of lattices are tuned, on which there is no integer grid.
Everything is computed in float32, whatever the model's dtype.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tqcompile.calibration import BlockCall
from tqcompile.distributed import numbers, sum_parts
from tqcompile.methods.components import QuantizedLinear
from tqcompile.methods.hadamard import signed_hadamard
from tqcompile.methods.learn import (
    BETAS,
    cosine,
    fake_quantize_activation,
    fast_matmul,
    flat_gradient,
    flat_like,
    same_values,
    set_gradients,
    straight_round,
)
from tqcompile.methods.rounding import QMAX, QMIN, storable
from tqcompile.ops.lattice_linear import ZERO_STEPS, mix_outputs
from tqcompile.ops.packing import pack_int4, unpack_codes, unpack_int4
from tqcompile.ops.quantize_activation import transform_activation

# In steps of the integer grid. Codes that move cost most of the time and memory, and made held-out errors larger.
LR_CODES = 0.0
LR_SCALE = 2e-3  # relative
LR_VECTOR = 1e-3  # relative to the vector's largest entry
LR_CLIP = 5e-3
# Below four bits more is wrong, and steps may be larger.
LR_LOW_SCALE = 6e-3  # relative
LR_POINT = 1e-2  # zero points and offsets in codes, entries of a basis
LOW_VECTOR = 3.0  # factor on LR_VECTOR
LOW_RATES = (("low_factor", LR_LOW_SCALE), ("point", LR_POINT))
TOKENS = 2048


class _Codes(nn.Module):
    """A 4-bit matrix (N, K) whose codes are learned; its scale (N, G) too where ``scaled``."""

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, scaled: bool):
        super().__init__()
        self.codes = nn.Parameter(unpack_int4(packed).float(), requires_grad=LR_CODES > 0)
        self.scale = scale.float()
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale)) if scaled else None

    def stored_scale(self) -> torch.Tensor:
        if self.log_factor is None:
            return self.scale
        return _stored(self.scale, self.log_factor)

    def forward(self) -> torch.Tensor:
        codes = straight_round(self.codes).clamp(QMIN, QMAX)
        return (codes.unflatten(-1, (self.scale.shape[1], -1)) * self.stored_scale().unsqueeze(-1)).flatten(-2)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        codes = self.codes.detach().round().clamp(QMIN, QMAX).to(torch.int8)
        return {
            f"{name}.weight_packed": pack_int4(codes),
            f"{name}.weight_scale": self.stored_scale().detach().to(torch.bfloat16),
        }


class TunableLinear(nn.Module):
    """The differentiable form of a ``TwinLinear`` with 4-bit components; x (..., K) float32 -> (..., N).

    sibling: another linear of the same site, with which it shares ``down`` and the clip, as quantized linears do: what
    a site computes of its input is computed once for all of them.
    """

    def __init__(self, quantized: QuantizedLinear, device: torch.device, sibling: "TunableLinear | None" = None):
        super().__init__()
        spec, tensors = quantized.spec, {n: t.to(device) for n, t in quantized.tensors.items()}
        self.quantized, self.spec = quantized, spec
        parts = ("residual", "down", "up") if spec.rank else ("residual",)
        self.parts = nn.ModuleDict(
            {n: _Codes(tensors[f"{n}.weight_packed"], tensors[f"{n}.weight_scale"], n != "residual") for n in parts}
        )
        if sibling is not None and spec.rank:
            self.parts["down"] = sibling.parts["down"]
        self.bias = nn.Parameter(tensors["bias"].float().clone()) if "bias" in tensors else None
        self.input_scale, self.rotation = tensors.get("transform.input_scale"), tensors.get("transform.rotation")
        clip = QMAX / 127 / spec.act_ratio if spec.act_ratio else 1.0
        self.clip = nn.Parameter(torch.tensor(clip, device=device)) if spec.act_ratio else None
        if sibling is not None:
            self.clip = sibling.clip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = transform_activation(x, self.input_scale, self.rotation)
        fine = fake_quantize_activation(x, max(8, self.spec.act_bits))
        residual = self.parts["residual"]()
        if self.clip is None:
            if self.spec.rank:
                residual = residual + self.parts["up"]() @ self.parts["down"]()
            return nn.functional.linear(fine, residual, self.bias)
        y = nn.functional.linear(fake_quantize_activation(x, 4, self.clip), residual, self.bias)
        if self.spec.rank:
            y = y + nn.functional.linear(nn.functional.linear(fine, self.parts["down"]()), self.parts["up"]())
        return y

    def result(self) -> QuantizedLinear:
        """What is stored now."""
        device = next(iter(self.quantized.tensors.values())).device
        tensors = dict(self.quantized.tensors)
        for name, part in self.parts.items():
            tensors |= part.tensors(name)
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().to(tensors["bias"].dtype)
        spec = self.spec
        if self.clip is not None:
            spec = dataclasses.replace(spec, act_ratio=QMAX / (127 * float(self.clip.detach())))
        return QuantizedLinear(spec, {n: t.to(device) for n, t in tensors.items()})


class TunableLattice(nn.Module):
    """The differentiable form of a ``LatticeLinear``; x (..., K) float32 -> (..., N). Codes stay.

    sibling: another linear of the same site, with which it shares the lattice and ``down``, so that a compiler can
    make both one linear.
    """

    def __init__(self, quantized: QuantizedLinear, device: torch.device, sibling: "TunableLattice | None" = None):
        super().__init__()
        spec, tensors = quantized.spec, {n: t.to(device) for n, t in quantized.tensors.items()}
        self.quantized, self.spec = quantized, spec

        def parameter(name: str, factor: float = 1.0) -> nn.Parameter | None:
            return nn.Parameter(tensors[name].float() * factor) if name in tensors else None

        self.levels = unpack_codes(tensors["weight_codes"], spec.weight_bits).float()
        self.scale = tensors["weight_scale"].float()
        self.low_factor = nn.Parameter(torch.zeros_like(self.scale))
        self.zero_point = parameter("weight_zero", 1 / ZERO_STEPS)
        self.offset_point, self.basis_point = parameter("weight_offset"), parameter("transform.basis")
        if sibling is not None:
            self.offset_point, self.basis_point = sibling.offset_point, sibling.basis_point
        self.output_scale = tensors["output_scale"].float() if spec.output_signs else None
        self.output_low_factor = nn.Parameter(torch.zeros_like(self.output_scale)) if spec.output_signs else None
        self.bias = parameter("bias")
        self.input_scale = tensors.get("transform.input_scale")
        self.rotation = signed_hadamard(spec.rotation_signs).to(device) if spec.rotation_signs else None
        self.output_rotation = signed_hadamard(spec.output_signs).to(device) if spec.output_signs else None
        parts = ("down", "up") if spec.rank else ()
        self.parts = nn.ModuleDict(
            {n: _Codes(tensors[f"{n}.weight_packed"], tensors[f"{n}.weight_scale"], True) for n in parts}
        )
        if sibling is not None and spec.rank:
            self.parts["down"] = sibling.parts["down"]

    def zero(self) -> torch.Tensor:
        """(N, K/g), on the steps in which it is stored."""
        return straight_round(self.zero_point * ZERO_STEPS).clamp(0, 255) / ZERO_STEPS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        points = self.levels.unflatten(-1, (self.scale.shape[1], -1))
        if self.zero_point is not None:
            points = points - self.zero().unsqueeze(-1)
        else:
            points = points.unflatten(-1, (-1, self.spec.lattice)) + self.offset_point
            points = points if self.basis_point is None else points @ self.basis_point.t()
            points = points.flatten(-2)
        weight = (points * _stored(self.scale, self.low_factor).unsqueeze(-1)).flatten(-2)
        if self.spec.rank:
            weight = weight + self.parts["up"]() @ self.parts["down"]()
        y = nn.functional.linear(transform_activation(x, self.input_scale, self.rotation), weight)
        if self.output_rotation is not None:
            return mix_outputs(y, self.output_rotation, _stored(self.output_scale, self.output_low_factor), self.bias)
        return y if self.bias is None else y + self.bias

    def result(self) -> QuantizedLinear:
        """What is stored now."""
        tensors = dict(self.quantized.tensors)
        found = {"weight_scale": _stored(self.scale, self.low_factor), "bias": self.bias}
        if self.zero_point is not None:
            found["weight_zero"] = self.zero() * ZERO_STEPS
        found |= {"weight_offset": self.offset_point, "transform.basis": self.basis_point}
        if self.output_scale is not None:
            found["output_scale"] = _stored(self.output_scale, self.output_low_factor)
        for name, part in self.parts.items():
            tensors |= part.tensors(name)
        for name, value in found.items():
            if value is not None:
                tensors[name] = value.detach().to(tensors[name], copy=True)  # files hold no tensor twice
        return QuantizedLinear(self.spec, tensors)


def _stored(scale: torch.Tensor, log_factor: torch.Tensor) -> torch.Tensor:
    """A tuned scale as it is stored, in bfloat16; differentiable in ``log_factor``."""
    exact = scale * log_factor.exp()
    return exact + (storable(exact) - exact).detach()


@dataclasses.dataclass
class Tuned:
    """linears: name inside the block -> what to store; vectors: parameter name -> values; losses on held-out calls."""

    linears: dict[str, QuantizedLinear]
    vectors: dict[str, torch.Tensor]
    before: float
    after: float


def tune_block(
    block: nn.Module,
    sites: list[dict[str, QuantizedLinear]],
    vectors: list[str],
    calls: list[BlockCall],
    held_out: list[BlockCall],
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[float], None] = lambda loss: None,
    shards: int = 1,
) -> Tuned:
    """Tune one block; ``block`` itself is left as it was.

    Args:
        block: the module that holds the linears. sites: for each, name inside the block -> quantized linear.
        vectors: names of the one-dimensional parameters to tune. calls: to learn from; held_out: to measure before
            and after.
        steps: each reads about TOKENS tokens of one call. generator: draws calls and rows. on_step: told the loss.
        shards: parts in which a gradient is formed, each of some of a step's sequences; see ``Config.shards``.
    """
    device = calls[0].hidden.device
    tunable: dict[str, TunableLinear | TunableLattice] = {}
    for site in sites:
        first = None
        for name, quantized in site.items():
            kind = TunableLattice if quantized.spec.weight_bits < 4 else TunableLinear
            tunable[name] = kind(quantized, device, first)
            first = first or tunable[name]
    student = _Student(block, tunable, vectors)
    groups = [
        {"params": _named(tunable, leaf), "lr": lr}
        for leaf, lr in (("codes", LR_CODES), ("log_factor", LR_SCALE), ("clip", LR_CLIP), *LOW_RATES)
    ]
    biases = [m.bias for m in tunable.values() if m.bias is not None]
    rate = LR_VECTOR * (LOW_VECTOR if any(isinstance(m, TunableLattice) for m in tunable.values()) else 1.0)
    groups += [
        {"params": [p], "lr": rate * max(float(p.detach().abs().max()), 1e-6)}
        for p in [*student.vectors.values(), *biases]
    ]
    groups = [group | {"start": group["lr"]} for group in groups if group["params"]]
    adam = torch.optim.Adam(groups, betas=BETAS)
    learned = [p for group in groups for p in group["params"]]
    before = student.held_out_loss(held_out)
    with torch.enable_grad(), fast_matmul(device):
        for step in range(steps):
            call = calls[int(torch.randint(len(calls), (), generator=generator))]
            count = max(1, TOKENS // call.hidden.shape[1])
            rows = torch.randperm(len(call.hidden), generator=generator)[:count].to(device)
            parts = rows.tensor_split(min(shards, len(rows)))

            def terms(mine, call=call, rows=rows, parts=parts):
                for i in mine:
                    yield flat_gradient(student.loss(call, parts[i]) * (len(parts[i]) / len(rows)), learned)

            loss = set_gradients(learned, sum_parts(terms, len(parts), flat_like(learned)))
            for group in adam.param_groups:
                group["lr"] = group["start"] * cosine(step, steps)
            adam.step()
            adam.zero_grad()
            on_step(loss)
    same_values(learned)
    stored = {name: p.detach().to(block.get_parameter(name).dtype) for name, p in student.vectors.items()}
    return Tuned({n: m.result() for n, m in tunable.items()}, stored, before, student.held_out_loss(held_out))


def _named(tunable: dict[str, nn.Module], leaf: str) -> list[nn.Parameter]:
    """The parameters of that name, each once."""
    named = [item for module in tunable.values() for item in module.named_parameters()]
    found = {id(p): p for name, p in named if name.endswith(leaf) and p.requires_grad}
    return list(found.values())


class _Student:
    """The block in float32 with tunable linears and vectors, called functionally."""

    def __init__(self, block: nn.Module, tunable: dict[str, nn.Module], vectors: list[str]):
        self.module = _with_linears(block, tunable)
        self.dtypes = {name: block.get_parameter(name).dtype for name in vectors}
        self.vectors = {n: block.get_parameter(n).detach().float().clone().requires_grad_(True) for n in vectors}
        fixed = [*self.module.named_parameters(), *self.module.named_buffers()]
        self.fixed = {
            n: t.float() if t.is_floating_point() else t
            for n, t in fixed
            if n not in vectors and not any(n.startswith(f"{name}.") for name in tunable)
        }

    def __call__(self, call: BlockCall, rows: torch.Tensor) -> torch.Tensor:
        size = len(call.hidden)
        hidden, args, kwargs = (_rows_of(v, size, rows) for v in (call.hidden, call.args, call.kwargs))
        stored = {n: p + (p.to(self.dtypes[n]).float() - p).detach() for n, p in self.vectors.items()}
        out = torch.func.functional_call(self.module, {**self.fixed, **stored}, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def loss(self, call: BlockCall, rows: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of the squared error relative to the token's energy."""
        target = call.target[rows].float()
        energy = target.square().sum(-1)
        error = (self(call, rows) - target).square().sum(-1)
        return (error / energy.clamp_min(torch.finfo(torch.float32).tiny)).mean()

    @torch.no_grad()
    def held_out_loss(self, calls: list[BlockCall]) -> float:
        rows = [(c, row[None]) for c in calls for row in torch.arange(len(c.hidden), device=c.hidden.device)]
        losses = numbers(lambda i: float(self.loss(*rows[i])), len(rows))
        return sum(losses) / len(losses)


def _with_linears(block: nn.Module, tunable: dict[str, nn.Module]) -> nn.Module:
    """The block with other modules in the place of its linears; all other modules are copied without their tensors."""
    memo = {id(t): t for t in [*block.parameters(), *block.buffers()]}
    for name in tunable:
        memo[id(block.get_submodule(name))] = tunable[name]
    return copy.deepcopy(block, memo)


def _rows_of(value: Any, size: int, rows: torch.Tensor) -> Any:
    """The given rows of every tensor of batch size ``size`` inside tuples, lists and dicts; floats in float32."""
    if isinstance(value, torch.Tensor):
        value = value[rows] if value.dim() and len(value) == size else value
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(v, size, rows) for v in value)
    if isinstance(value, dict):
        return {name: _rows_of(v, size, rows) for name, v in value.items()}
    return value
