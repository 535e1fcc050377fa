"""``tqcompile::twin_linear``: a linear layer made of two 4-bit components, in one op.

    y = x @ residual^T + round_dtype(x @ down^T) @ up^T + bias

``residual`` is (N, K), ``down`` (R, K) and ``up`` (N, R), all signed 4-bit with group scales (ops/packing.py).
Weight-only form: x is floating point. Integer form: x is int8 with one scale per token; with ``act_ratio`` > 0
the residual reads the 4-bit value clamp(round(x * act_ratio), -8, 7) of scale x_scale / act_ratio, while the
low-rank branch still reads all 8 bits.
"""

import torch

from tqcompile.ops.dispatch import kernel_or_reason
from tqcompile.ops.packing import dequantize_int4


def twin_linear_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    act_ratio: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`twin_linear`."""
    wide = x.float()
    operand = torch.round(wide * act_ratio).clamp(-8, 7) / act_ratio if act_ratio > 0 else wide
    y = torch.matmul(operand, dequantize_int4(residual, residual_scale).t())
    if x_scale is not None:
        y = y * x_scale
    if down is not None:
        t = torch.matmul(wide, dequantize_int4(down, down_scale).t())
        if x_scale is not None:
            t = t * x_scale
        t = t.to(dtype).float()
        y = y + torch.matmul(t, dequantize_int4(up, up_scale).t())
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@torch.library.custom_op("tqcompile::twin_linear", mutates_args=())
def twin_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor,
    down: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    act_ratio: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Fused dual-component 4-bit linear.

    Args:
        x: (..., K) int8 with ``x_scale``, or float32/float16/bfloat16 without.
        x_scale: (..., 1) float32, or None for the weight-only form.
        residual: (N, K/2) packed int4; residual_scale: (N, K/g).
        down: (R, K/2) packed int4; down_scale: (R, K/g'). None together with ``up``: no low-rank component.
        up: (N, R/2) packed int4; up_scale: (N, R/g'').
        bias: (N,) or None.
        act_ratio: 0 for 8-bit (or floating) activations; > 0 for 4-bit activations in the residual.
        dtype: dtype of the result; the rank-R intermediate is rounded to it once.
    Returns:
        (..., N) of ``dtype``.
    """
    return twin_linear_reference(
        x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype
    )


def weight_only(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The op for one 4-bit matrix (N, K/2) and activations (..., K) that are not quantized -> (..., N), dtype of x."""
    return twin_linear(x, None, weight, scale, None, None, None, None, None, 0.0, x.dtype)


@twin_linear.register_kernel("cuda")
def _(x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype):
    args = (x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype)
    launch = kernel_or_reason("twin_linear", *args)
    return (launch or twin_linear_reference)(*args)


@twin_linear.register_fake
def _(x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype):
    k, n = x.shape[-1], residual.shape[0]
    torch._check(residual.dtype == torch.uint8, lambda: f"residual must be uint8, got {residual.dtype}")
    torch._check(residual.shape[1] * 2 == k, lambda: f"residual must be ({n}, {k}/2)")
    torch._check(k % residual_scale.shape[1] == 0, lambda: "residual_scale: groups must divide K")
    torch._check(residual_scale.shape[0] == n, lambda: f"residual_scale must have {n} rows")
    torch._check((x.dtype == torch.int8) == (x_scale is not None), lambda: "int8 x comes with x_scale, float x without")
    torch._check(act_ratio == 0 or x_scale is not None, lambda: "act_ratio needs int8 x")
    torch._check((down is None) == (up is None), lambda: "down and up come together")
    if down is not None:
        r = down.shape[0]
        torch._check(down.shape[1] * 2 == k, lambda: f"down must be ({r}, {k}/2)")
        torch._check(up.shape == (n, r // 2), lambda: f"up must be ({n}, {r}/2), got {tuple(up.shape)}")
    if bias is not None:
        torch._check(bias.shape == (n,), lambda: f"bias must be ({n},)")
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)
