"""Triton kernel of ``tqcompile::twin_linear``: both 4-bit components in one launch with one epilogue.

A program owns a (BN out-features x BM tokens) tile, transposed: y^T = W x^T, so that the unpacked weights are
the register operand of the tensor core and x goes from global to shared memory untouched. The rank-R
intermediate t^T (R x BM) is accumulated next to it in the same K loop, rounded to the output dtype and
multiplied with the up tile, all on chip. Steps of BK divide both group sizes, so each step is an exact int32
sum (int8 x) or one fp32 partial sum of exact products (float x), scaled once per step.

Few tokens: the K loop is split over S programs per tile. Each writes fp32 partials of its tile and of t, the
last to arrive (one counter per tile) adds all S in order 0..S-1, so the bits do not depend on which was last.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.split_counters import split_counters

MAX_RANK = 128
MAX_UP_GROUPS = 8
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _float_nibbles(pair: str, base: str, one: str, offset: str) -> tl.constexpr:
    """PTX: 4 packed bytes -> low nibbles in $0, $1, high in $2, $3, two floats each. u = q + 8 in the mantissa of
    ``base`` reads base + u; the fma leaves q."""
    return tl.constexpr(f"""{{ .reg .b32 u, l, h, m, one, off;
        mov.b32 m, 0x{base}; mov.b32 one, 0x{one}; mov.b32 off, 0x{offset};
        xor.b32 u, $4, 0x88888888; and.b32 l, u, 0x0F0F0F0F; shr.u32 h, u, 4; and.b32 h, h, 0x0F0F0F0F;
        prmt.b32 $0, l, m, 0x4140; prmt.b32 $1, l, m, 0x4342;
        prmt.b32 $2, h, m, 0x4140; prmt.b32 $3, h, m, 0x4342;
        fma.rn.{pair} $0, $0, one, off; fma.rn.{pair} $1, $1, one, off;
        fma.rn.{pair} $2, $2, one, off; fma.rn.{pair} $3, $3, one, off; }}""")


BF16_NIBBLES = _float_nibbles("bf16x2", "43434343", "3F803F80", "C308C308")  # 128 + u, 1, -136
FP16_NIBBLES = _float_nibbles("f16x2", "64646464", "3C003C00", "E408E408")  # 1024 + u, 1, -1032


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter cuts the low bits off, so it gets a value whose low bits are zero.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _nibbles(w, FORM: tl.constexpr):
    """Packed int8 -> (low, high) nibbles. FORM: "int8" gives 16*q as int8; "bf16", "fp16", "fp32" give q."""
    if FORM == "int8":
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 $1, $2, 0xF0F0F0F0; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    elif FORM == "bf16":
        low, high = tl.inline_asm_elementwise(
            BF16_NIBBLES, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif FORM == "fp16":
        low, high = tl.inline_asm_elementwise(
            FP16_NIBBLES, "=&r,=&r,=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif FORM == "int8_plain":
        low, high = w << 4, w & -16
    else:
        low, high = ((w << 4) >> 4).to(tl.float32), (w >> 4).to(tl.float32)
    return low, high


@triton.jit
def _unpack(w, FORM: tl.constexpr):
    """Packed uint8 (rows, columns/2) -> (rows, columns) in the canonical order: low nibble first."""
    low, high = _nibbles(w.to(tl.int8, bitcast=True), FORM)
    return tl.join(low, high).reshape(w.shape[0], 2 * w.shape[1])


@triton.jit
def _dot(a, b, INT: tl.constexpr):
    """a @ b in fp32: exact int32 sums for int8 operands, IEEE products for fp32 ones."""
    return tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) if INT else tl.dot(a, b, input_precision="ieee")


@triton.jit
def _round_to_4_bits(x, ratio, INTERPRET: tl.constexpr):
    """clamp(round_half_even(x * ratio), -8, 7) of int8 x, as int8."""
    if INTERPRET:
        q = ((x.to(tl.float32) * ratio + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        # The product must be rounded before the integer rounding, as in the definition; left to itself the
        # compiler would fuse multiply and add.
        q = tl.inline_asm_elementwise(
            "{ .reg .f32 p; mul.rn.f32 p, $1, $2; cvt.rni.s32.f32 $0, p; }",
            "=r,f,f", [x.to(tl.float32), ratio], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.minimum(tl.maximum(q, -8), 7).to(tl.int8)


@triton.jit
def _finish(
    acc, t_acc, n0, m0, x_scale, up, up_scale, bias, y, T, N, res_factor, t_factor,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, UP_GROUPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, UP_FORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The one epilogue of tile (n0.., m0..): scale, round t, add up @ t and bias, cast, store."""
    n, m = tl.arange(0, BN), tl.arange(0, BM)
    n_live, m_live = n < N - n0, m < T - m0
    row = tl.minimum(n, N - 1 - n0)  # rows past N read the last one; they are not stored
    if HAS_SCALE:
        xs = tl.load(x_scale + m0 + m, mask=m_live, other=0.0)
        acc = acc * (xs * res_factor)[None, :]
    if RP > 0:
        if HAS_SCALE:
            t_acc = t_acc * (xs * t_factor)[None, :]
        t = round_to(t_acc, y.dtype.element_ty, INTERPRET)
        if INTERPRET:
            t = t.to(tl.float32)  # the interpreter's bf16 dot is wrong
        byte = tl.arange(0, RP // 2)
        up_at = up + n0.to(tl.int64) * (R // 2) + (row[:, None] * (R // 2) + byte[None, :])
        if R == RP:
            q = _unpack(tl.load(up_at), UP_FORM)
        else:
            q = _unpack(tl.load(up_at, mask=(byte < R // 2)[None, :], other=0), UP_FORM)
        group_of = tl.arange(0, RP) // (R // UP_GROUPS)
        for i in tl.static_range(UP_GROUPS):
            s = tl.load(up_scale + (n0 + row) * UP_GROUPS + i).to(tl.float32)
            part = q if UP_GROUPS == 1 else tl.where((group_of == i)[None, :], q, 0.0).to(q.dtype)
            acc += tl.dot(part, t, input_precision="ieee") * s[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n0 + row).to(tl.float32)[:, None]
    y_at = y + (m0.to(tl.int64) * N + n0) + (m[None, :] * N + n[:, None])
    tl.store(y_at, round_to(acc, y.dtype.element_ty, INTERPRET), mask=n_live[:, None] & m_live[None, :])


@triton.jit(do_not_specialize=["T"])
def _twin_linear(
    x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, y, partials, counters,
    T, N, K, act_ratio, res_factor, t_factor,
    RES_GROUP: tl.constexpr, DOWN_GROUP: tl.constexpr, UP_GROUPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    S: tl.constexpr, INT: tl.constexpr, ACT4: tl.constexpr, HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr, UP_FORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x (T, K), y (T, N). RP: R padded to the dot's size, 0 without low-rank. S: programs on one tile."""
    tile = tl.program_id(0) // S
    split = tl.program_id(0) % S
    # Bands of 8 token tiles: programs that run together share weights and x in the L2 cache.
    tiles_m, tiles_n = tl.cdiv(T, BM), tl.cdiv(N, BN)
    band = tile // (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * band, 8)
    inside = tile % (8 * tiles_n)
    n0 = (inside // height) * BN
    m0 = (8 * band + inside % height) * BM

    # 64-bit tile starts, 32-bit offsets inside a tile: half the registers of 64-bit offsets.
    steps = K // BK
    first, last = steps * split // S, steps * (split + 1) // S
    k_byte, k_item = tl.arange(0, BK // 2), tl.arange(0, BK)
    m = tl.arange(0, BM)
    live = (m < T - m0)[:, None]
    x_at = x + m0.to(tl.int64) * K + (m[:, None] * K + k_item[None, :])
    row = tl.minimum(tl.arange(0, BN), N - 1 - n0)
    w_at = residual + n0.to(tl.int64) * (K // 2) + (row[:, None] * (K // 2) + k_byte[None, :])
    w_scale_at = residual_scale + n0.to(tl.int64) * (K // RES_GROUP) + row * (K // RES_GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    if RP > 0:
        r = tl.arange(0, RP)
        d_live = r < R
        d_at = down + (r[:, None] * (K // 2) + k_byte[None, :])
        d_scale_at = down_scale + r * (K // DOWN_GROUP)
        t_acc = tl.zeros((RP, BM), tl.float32)
    else:
        t_acc = acc

    for step in tl.range(first, last):
        xt = tl.load(x_at + step * BK, mask=live, other=0)
        w = tl.load(w_at + step * (BK // 2))
        ws = tl.load(w_scale_at + step * BK // RES_GROUP).to(tl.float32)
        if INTERPRET and not INT:
            xt = xt.to(tl.float32)  # the interpreter's bf16 dot is wrong
        operand = _round_to_4_bits(xt, act_ratio, INTERPRET) if ACT4 else xt
        if RP > 0:
            if R == RP:
                d = tl.load(d_at + step * (BK // 2))
                ds = tl.load(d_scale_at + step * BK // DOWN_GROUP).to(tl.float32)
            else:
                d = tl.load(d_at + step * (BK // 2), mask=d_live[:, None], other=0)
                ds = tl.load(d_scale_at + step * BK // DOWN_GROUP, mask=d_live, other=0.0).to(tl.float32)
            t_acc += _dot(_unpack(d, FORM), xt.T, INT) * ds[:, None]
        acc += _dot(_unpack(w, FORM), operand.T, INT) * ws[:, None]

    if S == 1:
        _finish(acc, t_acc, n0, m0, x_scale, up, up_scale, bias, y, T, N, res_factor, t_factor,
                BM, BN, R, RP, UP_GROUPS, INT, HAS_BIAS, UP_FORM, INTERPRET)  # fmt: skip
    else:
        # Partials of one tile: S blocks of (BM tokens, BN + RP values).
        block: tl.constexpr = BM * (BN + RP)
        tile_partials = partials + tile.to(tl.int64) * S * block
        acc_at = tile_partials + (m[None, :] * (BN + RP) + tl.arange(0, BN)[:, None])
        t_at = tile_partials + BN + (m[None, :] * (BN + RP) + tl.arange(0, RP if RP > 0 else BN)[:, None])
        here = (m < T - m0)[None, :]
        tl.store(acc_at + split * block, acc, mask=here)
        if RP > 0:
            tl.store(t_at + split * block, t_acc, mask=here)
        # Every thread's stores come before the barrier, the barrier before the one thread's release; the
        # acquire of the last program then sees all S blocks.
        if not INTERPRET:
            tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == S - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            t_acc = tl.zeros((RP if RP > 0 else BN, BM), tl.float32)
            # Few tokens: all S loads in flight at once. More: a loop, or the unrolled values spill.
            for i in tl.range(0, S, num_stages=1, loop_unroll_factor=S if BM <= 16 else 1):
                # .cg: from L2, where the other programs' stores are, never from this SM's L1.
                acc += tl.load(acc_at + i * block, mask=here, other=0.0, cache_modifier=".cg")
                if RP > 0:
                    t_acc += tl.load(t_at + i * block, mask=here, other=0.0, cache_modifier=".cg")
            _finish(acc, t_acc, n0, m0, x_scale, up, up_scale, bias, y, T, N, res_factor, t_factor,
                    BM, BN, R, RP, UP_GROUPS, INT, HAS_BIAS, UP_FORM, INTERPRET)  # fmt: skip
            tl.store(counters + tile, 0)  # clean for the next launch and for graph replay


INTERPRET = not isinstance(_twin_linear, triton.runtime.JITFunction)


class Tile(NamedTuple):
    """How a launch is cut: BN x BM output tile, K steps of at most ``step``, S programs per tile."""

    bn: int
    bm: int
    step: int
    splits: int
    warps: int
    stages: int


def choose_tile(t: int, n: int, k: int, rank: int, group: int, int8: bool, wide: bool, sms: int) -> Tile:
    """The tile for a shape, by rule. group: what a K step divides; wide: fp32 operands, so no tensor core."""
    step = min(128, group & -group)
    if wide:
        return Tile(64, 16, min(32, step), 1, 8, 2)
    if not int8:
        step = min(64, step)  # a bf16 step of 128 does not leave registers for two programs per SM
    if t > 256 and int8 and rank <= 64:
        return Tile(128, 128, step, 1, 8, 3)
    bm = next(size for size in (8, 16, 32, 64) if t <= size or size == 64)
    # Split K only while one wave is not full: two programs per SM, or one of the largest tile.
    programs = (1 if bm == 64 else 2) * sms
    splits = min(programs // (-(-n // 128) * -(-t // bm)), k // step // 2, 16)
    return Tile(128, bm, step, max(1, splits), 8, 4 if bm <= 16 else 3)


@functools.cache
def _gpu(index: int):
    return torch.cuda.get_device_properties(index)


def device_reason(device: torch.device) -> str | None:
    """Why no kernel of this package runs on ``device``, or None."""
    if device.type == "cpu":
        return None if INTERPRET else "CPU tensors need TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, got {device}"
    gpu = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    return None if gpu.major >= 8 else f"needs compute capability 8.0, {gpu.name} has {gpu.major}.{gpu.minor}"


def _group_reason(name: str, k: int, scale: torch.Tensor, rows: int) -> str | None:
    if scale.dim() != 2 or scale.shape[0] != rows or scale.dtype not in FLOATS:
        return f"{name}_scale must be ({rows}, groups) float32, float16 or bfloat16"
    groups = scale.shape[1]
    if groups == 0 or k % groups or (k // groups) % 32:
        return f"{name}: groups must hold a multiple of 32 elements, got K={k} in {groups} groups"
    return None


def unsupported(
    x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype
) -> str | None:
    """Why :func:`launch` cannot serve these arguments (those of ``tqcompile::twin_linear``), or None."""
    reason = device_reason(x.device)
    if reason:
        return reason
    tensors = (x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias)
    if any(a is not None and a.device != x.device for a in tensors):
        return "all tensors must be on one device"
    if any(a is not None and not a.is_contiguous() for a in tensors[1:]):
        return "weights, scales and bias must be contiguous"
    if len({a is None for a in tensors[3:7]}) != 1:
        return "down, up and their scales come together"
    if any(a is not None and a.dim() != 2 for a in (residual, down, up)):
        return "residual, down and up must be matrices"
    if dtype not in FLOATS:
        return f"output dtype must be float32, float16 or bfloat16, got {dtype}"
    if x.dim() == 0 or (x.dtype != torch.int8 and x.dtype not in FLOATS):
        return f"x must be int8, float32, float16 or bfloat16 with a last dimension, got {x.dtype}"
    if (x.dtype == torch.int8) != (x_scale is not None) or (act_ratio > 0 and x_scale is None):
        return "int8 x comes with x_scale, float x without x_scale and act_ratio"
    k, n = x.shape[-1], residual.shape[0]
    if x_scale is not None and (x_scale.dtype != torch.float32 or x_scale.shape != (*x.shape[:-1], 1)):
        return f"x_scale must be float32 {(*x.shape[:-1], 1)}, got {x_scale.dtype} {tuple(x_scale.shape)}"
    if residual.dtype != torch.uint8 or residual.shape != (n, k // 2) or n == 0:
        return f"residual must be uint8 (N, {k}/2), got {residual.dtype} {tuple(residual.shape)}"
    reason = _group_reason("residual", k, residual_scale, n)
    if reason:
        return reason
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        return f"bias must be ({n},) floating point"
    if down is None:
        return None
    r = down.shape[0]
    if not 2 <= r <= MAX_RANK or r % 2:
        return f"rank must be even and at most {MAX_RANK}, got {r}"
    shapes = (down.dtype, up.dtype, *down.shape, *up.shape)
    if shapes != (torch.uint8, torch.uint8, r, k // 2, n, r // 2):
        return f"down must be uint8 ({r}, {k}/2) and up uint8 ({n}, {r}/2)"
    up_groups = up_scale.shape[1] if up_scale.dim() == 2 and up_scale.shape[0] == n else 0
    if not 1 <= up_groups <= MAX_UP_GROUPS or r % up_groups or up_scale.dtype not in FLOATS:
        return f"up_scale must be floating point ({n}, 1 to {MAX_UP_GROUPS} groups of R={r})"
    return _group_reason("down", k, down_scale, r)


def _form(dtype: torch.dtype) -> str:
    if INTERPRET:
        return "int8_plain" if dtype == torch.int8 else "fp32"
    return {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def launch(
    x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype, tile=None
) -> torch.Tensor:
    """Run the kernel on arguments for which :func:`unsupported` returned None.

    Args: those of ``tqcompile::twin_linear``; ``tile`` overrides :func:`choose_tile` (tests, tuning).
    Returns: (..., N) of ``dtype``.
    """
    y = x.new_empty((*x.shape[:-1], residual.shape[0]), dtype=dtype)
    if y.numel() == 0:
        return y
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _run(x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, y, tile)
    return y


def _run(x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, y, tile) -> None:
    n, k = residual.shape[0], x.shape[-1]
    t, rank = y.numel() // n, 0 if down is None else down.shape[0]
    res_group = k // residual_scale.shape[1]
    down_group = k // down_scale.shape[1] if rank else res_group
    int8 = x.dtype == torch.int8
    if tile is None:
        wide = x.dtype == torch.float32 or (rank > 0 and y.dtype == torch.float32)
        sms = _gpu(x.device.index).multi_processor_count if x.is_cuda else 132
        tile = choose_tile(t, n, k, rank, math.gcd(res_group, down_group), int8, wide, sms)
    tiles = -(-n // tile.bn) * -(-t // tile.bm)
    # 32 at least: Triton 3.6 compiles the (128, 16) x (16, 8) product with `up` to wrong values on sm_90.
    rank_pad = max(32, triton.next_power_of_2(rank)) if rank else 0
    partials = counters = y  # not read when S is 1
    if tile.splits > 1:
        size = tiles * tile.splits * tile.bm * (tile.bn + rank_pad)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device, tiles)
    unit = 1 / 16 if int8 else 1.0  # int8 weights enter the dot as 16 * q
    _twin_linear[(tiles * tile.splits,)](
        x.contiguous(), x_scale.contiguous() if int8 else y, residual, residual_scale,
        down if rank else residual, down_scale if rank else residual_scale,
        up if rank else residual, up_scale if rank else residual_scale,
        bias if bias is not None else y, y, partials, counters,
        t, n, k, float(act_ratio), unit / act_ratio if act_ratio > 0 else unit, unit,
        RES_GROUP=res_group, DOWN_GROUP=down_group, UP_GROUPS=up_scale.shape[1] if rank else 1,
        BM=tile.bm, BN=tile.bn, BK=tile.step, R=rank, RP=rank_pad, S=tile.splits,
        INT=int8, ACT4=act_ratio > 0, HAS_BIAS=bias is not None,
        FORM=_form(x.dtype), UP_FORM=_form(y.dtype), INTERPRET=INTERPRET,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
