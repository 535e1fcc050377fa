"""Triton kernel of ``tqcompile::twin_gemm`` for every GPU, dtype and group size that has no faster form.

A program owns BN rows times BM tokens, transposed, as in twin_linear.py: packed weights are unpacked in registers; low
nibbles meet the plane of even channels, high nibbles the odd one. Each K step lies in one scale group.
"""

import triton
import triton.language as tl

from tqcompile.kernels.twin_linear import _dot, _nibbles, round_to


@triton.jit(do_not_specialize=["T"])
def twin_tile(
    x, x_scale, t, w, scale, up, up_scale, bias, addend, y, T, N, K, factor,
    GROUP: tl.constexpr, UP_GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, INT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr,
    FORM: tl.constexpr, UP_FORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x: (T, K), t: (T, R), both in plane order. RP: R padded to a power of two, 0 without low-rank. factor: of the
    integer sums. BK: channels of a step."""
    tiles_n = tl.cdiv(N, BN)
    n0 = tl.program_id(0) % tiles_n * BN
    m0 = tl.program_id(0) // tiles_n * BM
    n, m, byte = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK // 2)
    row = tl.minimum(n, N - 1 - n0)  # rows past N read the last one; they are not stored
    live = m < T - m0
    x_at = x + m0.to(tl.int64) * K + (m[:, None] * K + byte[None, :])
    w_at = w + n0.to(tl.int64) * (K // 2) + (row[:, None] * (K // 2) + byte[None, :])
    s_at = scale + n0.to(tl.int64) * (K // GROUP) + row * (K // GROUP)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, K // BK):
        even = tl.load(x_at + step * (BK // 2), mask=live[:, None], other=0)
        odd = tl.load(x_at + K // 2 + step * (BK // 2), mask=live[:, None], other=0)
        if INTERPRET and not INT:
            even, odd = even.to(tl.float32), odd.to(tl.float32)  # the interpreter's bf16 dot is wrong
        low, high = _nibbles(tl.load(w_at + step * (BK // 2)).to(tl.int8, bitcast=True), FORM)
        s = tl.load(s_at + step * BK // GROUP).to(tl.float32)
        acc += (_dot(low, even.T, INT) + _dot(high, odd.T, INT)) * s[:, None]
    if INT:
        acc = acc * (tl.load(x_scale + m0 + m, mask=live, other=0.0) * factor)[None, :]
    if RP > 0:
        r = tl.arange(0, RP // 2)
        some = r < R // 2
        t_at = t + m0.to(tl.int64) * R + (m[:, None] * R + r[None, :])
        t_even = tl.load(t_at, mask=live[:, None] & some[None, :], other=0.0)
        t_odd = tl.load(t_at + R // 2, mask=live[:, None] & some[None, :], other=0.0)
        if INTERPRET:
            t_even, t_odd = t_even.to(tl.float32), t_odd.to(tl.float32)
        up_at = up + n0.to(tl.int64) * (R // 2) + (row[:, None] * (R // 2) + r[None, :])
        low, high = _nibbles(tl.load(up_at, mask=some[None, :], other=0).to(tl.int8, bitcast=True), UP_FORM)
        group = r // (R // UP_GROUPS // 2)
        for i in tl.static_range(UP_GROUPS):
            s = tl.load(up_scale + (n0 + row) * UP_GROUPS + i).to(tl.float32)
            part_low = low if UP_GROUPS == 1 else tl.where((group == i)[None, :], low, 0.0).to(low.dtype)
            part_high = high if UP_GROUPS == 1 else tl.where((group == i)[None, :], high, 0.0).to(high.dtype)
            acc += (_dot(part_low, t_even.T, False) + _dot(part_high, t_odd.T, False)) * s[:, None]
    at = m0.to(tl.int64) * N + n0 + (m[None, :] * N + n[:, None])
    stored = (n < N - n0)[:, None] & live[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n0 + row).to(tl.float32)[:, None]
    if HAS_ADDEND:
        acc += tl.load(addend + at, mask=stored, other=0.0).to(tl.float32)
    tl.store(y + at, round_to(acc, y.dtype.element_ty, INTERPRET), mask=stored)


@triton.jit
def unpack_planes(w, scale, y, K, GROUP: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """One row of packed weights (N, K/2) to floats (N, K) in plane order, for a dense product."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = byte < K // 2
    packed = tl.load(w + row * (K // 2) + byte, mask=live, other=0).to(tl.int8, bitcast=True)
    s = tl.load(scale + row * (K // GROUP) + byte // (GROUP // 2), mask=live, other=0.0).to(tl.float32)
    low, high = ((packed << 4) >> 4).to(tl.float32), (packed >> 4).to(tl.float32)
    tl.store(y + row * K + byte, round_to(low * s, y.dtype.element_ty, INTERPRET), mask=live)
    tl.store(y + row * K + K // 2 + byte, round_to(high * s, y.dtype.element_ty, INTERPRET), mask=live)
