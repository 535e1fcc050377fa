"""``tqcompile::prologue``: everything a two-component linear needs of its input, in one op in front of ``twin_gemm``.

    v = x                                   kind "none"
    v = rms_norm(x + other) * gain          kind "rms_norm"; h = x + other, the residual stream, comes back too
    v = silu(x) * other                     kind "silu_mul"
    q, scale = quantize_activation(v, input_scale, rotation)
    t = (q @ down^T) * scale                the rank-R intermediate, rounded to the dtype of x

From ``defer_from`` tokens on t is left to ``twin_gemm``, which can make it beside its own product; at 4 bits it is
then given the 8-bit q too.

Every value is rounded where the modules of transformers and ``twin_linear`` round it. The 8-bit q feeds t at any
``act_bits``; what ``twin_gemm`` reads is q itself, its 4-bit rounding, or the transformed v. For ``lattice_linear``
v comes in natural order.
"""

import torch
from torch.nn.functional import silu

from tqcompile.ops.dispatch import kernel_or_reason
from tqcompile.ops.packing import dequantize_int4
from tqcompile.ops.quantize_activation import check_transform, quantize_activation_reference, transform_activation
from tqcompile.ops.twin_gemm import is_deferred, to_planes

KINDS = ("none", "rms_norm", "silu_mul")
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def prologue_reference(
    x: torch.Tensor,
    other: torch.Tensor | None,
    gain: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    rotation: torch.Tensor | None,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    kind: str,
    eps: float,
    act_bits: int,
    act_ratio: float,
    planes: bool = True,
    defer_from: int = 0,
) -> _Result:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`prologue`."""
    v, h = _produce(x, other, gain, kind, eps)
    kept = x.new_empty(0, dtype=torch.int8)
    if act_bits == 16:
        q = transform_activation(v, input_scale, rotation)
        wide, scale, operand_scale = q.float(), 1.0, x.new_empty(0, dtype=torch.float32)
    else:
        q, operand_scale = quantize_activation_reference(v, input_scale, rotation)
        wide, scale = q.float(), operand_scale
        if act_bits == 4:
            if keeps_wide(down, act_bits, defer_from):
                kept = to_planes(q)
            q = torch.round(wide * act_ratio).clamp(-8, 7).to(torch.int8)
            operand_scale = operand_scale / act_ratio
    if down is None:
        t = x.new_empty((*x.shape[:-1], 0))
    elif is_deferred(x, defer_from):
        t = x.new_full((*x.shape[:-1], down.shape[0]), float("nan"))
    else:
        t = to_planes((torch.matmul(wide, dequantize_int4(down, down_scale).t()) * scale).to(x.dtype))
    return to_planes(q) if planes else q.clone(), operand_scale, t, h, kept


def keeps_wide(down: torch.Tensor | None, act_bits: int, defer_from: int) -> bool:
    """Whether the op returns 8-bit integers beside 4-bit ones, for a ``twin_gemm`` that makes t."""
    return down is not None and act_bits == 4 and defer_from > 0


def _produce(x, other, gain, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(v, h); h is empty where it is not a new tensor."""
    h = x.new_empty(0)
    if kind == "none":
        return x, h
    if kind == "silu_mul":
        return silu(x) * other, h
    if other is not None:
        x = h = (x + other).contiguous()
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return gain * (wide * torch.rsqrt(variance + eps)).to(x.dtype), h


@torch.library.custom_op("tqcompile::prologue", mutates_args=())
def prologue(
    x: torch.Tensor,
    other: torch.Tensor | None,
    gain: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    rotation: torch.Tensor | None,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    kind: str,
    eps: float,
    act_bits: int,
    act_ratio: float,
    planes: bool = True,
    defer_from: int = 0,
) -> _Result:
    """Norm or gate, transform, quantization and the down projection of one linear, or of several that share them.

    Args:
        x: (..., K) float32, float16 or bfloat16, K even; rows may be strided.
        other: (..., K), dtype of x: what is added ("rms_norm", may be None) or multiplied ("silu_mul"); else None.
        gain: (K,), dtype of x, for "rms_norm"; else None.
        input_scale, rotation: as in ``quantize_activation``.
        down: (R, K/2) packed int4; down_scale: (R, K/g). Both None: no low-rank component.
        kind: "none", "rms_norm" or "silu_mul". eps: of the norm.
        act_bits: 4, 8 or 16. act_ratio: for 4, the factor from the 8-bit to the 4-bit integer (> 0); else 0.
        planes: False, for 16 bits without ``down``: the operand in natural order, as ``lattice_linear`` reads it.
        defer_from: number of tokens from which t is left to a ``twin_gemm`` with the same number; 0: never.
    Returns:
        operand: (..., K), int8 for 8 and 4 bits, dtype of x for 16, in plane order (ops/twin_gemm.py).
        operand_scale: (..., 1) float32; for 16 bits empty, (0,).
        t: (..., R), dtype of x, in plane order; (..., 0) without ``down``; values without a meaning where deferred.
        h: x + other, (..., K), where "rms_norm" has ``other``; else empty, (0,).
        wide: for 4 bits with ``down`` and ``defer_from``, the 8-bit integers (..., K) int8 in plane order, times
            operand_scale * act_ratio; without a meaning where t is not deferred. Else empty, (0,).
    """
    args = (x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes, defer_from)
    return prologue_reference(*args)


@prologue.register_kernel("cuda")
def _(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes=True, defer_from=0
):
    args = (x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes, defer_from)
    launch = kernel_or_reason("prologue", *args)
    return (launch or prologue_reference)(*args)


@prologue.register_fake
def _(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes=True, defer_from=0
):
    k, rows = x.shape[-1], x.shape[:-1]
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    torch._check(k % 2 == 0, lambda: f"K must be even, got {k}")
    torch._check(kind in KINDS, lambda: f"kind must be one of {KINDS}, got {kind!r}")
    torch._check((kind == "rms_norm") == (gain is not None), lambda: 'gain belongs to kind "rms_norm"')
    torch._check(kind != "none" or other is None, lambda: 'kind "none" takes no other')
    torch._check(kind != "silu_mul" or other is not None, lambda: 'kind "silu_mul" needs other')
    torch._check(act_bits in (4, 8, 16), lambda: f"act_bits must be 4, 8 or 16, got {act_bits}")
    torch._check((act_bits == 4) == (act_ratio > 0), lambda: "act_ratio > 0 belongs to 4 bits")
    natural = act_bits == 16 and down is None
    torch._check(planes or natural, lambda: "natural order is for act_bits 16 without down")
    for name, value, shape in (("other", other, x.shape), ("gain", gain, (k,))):
        if value is not None:
            torch._check(value.shape == shape, lambda name=name, shape=shape: f"{name} must be {tuple(shape)}")
            torch._check(value.dtype == x.dtype, lambda name=name: f"{name} must have the dtype of x, {x.dtype}")
    check_transform(k, input_scale, rotation)
    torch._check((down is None) == (down_scale is None), lambda: "down and down_scale come together")
    rank = 0
    if down is not None:
        rank = down.shape[0]
        torch._check(down.shape[1] * 2 == k, lambda: f"down must be ({rank}, {k}/2)")
    new_stream = kind == "rms_norm" and other is not None
    return (
        x.new_empty((*rows, k), dtype=x.dtype if act_bits == 16 else torch.int8),
        x.new_empty(0 if act_bits == 16 else (*rows, 1), dtype=torch.float32),
        x.new_empty((*rows, rank)),
        x.new_empty((*rows, k) if new_stream else 0),
        x.new_empty((*rows, k) if keeps_wide(down, act_bits, defer_from) else 0, dtype=torch.int8),
    )
