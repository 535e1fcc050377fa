"""Triton kernels of ``tqcompile::prologue``: norm or gate, transform, quantization and down projection.

``_rows`` holds one token on chip from load to store. Few tokens: P programs share a token; each repeats its (cheap)
norm and quantization, computes R / P values of t, and the first stores the rest. So there is one launch, nothing
waits for another program, and the order of every sum is fixed. Many tokens: one program each, without t, and
``_low_rank`` multiplies the stored operand with ``down`` on tensor cores.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.quantize_activation import ROTATION_BLOCKS
from tqcompile.kernels.twin_linear import (
    INTERPRET,
    MAX_RANK,
    _form,
    _group_reason,
    _nibbles,
    _round_to_4_bits,
    _unpack,
    device_reason,
    round_to,
)

MAX_K = 32768
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ROW_PROGRAMS = 128  # programs that fill the GPU; more would only repeat more work
_MOST_ROWS = 64  # tokens up to which the repeated work costs less than a second launch


@triton.jit
def _load(row, at, K):
    return tl.load(row + at, mask=at < K, other=0.0)


@triton.jit
def _produce(
    x_row, other_row, gain, h_row, at, K, eps, first,
    KIND: tl.constexpr, HAS_OTHER: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """v of one token in its dtype, 0 past K; stores h where the norm has an ``other``."""
    dtype: tl.constexpr = x_row.dtype.element_ty
    v = _load(x_row, at, K)
    if KIND == "rms_norm":
        if HAS_OTHER:
            v = round_to(v.to(tl.float32) + _load(other_row, at, K).to(tl.float32), dtype, INTERPRET)
            tl.store(h_row + at, v, mask=(at < K) & first)
        g = _load(gain, at, K).to(tl.float32)
        wide = v.to(tl.float32)
        inverse = tl.rsqrt(tl.div_rn(tl.sum(tl.sum(wide * wide, axis=1), axis=0), K.to(tl.float32)) + eps)
        v = round_to(g * round_to(wide * inverse, dtype, INTERPRET).to(tl.float32), dtype, INTERPRET)
    elif KIND == "silu_mul":
        wide = v.to(tl.float32)
        gate = round_to(tl.div_rn(wide, 1.0 + tl.exp(-wide)), dtype, INTERPRET).to(tl.float32)
        v = round_to(gate * _load(other_row, at, K).to(tl.float32), dtype, INTERPRET)
    return v


@triton.jit
def _transform(
    v, input_scale, rotation, at, K,
    COLS: tl.constexpr, SCALE: tl.constexpr, ROTATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLS) of one token, scaled and rotated, fp32."""
    dtype: tl.constexpr = v.dtype
    if SCALE:
        v = round_to(v.to(tl.float32) * _load(input_scale, at, K), dtype, INTERPRET)
    if ROTATE:
        k = tl.arange(0, COLS)
        turn = tl.load(rotation + k[:, None] * COLS + k[None, :])
        if INTERPRET:  # the interpreter's bf16 dot is wrong
            v, turn = v.to(tl.float32), turn.to(tl.float32)
        v = tl.dot(v, turn)
    return v.to(tl.float32)


@triton.jit
def _rows(
    x, other, gain, input_scale, rotation, down, down_scale, operand, operand_scale, q8, q8_scale, t, h,
    K, R, x_stride, other_stride, eps, act_ratio,
    P: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr, KEEP8: tl.constexpr,
    KIND: tl.constexpr, HAS_OTHER: tl.constexpr, SCALE: tl.constexpr, ROTATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One token per P programs; program p computes RP values of t from p * RP on, STEP at a time (RP 0: no t)."""
    token = (tl.program_id(0) // P).to(tl.int64)
    part = tl.program_id(0) % P
    first = part == 0
    half: tl.constexpr = COLS // 2
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, half)[None, :]
    at = row * COLS + tl.arange(0, COLS)[None, :]
    pair = row * half + col  # a pair of channels: one byte of down, one item of each plane
    pair_live = 2 * pair < K
    if RP > 0:
        r = part * RP + tl.arange(0, STEP)[:, None, None]
        # Asked for before the row's reductions, so that it is there after them.
        d = tl.load(down + r * (K // 2) + pair[None, :, :], mask=pair_live[None, :, :] & (r < R), other=0)

    x_row, other_row, h_row = x + token * x_stride, other + token * other_stride, h + token * K
    v = _produce(x_row, other_row, gain, h_row, at, K, eps, first, KIND, HAS_OTHER, INTERPRET)
    v = _transform(v, input_scale, rotation, at, K, COLS, SCALE, ROTATE, INTERPRET)
    if BITS == 16:
        v = round_to(v, x.dtype.element_ty, INTERPRET)
        tl.store(operand + token * K + at, v, mask=(at < K) & first)
        even, odd = tl.split(v.to(tl.float32).reshape(ROWS, half, 2))
        scale = 1.0
    else:
        top = tl.max(tl.max(tl.abs(v), axis=1), axis=0)
        scale = tl.div_rn(tl.maximum(top, 1e-30), 127.0)
        # Adding and taking away 1.5 * 2**23 rounds to integers, ties to even.
        q = (tl.div_rn(v, scale) + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int32)
        even, odd = tl.split(q.reshape(ROWS, half, 2))
        live = pair_live & first
        even_at = token * K + pair
        if BITS == 4:
            if KEEP8:
                tl.store(q8 + even_at, even.to(tl.int8), mask=live)
                tl.store(q8 + even_at + K // 2, odd.to(tl.int8), mask=live)
                tl.store(q8_scale + token, scale, mask=first)
            tl.store(operand + even_at, _round_to_4_bits(even, act_ratio, INTERPRET), mask=live)
            tl.store(operand + even_at + K // 2, _round_to_4_bits(odd, act_ratio, INTERPRET), mask=live)
            tl.store(operand_scale + token, tl.div_rn(scale, act_ratio), mask=first)
        else:
            tl.store(operand + even_at, even.to(tl.int8), mask=live)
            tl.store(operand + even_at + K // 2, odd.to(tl.int8), mask=live)
            tl.store(operand_scale + token, scale, mask=first)

    if RP > 0:
        groups = K // GROUP
        for i in tl.static_range(0, RP, STEP):
            now, byte = r + i, d
            if i + STEP < RP:
                d = tl.load(
                    down + (now + STEP) * (K // 2) + pair[None, :, :],
                    mask=pair_live[None, :, :] & (now + STEP < R), other=0,
                )  # fmt: skip
            wide = byte.to(tl.int8, bitcast=True).to(tl.int32)
            low, high = (wide << 28) >> 28, wide >> 4
            if BITS == 16:
                products = low.to(tl.float32) * even[None, :, :] + high.to(tl.float32) * odd[None, :, :]
            else:
                products = low * even[None, :, :] + high * odd[None, :, :]
            live = (now < R) & (row * COLS < K)[None, :, :]
            if GROUP % COLS == 0:  # one scale for a row of the tile: exact int32 sums
                ds = tl.load(down_scale + now * groups + (row * COLS // GROUP)[None, :, :], mask=live, other=0.0)
                sums = tl.sum(products, axis=2, keep_dims=True).to(tl.float32) * ds.to(tl.float32)
            else:
                ds = tl.load(
                    down_scale + now * groups + (2 * pair // GROUP)[None, :, :],
                    mask=(now < R) & pair_live[None, :, :], other=0.0,
                )  # fmt: skip
                sums = tl.sum(products.to(tl.float32) * ds.to(tl.float32), axis=2, keep_dims=True)
            value = tl.sum(sums, axis=1, keep_dims=True) * scale
            tl.store(t + token * R + now, round_to(value, t.dtype.element_ty, INTERPRET), mask=now < R)


@triton.jit(do_not_specialize=["T"])
def _low_rank(
    x, x_scale, down, down_scale, t, T, K, R, factor,
    GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    INT: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """t (T, R) of operands x (T, K), int8 in plane order or floating in natural order. Transposed: t^T = D x^T."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r, byte = tl.arange(0, RP), tl.arange(0, BK // 2)
    m_live, r_live = m < T, r < R
    x_row = x + m.to(tl.int64)[:, None] * K
    d_at = down + r[:, None] * (K // 2) + byte[None, :]
    ds_at = down_scale + r * (K // GROUP)
    acc = tl.zeros((RP, BM), tl.float32)
    for step in tl.range(0, K // BK):
        d = tl.load(d_at + step * (BK // 2), mask=r_live[:, None], other=0)
        ds = tl.load(ds_at + step * BK // GROUP, mask=r_live, other=0.0).to(tl.float32)
        if INT:
            even_at = x_row + step * (BK // 2) + byte[None, :]
            even = tl.load(even_at, mask=m_live[:, None], other=0)
            odd = tl.load(even_at + K // 2, mask=m_live[:, None], other=0)
            low, high = _nibbles(d.to(tl.int8, bitcast=True), FORM)
            part = tl.dot(low, even.T, out_dtype=tl.int32)
            part = tl.dot(high, odd.T, acc=part, out_dtype=tl.int32).to(tl.float32)
        else:
            v = tl.load(x_row + step * BK + tl.arange(0, BK)[None, :], mask=m_live[:, None], other=0.0)
            if INTERPRET:
                v = v.to(tl.float32)  # the interpreter's bf16 dot is wrong
            part = tl.dot(_unpack(d, FORM), v.T, input_precision="ieee")
        acc += part * ds[:, None]
    if INT:
        acc *= (tl.load(x_scale + m, mask=m_live, other=0.0) * factor)[None, :]
    live = m_live[None, :] & r_live[:, None]
    tl.store(t + m.to(tl.int64)[None, :] * R + r[:, None], round_to(acc, t.dtype.element_ty, INTERPRET), mask=live)


class Plan(NamedTuple):
    """How a launch is cut. ``parts`` programs a token, ``ranks`` values of t each (0: t in a launch of its own)."""

    parts: int
    ranks: int
    step: int
    rows: int
    columns: int
    warps: int


def choose_plan(t: int, k: int, rank: int, group: int, block: int) -> Plan:
    """The plan for a shape, by rule; block is 0 without rotation, rank 0 without down."""
    # Rows of one group, where no rotation asks for another width: one scale a row.
    columns = block or min(128, group & -group)
    rows = max(16, triton.next_power_of_2(-(-k // columns)))  # 16 rows are the smallest matrix of a dot
    warps = 4 if rows * columns <= 2048 else 8 if rows * columns <= 8192 else 16
    if rank == 0 or (t > _MOST_ROWS and group % 64 == 0):
        return Plan(1, 0, 1, rows, columns, warps)
    padded = triton.next_power_of_2(rank)
    ranks = max(padded * t // _ROW_PROGRAMS, 2)
    ranks = min(triton.next_power_of_2(ranks), padded)
    # 32 products a thread at a time: more would not stay in registers.
    step = max(1, min(ranks, 4, 2048 * warps // (rows * columns)))
    return Plan(padded // ranks, ranks, step, rows, columns, warps)


def unsupported(x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio) -> str | None:
    """Why :func:`launch` cannot serve these arguments (those of ``tqcompile::prologue``), or None."""
    reason = device_reason(x.device)
    if reason:
        return reason
    tensors = (other, gain, input_scale, rotation, down, down_scale)
    if any(a is not None and a.device != x.device for a in tensors):
        return "all tensors must be on one device"
    if x.dtype not in _FLOATS or x.dim() == 0:
        return f"x must be float32, float16 or bfloat16 with a last dimension, got {x.dtype}"
    k = x.shape[-1]
    if k == 0 or k % 2 or k > MAX_K:
        return f"K must be even and at most {MAX_K}, got {k}"
    if any(a is not None and a.dtype != x.dtype for a in (other, gain)):
        return "other and gain must have the dtype of x"
    if (gain is not None and gain.shape != (k,)) or (other is not None and other.shape != x.shape):
        return f"gain must be ({k},) and other of the shape of x"
    if input_scale is not None and (input_scale.shape != (k,) or input_scale.dtype not in _FLOATS):
        return f"input_scale must be ({k},) floating point, got {tuple(input_scale.shape)}"
    if rotation is not None:
        b = rotation.shape[0] if rotation.dim() == 2 and rotation.shape[0] == rotation.shape[1] else 0
        if b not in ROTATION_BLOCKS or k % b or not rotation.is_floating_point():
            return f"rotation must be (b, b), b in {ROTATION_BLOCKS} dividing K={k}, got {tuple(rotation.shape)}"
        if x.dtype == torch.float32:
            return "a float32 rotation does not run on tensor cores"
    if down is None:
        return None
    r = down.shape[0]
    if down.dtype != torch.uint8 or down.dim() != 2 or down.shape[1] != k // 2 or not 2 <= r <= MAX_RANK:
        return f"down must be uint8 (2 to {MAX_RANK}, {k}/2), got {down.dtype} {tuple(down.shape)}"
    if not (down.is_contiguous() and down_scale.is_contiguous()):
        return "down and down_scale must be contiguous"
    return _group_reason("down", k, down_scale, r)


def launch(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, plan=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernels on arguments for which :func:`unsupported` returned None.

    Args: those of ``tqcompile::prologue``; ``plan`` overrides :func:`choose_plan` (tests, tuning).
    Returns: operand, operand_scale, t, h.
    """
    lead, k = x.shape[:-1], x.shape[-1]
    rank = 0 if down is None else down.shape[0]
    stream = kind == "rms_norm" and other is not None
    operand = x.new_empty((*lead, k), dtype=x.dtype if act_bits == 16 else torch.int8)
    operand_scale = x.new_empty(0 if act_bits == 16 else (*lead, 1), dtype=torch.float32)
    t, h = x.new_empty((*lead, rank)), x.new_empty((*lead, k) if stream else 0)
    if operand.numel():
        args = (_as_rows(x), None if other is None else _as_rows(other), gain, input_scale, rotation)
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            _run(*args, down, down_scale, kind, eps, act_bits, act_ratio, operand, operand_scale, t, h, plan)
    return operand, operand_scale, t, h


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (T, K), without a copy where the rows have one stride."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _run(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio,
    operand, operand_scale, t, h, plan,
) -> None:  # fmt: skip
    tokens, k = x.shape
    rank = 0 if down is None else down.shape[0]
    group = k // down_scale.shape[1] if rank else 128
    plan = plan or choose_plan(tokens, k, rank, group, 0 if rotation is None else rotation.shape[0])
    apart = rank > 0 and plan.ranks == 0
    q8, q8_scale = operand, operand_scale
    if apart and act_bits == 4:
        q8, q8_scale = torch.empty_like(operand), torch.empty_like(operand_scale)
    nothing = x  # stands for tensors that are not read
    _rows[(tokens * plan.parts,)](
        x, nothing if other is None else other, nothing if gain is None else gain.contiguous(),
        nothing if input_scale is None else input_scale.contiguous(),
        nothing if rotation is None else rotation.to(x.dtype).contiguous(),
        down if rank else nothing, down_scale if rank else nothing,
        operand, operand_scale, q8, q8_scale, t, h, k, rank, x.stride(0), 0 if other is None else other.stride(0),
        float(eps), float(act_ratio),
        P=plan.parts, RP=plan.ranks, STEP=plan.step, GROUP=group, ROWS=plan.rows, COLS=plan.columns,
        BITS=act_bits, KEEP8=apart, KIND=kind, HAS_OTHER=other is not None,
        SCALE=input_scale is not None, ROTATE=rotation is not None, INTERPRET=INTERPRET,
        num_warps=plan.warps,
    )  # fmt: skip
    if apart:
        _run_low_rank(q8, q8_scale, down, down_scale, t)


def _run_low_rank(x, x_scale, down, down_scale, t) -> None:
    tokens, k, rank = x.numel() // x.shape[-1], x.shape[-1], down.shape[0]
    group = k // down_scale.shape[1]
    wide = x.dtype == torch.float32  # no tensor core
    step = min(32 if wide else 128, group & -group)
    tile = 16 if wide or tokens < 4096 else 32 if tokens < 8192 else 64
    _low_rank[(-(-tokens // tile),)](
        x, x_scale, down, down_scale, t, tokens, k, rank, 1 / 16,  # int8 weights enter the dot as 16 * q
        GROUP=group, BM=tile, BK=step, RP=max(32, triton.next_power_of_2(rank)),
        INT=x.dtype == torch.int8, FORM=_form(x.dtype), INTERPRET=INTERPRET, num_warps=4, num_stages=4,
    )  # fmt: skip
