"""Triton kernel of ``tqcompile::int8_linear``: int8 weights, floating-point activations, for few tokens.

A program owns a (BN out-features x BM tokens) tile of y^T = W x^T. A step of BK divides the scale group, so it is a
sum of exact products (an int8 is exact in every dtype of x) and is scaled once, in fp32. With few tokens this is bound
by reading W once; nothing is split over K, because a head has more tiles than a GPU has processors.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.twin_linear import FLOATS, INTERPRET, device_reason, round_to


@triton.jit(do_not_specialize=["T"])
def _int8_linear(
    x, weight, weight_scale, bias, y, T, N, K,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x (T, K), weight (N, K), weight_scale (N, K / GROUP), y (T, N)."""
    # Tiles of tokens run together, so that they share a weight tile in the L2 cache.
    tiles_m = tl.cdiv(T, BM)
    n0, m0 = (tl.program_id(0) // tiles_m) * BN, (tl.program_id(0) % tiles_m) * BM
    n, m, k = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    row = tl.minimum(n, N - 1 - n0)  # rows past N read the last one; they are not stored
    live = (m < T - m0)[:, None]
    w_at = weight + n0.to(tl.int64) * K + (row[:, None] * K + k[None, :])
    s_at = weight_scale + n0.to(tl.int64) * (K // GROUP) + row * (K // GROUP)
    x_at = x + m0.to(tl.int64) * K + (m[:, None] * K + k[None, :])
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, K // BK):
        w = tl.load(w_at + step * BK)
        xt = tl.load(x_at + step * BK, mask=live, other=0.0)
        scale = tl.load(s_at + step * BK // GROUP).to(tl.float32)
        if INTERPRET:
            xt = xt.to(tl.float32)  # the interpreter's bf16 dot is wrong
        acc += tl.dot(w.to(xt.dtype), xt.T, input_precision="ieee") * scale[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n0 + row).to(tl.float32)[:, None]
    y_at = y + m0.to(tl.int64) * N + n0 + (m[None, :].to(tl.int64) * N + n[:, None])
    tl.store(y_at, round_to(acc, y.dtype.element_ty, INTERPRET), mask=(n < N - n0)[:, None] & (m < T - m0)[None, :])


class Tile(NamedTuple):
    """BN x BM output tile, K steps of ``step``."""

    bn: int
    bm: int
    step: int
    warps: int
    stages: int


def choose_tile(t: int, group: int, wide: bool) -> Tile:
    """The tile for T tokens. group: what a K step divides; wide: fp32 operands, so no tensor core and half the tile."""
    step = min(32 if wide else 128, group & -group)
    bm = 16 if t <= 16 else 32 if t <= 32 else 64 if t <= 64 or wide else 128
    return Tile(64, bm, step, 4, 3) if wide else Tile(128, bm, step, 4 if bm <= 32 else 8, 4 if bm <= 64 else 3)


def unsupported(x, weight, weight_scale, bias) -> str | None:
    """Why :func:`launch` cannot compute these arguments (shapes, dtypes and devices only), or None if it can."""
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if weight.dim() != 2 or weight_scale.dim() != 2 or weight.dtype != torch.int8:
        return f"weight must be 2-D int8 with 2-D scales, got {weight.dtype} {tuple(weight.shape)}"
    k, groups = weight.shape[1], weight_scale.shape[1]
    if k % groups or (k // groups) % 32:
        return f"groups of K / {groups} with K = {k} are no multiple of 32"
    if any(a.dtype not in FLOATS for a in (weight_scale, bias) if a is not None):
        return "scales and bias must be float32, float16 or bfloat16"
    return None


def launch(x, weight, weight_scale, bias, tile: Tile | None = None) -> torch.Tensor:
    """Run the kernel; the arguments are those of the op and must be supported."""
    (n, k), group = weight.shape, weight.shape[1] // weight_scale.shape[1]
    flat = x.reshape(-1, k).contiguous()
    t = flat.shape[0]
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    if t:
        tile = tile or choose_tile(t, group, x.dtype == torch.float32)
        weights = (weight.contiguous(), weight_scale.contiguous(), None if bias is None else bias.contiguous())
        grid = (triton.cdiv(t, tile.bm) * triton.cdiv(n, tile.bn),)
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            _int8_linear[grid](
                flat, *weights, y, t, n, k,
                GROUP=group, BM=tile.bm, BN=tile.bn, BK=tile.step,
                HAS_BIAS=bias is not None, INTERPRET=INTERPRET,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)
