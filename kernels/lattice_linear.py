"""Kernels of ``tqcompile::lattice_linear``: 2-bit or 3-bit codes, floating-point activations.

    skinny  up to 16 tokens, 16-bit x, groups of 128    lattice_skinny.py
    wgmma   these up to 1024, on Hopper                 lattice_wgmma.py
    fused   other arguments up to 128                   Triton, here
    dense   more: weights are written out, then a dense product

A program of the fused form owns a (BN out-features x BM tokens) tile of y^T = W x^T. A byte of the codes holds elements
4j to 4j+3, so a tile of codes is four *planes*, element i of every four, and a step is four products of a plane with
the same columns of x. Few tokens are read as they are, every fourth element at a time; more are first stored plane by
plane. Codes enter as plain integers, exact in every dtype of x; zero points and offsets act through the sums of x, once
a step, and a step (which divides the group) is scaled once, in fp32.

Few tokens: the K loop is split over S programs a tile. Each writes fp32 partials, and the last to arrive adds them in
order 0..S-1. Many tokens: no 16-bit product on integer codes is faster than one on 16-bit weights, so the weights are
written out once, by a second kernel, and cuBLAS multiplies (:data:`DENSE_TOKENS`, :data:`WGMMA_TOKENS`).
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.split_counters import split_counters
from tqcompile.kernels.twin_gemm import SHARED_BYTES, fastest_split
from tqcompile.kernels.twin_linear import FLOATS, INTERPRET, Tile, _gpu, device_reason, round_to
from tqcompile.ops.lattice_linear import ZERO_STEPS

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tqcompile.kernels.lattice_skinny import lattice_skinny
    from tqcompile.kernels.lattice_wgmma import lattice_wgmma

    GLUON = True
except ImportError:  # Gluon is experimental: a Triton release may move it
    GLUON = False

SKINNY_TOKENS = 16
UNIT = 128  # columns of K that the skinny form takes at a time
PLAIN_TOKENS = 16  # up to this many x is read as it is
DENSE_TOKENS = 128  # beyond this many the weights are written out,
WGMMA_TOKENS = 1024  # where the wgmma form can run beyond this many
MAX_OFFSET = 4
# (tokens of a tile, programs a multiprocessor) -> microseconds of a K step of a tile of 128 rows. On an H200, 2 bits.
STEP_US = {(32, 1): 0.61, (64, 1): 0.62, (128, 1): 0.81, (256, 1): 1.3, (32, 2): 1.0, (64, 2): 1.05}


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
def _lattice_linear(
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
def _dequantize(
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
def _write_planes(x, out, K, BLOCK: tl.constexpr):
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


def choose_tile(t: int, n: int, k: int, group: int, wide: bool, sms: int = 132) -> Tile:
    """The tile for T tokens. group: what a K step divides; wide: fp32 operands, so no tensor core."""
    step = min(128, group & -group)
    bm = 16 if t <= 16 else 32 if t <= 32 else 64
    bn = 64 if wide else 128
    tiles = -(-n // bn) * -(-t // bm)
    # Split K only while two programs an SM are not there.
    splits = max(1, min(2 * sms // tiles, k // step // 4, 8))
    return Tile(bn, bm, step, splits, 4, 3 if wide else 4)


def unsupported(x, codes, scale, zero, offset, bias, bits) -> str | None:
    """Why :func:`launch` cannot compute these arguments (shapes, dtypes and devices only), or None if it can."""
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if codes.dim() != 2 or scale.dim() != 2 or codes.dtype != torch.uint8 or bits not in (2, 3):
        return f"codes must be 2-D uint8 of 2 or 3 bits, got {codes.dtype} {tuple(codes.shape)}, {bits} bits"
    k, groups = x.shape[-1], scale.shape[1]
    if codes.shape[1] * 8 != k * bits or k % groups or (k // groups) % 64:
        return f"groups of K / {groups} with K = {k} are no multiple of 64"
    if any(a is not None and not a.is_contiguous() for a in (codes, scale, zero, offset, bias)):
        return "codes, scale, zero, offset and bias must be contiguous"
    if any(a is not None and a.dtype not in FLOATS for a in (scale, offset, bias)):
        return "scale, offset and bias must be float32, float16 or bfloat16"
    if zero is not None and offset is not None:
        return "a zero point and an offset exclude each other"
    if offset is not None and MAX_OFFSET % offset.shape[0]:
        return f"an offset of {offset.shape[0]} numbers does not divide the {MAX_OFFSET} planes"
    return None


def describe(x, codes, scale, zero, offset, bias, bits) -> str:
    """Which form :func:`launch` takes: "skinny", "fused", or "dense" (weights written out, then cuBLAS)."""
    k = x.shape[-1]
    t, group = x.numel() // k, k // scale.shape[1]
    whole = GLUON and not INTERPRET and x.dtype in (torch.float16, torch.bfloat16) and group % UNIT == 0
    if whole and t <= SKINNY_TOKENS:
        return "skinny"
    hopper = x.is_cuda and _gpu(x.device.index).major == 9
    if whole and hopper and t <= WGMMA_TOKENS and scale.dtype == x.dtype and scale.shape[0] % 8 == 0:
        return "wgmma"
    return "dense" if t > DENSE_TOKENS else "fused"


class Skinny(NamedTuple):
    """A launch of the skinny form: RT tiles of 16 rows a warp, RW warps beside each other in N, KS in K; UNROLL units
    of codes asked for at once; at most so many registers a thread."""

    row_tiles: int
    row_warps: int
    k_warps: int
    unroll: int
    registers: int | None = None


def choose_skinny(t: int, n: int, k: int, sms: int = 132) -> Skinny:
    """The configuration for T tokens, by rule. Fitted to an H200: two tiles of rows share what x costs, and where there
    are programs enough for it, two of them on a multiprocessor are worth a few registers kept in memory."""
    wide = n > 32 * sms
    if t <= 8 and k <= 8192:
        return Skinny(2, 1, 8, 4, 128) if wide else Skinny(1, 1, 8, 4)
    if t <= 8:
        return Skinny(2, 1, 8, 2)
    return Skinny(2, 1, 4 if wide else 8, 4 if k <= 8192 else 1)


class Wgmma(NamedTuple):
    """A launch of the wgmma form: tiles of 128 rows times ``tokens``, K split in so many parts, programs a
    multiprocessor."""

    tokens: int
    splits: int
    programs: int


def choose_wgmma(t: int, n: int, k: int, sms: int = 132) -> Wgmma:
    """The configuration for T tokens: what the step times of tiles say."""
    costs = []
    for (bm, programs), step_us in STEP_US.items():
        if min(t, 64) <= bm and (bm < 2 * t or bm == 32):
            tiles = -(-n // 128) * -(-t // bm)
            cost, splits = fastest_split(tiles, k // UNIT, bm, programs * sms, step_us)
            costs.append((cost, splits, bm, programs))
    _, splits, bm, programs = min(costs)
    return Wgmma(bm, splits, programs)


def planes(x: torch.Tensor) -> torch.Tensor:
    """(T, K) -> (4, T, K / 4): element i of every four consecutive ones in plane i."""
    return x.unflatten(-1, (-1, 4)).movedim(-1, 0).contiguous()


def launch(x, codes, scale, zero, offset, bias, bits, tile: Tile | Skinny | Wgmma | None = None) -> torch.Tensor:
    """Run the kernel; the arguments are those of the op and must be supported.

    With a ``tile`` the kernel that it belongs to runs whatever the number of tokens (tests, tuning).
    """
    (n, groups), k = scale.shape, x.shape[-1]
    flat = x.reshape(-1, k)
    t = flat.shape[0]
    if t == 0:
        return x.new_empty((*x.shape[:-1], n))
    options = {
        "GROUP": k // groups,
        "BITS": bits,
        "D": 0 if offset is None else offset.shape[0],
        "ZERO_STEPS": ZERO_STEPS,
        "HAS_ZERO": zero is not None,
        "INTERPRET": INTERPRET,
    }
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        weights = [codes, scale, codes if zero is None else zero, scale if offset is None else offset]
        if tile is None:
            form = describe(x, codes, scale, zero, offset, bias, bits)
        else:
            form = {Skinny: "skinny", Wgmma: "wgmma", Tile: "fused"}[type(tile)]
        run = {"skinny": _skinny, "wgmma": _wgmma, "fused": _fused, "dense": _through_dense}[form]
        y = run(flat, weights, n, k, bias, options, tile)
    return y.reshape(*x.shape[:-1], n)


def _skinny(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t, x = x.shape[0], x.contiguous()
    codes, scale, zero, offset = weights
    bits, group = options["BITS"], options["GROUP"]
    gpu = _gpu(x.device.index)
    row_tiles, row_warps, k_warps, unroll, registers = tile or choose_skinny(t, n, k, gpu.multi_processor_count)
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    # Programmatic dependent launch: this kernel starts, and loads its first codes, before the one in front has ended.
    dependent = gpu.major >= 9
    warps, units = row_warps * k_warps, k // UNIT
    # Scales of neighbouring units are loaded at once, so units a warp are rounded up to what that needs.
    vector = math.gcd(units, unroll, 8) if group == UNIT else 1
    own = -(-units // (k_warps * vector)) * vector
    lattice_skinny[(-(-n // (16 * row_tiles * row_warps)),)](
        x.view(torch.int32), codes.view(torch.int32), scale, zero, offset, y if bias is None else bias, y, t, n,
        TILES=-(-t // 8), RT=row_tiles, RW=row_warps, KS=k_warps, UNROLL=unroll, V=vector, U=units, OWN=own,
        GROUP_UNITS=group // UNIT,
        BITS=bits, D=options["D"], ZERO_STEPS=ZERO_STEPS, HAS_ZERO=options["HAS_ZERO"], HAS_BIAS=bias is not None,
        FLOAT=gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16, PDL=dependent,
        num_warps=warps, launch_pdl=dependent, maxnreg=registers,
    )  # fmt: skip
    return y


def _in_four_planes(x: torch.Tensor) -> torch.Tensor:
    """(T, K) -> (T, K), for the wgmma form: column i of every four in plane i, the four planes one after the other."""
    t, k = x.shape
    out = torch.empty_like(x)
    _write_planes[(t, triton.cdiv(k, 1024))](x, out, k, BLOCK=1024, num_warps=2, launch_pdl=True)
    return out


def _wgmma(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t = x.shape[0]
    codes, scale, zero, offset = weights
    gpu = _gpu(x.device.index)
    bm, splits, ctas = tile or choose_wgmma(t, n, k, gpu.multi_processor_count)
    pieces = 2 if bm == 256 else 1
    x = _in_four_planes(x.contiguous())
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    tiles = -(-n // 128) * -(-t // bm)
    programs = tiles * splits if splits > 1 else min(tiles, ctas * gpu.multi_processor_count)
    partials = counters = y
    if splits > 1:
        partials = torch.empty(programs * 4 * 64 * bm, dtype=torch.float32, device=y.device)
        counters = split_counters(y.device, 2 * tiles)
    codes = codes.view(torch.int8)
    room = (SHARED_BYTES // ctas - 2 * min(bm, 128) * 64 * 2 - 2048) // (128 * 32 + 4 * bm * 32 * 2)
    lattice_wgmma[(programs,)](
        TensorDescriptor.from_tensor(codes, [64, 32], gl.NVMMASharedLayout(32, 8, rank=2)),
        TensorDescriptor.from_tensor(x, [bm, 32], gl.NVMMASharedLayout(64, 16, rank=2)),
        TensorDescriptor.from_tensor(y, [bm // pieces, 64], gl.NVMMASharedLayout(128, 16, rank=2)),
        codes, scale, zero, offset, y if bias is None else bias, partials, counters, t, n, k,
        BM=bm, STAGES=min(8, room), GROUP_STEPS=options["GROUP"] // UNIT, BITS=options["BITS"], D=options["D"],
        ZERO_STEPS=ZERO_STEPS, SPLIT=splits > 1, HAS_ZERO=options["HAS_ZERO"], HAS_BIAS=bias is not None,
        PIECES=pieces, REGISTERS={1: 240, 2: 104}[ctas], PDL=True,
        num_warps=4, launch_pdl=True, **({} if ctas == 1 else {"maxnreg": 80}),
    )  # fmt: skip
    return y


def _through_dense(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    w = torch.empty(n, k, dtype=x.dtype, device=x.device)
    step = min(128, options["GROUP"] & -options["GROUP"])
    _dequantize[(triton.cdiv(n, 32), k // step)](*weights, w, n, k, BN=32, BK=step, num_warps=4, **options)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def _fused(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t = x.shape[0]
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    tile = tile or choose_tile(t, n, k, options["GROUP"], x.dtype == torch.float32)
    tiles = -(-n // tile.bn) * -(-t // tile.bm)
    partials = counters = y  # not read when S is 1
    if tile.splits > 1:
        partials = torch.empty(tiles * tile.splits * tile.bn * tile.bm, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device, tiles)
    in_planes = t > PLAIN_TOKENS
    x = planes(x) if in_planes else x.contiguous()
    form = "fp32" if INTERPRET or x.dtype == torch.float32 else "bf16" if x.dtype == torch.bfloat16 else "fp16"
    _lattice_linear[(tiles * tile.splits,)](
        x, *weights, y if bias is None else bias, y, partials, counters, t, n, k,
        BM=tile.bm, BN=tile.bn, BK=tile.step, S=tile.splits, PLANES=in_planes, HAS_BIAS=bias is not None, FORM=form,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return y
