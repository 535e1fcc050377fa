"""Triton kernels of ``tqcompile::lattice_linear``: the fused form, and what the dense and the wgmma form need first.

A program of the fused form owns a (BN out-features x BM tokens) tile of y^T = W x^T. A byte of the codes holds elements
4j to 4j+3, so a tile of codes is four *planes*, element i of every four, and a step is four products of a plane with
the same columns of x. Few tokens are read as they are, every fourth element at a time; more are first stored plane by
plane. Codes enter as plain integers, exact in every dtype of x; zero points and offsets act through the sums of x, once
a step, and a step (which divides the group) is scaled once, in fp32.

Few tokens: the K loop is split over S programs a tile. Each writes fp32 partials, and the last to arrive adds them in
order 0..S-1.
"""

import triton
import triton.language as tl

from tqcompile.kernels.twin_linear import round_to


def _float_planes(bits: int, pair: str, base: str, one: str, offset: str) -> tl.constexpr:
    """PTX: 4 bytes of codes in $8, their high bits in $9 (a nibble a byte) -> plane i in $(2i), $(2i+1), two floats
    each. u in the mantissa of ``base`` reads base + u; the fma leaves u."""
    lines = ["{ .reg .b32 u, v, m, one, off;", f"mov.b32 m, 0x{base}; mov.b32 one, 0x{one}; mov.b32 off, 0x{offset};"]
    for i in range(4):
        first, second = 2 * i, 2 * i + 1
        lines.append(f"shr.u32 u, $8, {2 * i}; and.b32 u, u, 0x03030303;")
        if bits == 3:
            lines.append(f"shl.b32 v, $9, 2; shr.u32 v, v, {i}; and.b32 v, v, 0x04040404; or.b32 u, u, v;")
        lines.append(f"prmt.b32 ${first}, u, m, 0x4140; prmt.b32 ${second}, u, m, 0x4342;")
        lines += [f"fma.rn.{pair} ${out}, ${out}, one, off;" for out in (first, second)]
    return tl.constexpr(" ".join([*lines, "}"]))


BF16 = ("bf16x2", "43434343", "3F803F80", "C300C300")  # 128 + u, 1, -128
FP16 = ("f16x2", "64646464", "3C003C00", "E400E400")  # 1024 + u, 1, -1024
BF16_2, BF16_3, FP16_2, FP16_3 = (_float_planes(bits, *form) for form in (BF16, FP16) for bits in (2, 3))
OUTPUTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@triton.jit
def _planes(low, high, BITS: tl.constexpr, FORM: tl.constexpr):
    """Codes of four planes as floats: bytes of low bits and of high bits (a nibble a byte; not read for 2 bits)."""
    if FORM == "bf16":
        codes = tl.inline_asm_elementwise(
            BF16_2 if BITS == 2 else BF16_3, OUTPUTS, [low, high],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    elif FORM == "fp16":
        codes = tl.inline_asm_elementwise(
            FP16_2 if BITS == 2 else FP16_3, OUTPUTS, [low, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        lo = low.to(tl.int32)
        hi = high.to(tl.int32) << 2 if BITS == 3 else lo * 0
        codes = (
            ((lo & 3) | (hi & 4)).to(tl.float32),
            ((lo >> 2 & 3) | (hi >> 1 & 4)).to(tl.float32),
            ((lo >> 4 & 3) | (hi >> 2 & 4)).to(tl.float32),
            ((lo >> 6 & 3) | (hi >> 3 & 4)).to(tl.float32),
        )
    return codes


@triton.jit
def _load_codes(codes, row, step, K, BITS: tl.constexpr, BK: tl.constexpr):
    """Bytes of low bits of every row (rows, BK / 4), and of high bits, a nibble a byte. K is a multiple of 64: written
    like this the compiler sees how rows are aligned."""
    at = codes + row[:, None] * (K // 64 * (8 * BITS))
    low = tl.load(at + (step * (BK // 4) + tl.arange(0, BK // 4))[None, :])
    if BITS == 3:
        pairs = tl.load(at + (K // 64 * 16 + step * (BK // 8) + tl.arange(0, BK // 8))[None, :])
        high = tl.join(pairs & 15, pairs >> 4).reshape(pairs.shape[0], BK // 4)
    else:
        high = low
    return low, high


@triton.jit(do_not_specialize=["T"])
def lattice_tile(
    x, codes, scale, zero, offset, bias, y, partials, counters, T, N, K,
    GROUP: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, ZERO_STEPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PLANES: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x (4, T, K / 4) with PLANES, else (T, K); codes (N, K * BITS / 8); scale and zero (N, K / GROUP); y (T, N). D: 0
    for no offset."""
    tile, split = tl.program_id(0) // S, tl.program_id(0) % S
    tiles_m = tl.cdiv(T, BM)
    n0, m0 = (tile // tiles_m) * BN, (tile % tiles_m) * BM
    n, m = tl.arange(0, BN), tl.arange(0, BM)
    row = tl.minimum(n, N - 1 - n0)  # rows past N read the last one; they are not stored
    live = (m < T - m0)[:, None]
    codes += n0.to(tl.int64) * (K // 64 * (8 * BITS))
    group_at = (n0 + row) * (K // GROUP)
    if PLANES:
        plane = T.to(tl.int64) * (K // 4)
        x_at = x + m0.to(tl.int64) * (K // 4) + (m[:, None] * (K // 4))
    else:
        plane = 1
        x_at = x + m0.to(tl.int64) * K + (m[:, None] * K)
    first, last = K // BK * split // S, K // BK * (split + 1) // S
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, last):
        word = step * (BK // 4) + tl.arange(0, BK // 4)
        low, high = _load_codes(codes, row, step, K, BITS, BK)
        weights = _planes(low, high, BITS, FORM)
        s = tl.load(scale + group_at + step * BK // GROUP).to(tl.float32)
        part = tl.zeros((BN, BM), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for i in tl.static_range(4):
            column = word if PLANES else 4 * word
            xi = tl.load(x_at + i * plane + column[None, :], mask=live, other=0.0)
            if INTERPRET:
                xi = xi.to(tl.float32)  # the interpreter's bf16 dot is wrong
            part = tl.dot(weights[i].to(xi.dtype), xi.T, part, input_precision="ieee")
            if HAS_ZERO:
                total -= tl.sum(xi.to(tl.float32), axis=1)
            elif D > 0:
                total += tl.sum(xi.to(tl.float32), axis=1) * tl.load(offset + i % D).to(tl.float32)
        if HAS_ZERO:
            z = tl.load(zero + group_at + step * BK // GROUP).to(tl.float32) / ZERO_STEPS
            part += z[:, None] * total[None, :]
        elif D > 0:
            part += total[None, :]
        acc += part * s[:, None]
    here = (m < T - m0)[None, :]
    ready = S == 1
    if S > 1:
        at = partials + tile.to(tl.int64) * S * BN * BM + (m[None, :] * BN + n[:, None])
        tl.store(at + split * BN * BM, acc, mask=here)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        ready = arrived == S - 1
        if ready:
            tl.store(counters + tile, 0)
            acc = tl.zeros((BN, BM), tl.float32)
            for other in tl.range(0, S):
                acc += tl.load(at + other * BN * BM, mask=here, other=0.0, cache_modifier=".cg")
    if ready:
        if HAS_BIAS:
            acc += tl.load(bias + n0 + row).to(tl.float32)[:, None]
        y_at = y + m0.to(tl.int64) * N + n0 + (m[None, :].to(tl.int64) * N + n[:, None])
        tl.store(y_at, round_to(acc, y.dtype.element_ty, INTERPRET), mask=(n < N - n0)[:, None] & here)


@triton.jit
def write_weights(
    codes, scale, zero, offset, w, N, K,
    GROUP: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, ZERO_STEPS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, HAS_ZERO: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """w (N, K): the weights written out, rounded to its dtype."""
    n0, step = tl.program_id(0).to(tl.int64) * BN, tl.program_id(1)
    n = tl.arange(0, BN)
    row = tl.minimum(n, N - 1 - n0)
    low, high = _load_codes(codes + n0 * (K // 64 * (8 * BITS)), row, step, K, BITS, BK)
    group_at = (n0 + row) * (K // GROUP) + step * BK // GROUP
    s = tl.load(scale + group_at).to(tl.float32)[:, None]
    shift = tl.zeros((BN, 1), tl.float32)
    if HAS_ZERO:
        shift -= tl.load(zero + group_at).to(tl.float32)[:, None] / ZERO_STEPS
    weights = _planes(low, high, BITS, "fp32")
    shifts = (shift, shift, shift, shift)
    if D > 0:
        shifts = (
            shift + tl.load(offset), shift + tl.load(offset + 1 % D),
            shift + tl.load(offset + 2 % D), shift + tl.load(offset + 3 % D),
        )  # fmt: skip
    even = tl.join((weights[0] + shifts[0]) * s, (weights[2] + shifts[2]) * s)
    odd = tl.join((weights[1] + shifts[1]) * s, (weights[3] + shifts[3]) * s)
    values = tl.join(even, odd).reshape(BN, BK)
    at = w + (n0 + n[:, None]) * K + step * BK + tl.arange(0, BK)[None, :]
    tl.store(at, round_to(values, w.dtype.element_ty, INTERPRET), mask=(n < N - n0)[:, None])


@triton.jit
def write_planes(x, out, K, BLOCK: tl.constexpr):
    """out (T, K): of each row of x, column i of every four in plane i, the four planes one after the other."""
    tl.extra.cuda.gdc_launch_dependents()
    four = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * K
    tl.extra.cuda.gdc_wait()
    even, odd = tl.split(tl.load(x + row + at, mask=at < K).reshape(BLOCK // 4, 2, 2))
    plane0, plane2 = tl.split(even)
    plane1, plane3 = tl.split(odd)
    live = four < K // 4
    tl.store(out + row + four, plane0, mask=live)
    tl.store(out + row + K // 4 + four, plane1, mask=live)
    tl.store(out + row + 2 * (K // 4) + four, plane2, mask=live)
    tl.store(out + row + 3 * (K // 4) + four, plane3, mask=live)
