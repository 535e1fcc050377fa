"""Gluon kernel of ``tqcompile::lattice_linear`` on Hopper for many tokens: ``wgmma``, weights as register operand.

As twin_wgmma.py: one warp copies with TMA, two warpgroups each unpack 64 of a tile's 128 rows in registers and
multiply, programs are persistent, and with SPLIT the parts of a tile are added in the order of K. A byte of the codes
holds columns 4j to 4j + 3, so x comes in four planes, column i of every four in plane i, and a step of 128 columns is
four products. Weights are written out in registers in the dtype of x: (code - zero) is exact, then comes one product
with the scale; with an offset one multiply-add. So they are rounded as those of a model in that dtype are.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tqcompile.kernels.gluon_common import grid_release, grid_wait, thread_barrier, tma_load
from tqcompile.kernels.wgmma_tiles import ROWS, add_parts, advance, halves, item_at, items_of, store_y, tile_at


def _bf16(value: float) -> int:
    """Twice in a word; exact for what is asked here."""
    return (struct.unpack("<I", struct.pack("<f", value))[0] >> 16) * 0x10001


def _fp16(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0] * 0x10001


def _unpack(bits: int, pair: str, mode: str) -> gl.constexpr:
    """PTX: 4 bytes of codes in $8 (two of a row, two of the row 8 below), their high bits in $9 (3 bits: those of the
    two bytes of a row, twice) -> plane i in $(2i) and $(2i + 1), two floats of each row. $10, $11: the scale of the
    rows, twice a register; mode "zero": $12, $13: minus the zero point (2 bits in bf16: minus 4 and it); "offset":
    $12 to $19: of each plane, what the offset is beyond the middle of the codes, times the scale.

    A code under the exponent of a base reads base + code where its lowest bit is worth 1.
    """
    middle = ((1 << bits) - 1) / 2
    if bits == 3:  # the code in bits 4 to 6
        place, top, low, base = (4, 0x41, 0, 8.0) if pair == "bf16x2" else (4, 0x54, 0, 64.0)
    else:  # in the highest bits of the mantissa, or in the lowest
        place, top, low, base = (5, 0x40, 0x80, 4.0) if pair == "bf16x2" else (0, 0x64, 0, 1024.0)
    half = {"bf16x2": _bf16, "f16x2": _fp16}[pair]

    def shifted(out: str, word: str, left: int) -> str:
        return f"shl.b32 {out}, {word}, {left};" if left > 0 else f"shr.u32 {out}, {word}, {-left};"

    lines = ["{ .reg .b32 u, h, t, e, o, one, top, add, mid, none;"]
    lines.append(f"mov.b32 one, {half(1.0):#x}; mov.b32 top, {top * 0x01010101:#x}; mov.b32 none, 0x80008000;")
    early = mode == "zero" and pair == "bf16x2" and bits == 2  # the zero point goes with the base
    both = mode == "offset" and pair == "bf16x2"  # base and middle in one number; in fp16 that has too many bits
    lines.append(f"mov.b32 add, {half(-(base + middle) if both else -base):#x}; mov.b32 mid, {half(-middle):#x};")
    if bits == 3:  # the second byte of a row has its bits in the high nibble
        lines.append("shr.u32 t, $9, 4; and.b32 t, t, 0x0F000F00; lop3.b32 t, $9, 0x000F000F, t, 0xEA;")
        # Those of planes 2 and 3 go 2 up, by a multiply-add; then planes 0 and 2 in the nibbles of e, 1 and 3 in those
        # of o, whose fourth bits are anything.
        lines.append("and.b32 h, t, 0x0C0C0C0C; mad.lo.u32 t, h, 3, t;")
        lines.append("mul.lo.u32 h, t, 4; lop3.b32 e, $8, h, 0x33333333, 0xE4;")
        lines.append("mul.lo.u32 h, t, 2; shr.u32 o, $8, 2; lop3.b32 o, o, h, 0x33333333, 0xE4;")
    for i in range(4):
        first, second = 2 * i, 2 * i + 1
        if bits == 3:
            word = "eo"[i % 2]
            if i < 2:
                lines.append(f"mul.lo.u32 u, {word}, 16;")
            lines.append(f"and.b32 u, {'u' if i < 2 else word}, 0x70707070;")
        else:
            lines.append(shifted("u", "$8", place - 2 * i))
            lines.append(f"lop3.b32 u, u, {(3 << place) * 0x01010101:#x}, {low * 0x01010101:#x}, 0xEA;")
        lines.append(f"prmt.b32 ${first}, u, top, 0x4140; prmt.b32 ${second}, u, top, 0x4342;")
        for row, out in enumerate((first, second)):
            lines.append(f"fma.rn.{pair} ${out}, ${out}, one, {f'${12 + row}' if early else 'add'};")
            if (mode == "zero" and not early) or (mode == "offset" and not both):
                lines.append(f"fma.rn.{pair} ${out}, ${out}, one, {f'${12 + row}' if mode == 'zero' else 'mid'};")
            beyond = f"${12 + 2 * i + row}" if mode == "offset" else "none"
            lines.append(f"fma.rn.{pair} ${out}, ${out}, ${10 + row}, {beyond};")
    return gl.constexpr(" ".join([*lines, "}"]))


_OUTPUTS = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r")
_FORMS = ("none", "zero", "offset")
_BF16_2_NONE, _BF16_2_ZERO, _BF16_2_OFFSET = (_unpack(2, "bf16x2", mode) for mode in _FORMS)
_BF16_3_NONE, _BF16_3_ZERO, _BF16_3_OFFSET = (_unpack(3, "bf16x2", mode) for mode in _FORMS)
_FP16_2_NONE, _FP16_2_ZERO, _FP16_2_OFFSET = (_unpack(2, "f16x2", mode) for mode in _FORMS)
_FP16_3_NONE, _FP16_3_ZERO, _FP16_3_OFFSET = (_unpack(3, "f16x2", mode) for mode in _FORMS)


@gluon.jit
def _floats(w, high, s, z, d, BITS: gl.constexpr, HAS_ZERO: gl.constexpr, D: gl.constexpr, FLOAT: gl.constexpr):
    """Codes (64, 32) -> four planes of weights (64, 32) of type FLOAT. s, z: (64, 1), and d four of them."""
    if D > 0:
        args = [w, high, s, d[0], d[1], d[2], d[3]]
        constraints: gl.constexpr = _OUTPUTS + ",r,r,r,r,r,r,r,r"
        bf16: gl.constexpr = _BF16_2_OFFSET if BITS == 2 else _BF16_3_OFFSET
        fp16: gl.constexpr = _FP16_2_OFFSET if BITS == 2 else _FP16_3_OFFSET
    elif HAS_ZERO:
        args = [w, high, s, z]
        constraints: gl.constexpr = _OUTPUTS + ",r,r"
        bf16: gl.constexpr = _BF16_2_ZERO if BITS == 2 else _BF16_3_ZERO
        fp16: gl.constexpr = _FP16_2_ZERO if BITS == 2 else _FP16_3_ZERO
    else:
        args = [w, high, s]
        constraints: gl.constexpr = _OUTPUTS
        bf16: gl.constexpr = _BF16_2_NONE if BITS == 2 else _BF16_3_NONE
        fp16: gl.constexpr = _FP16_2_NONE if BITS == 2 else _FP16_3_NONE
    if gl.bfloat16 == FLOAT:
        planes = gl.inline_asm_elementwise(
            bf16, constraints, args,
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=False, pack=4,
        )  # fmt: skip
    else:
        planes = gl.inline_asm_elementwise(
            fp16, constraints, args,
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=False, pack=4,
        )  # fmt: skip
    return planes


@gluon.jit
def _copy_tiles(
    w_desc, x_desc, ws, xs, full, empty, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    tiles = tiles_n * tiles_m
    parts = gl.num_programs(0) // tiles if SPLIT else 1
    _, items = items_of(0, tiles * parts)
    slot = 0
    phase = 1
    for i in range(items):
        tile, part, _ = item_at(i, 0, parts, SPLIT)
        begin, end = steps * part // parts, steps * (part + 1) // parts
        n0, m0 = tile_at(tile, tiles_n, tiles_m, BM)
        for step in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, ROWS * 32 + 4 * BM * 32 * 2)
            tma_load(w_desc, [n0, step * 32], bar, ws.index(2 * slot))
            tma_load(w_desc, [n0 + 64, step * 32], bar, ws.index(2 * slot + 1))
            if PDL:
                if (i == 0) & (step == begin):  # the weights do not depend on the kernel before, x does
                    grid_wait(step)
            for plane in gl.static_range(4):
                at = plane * (K // 4) + step * 32
                tma_load(x_desc, [m0, at], bar, xs.index(4 * slot + plane))
            slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _multiply(
    HALF: gl.constexpr, y_desc, ws, xs, ys, full, empty, codes, scale, zero, offset, bias, partials, counters, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr,
    ZERO_STEPS: gl.constexpr, SPLIT: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows HALF * 64 .. of every tile."""
    WIDTH: gl.constexpr = BM if BM < 128 else 128  # of one instruction
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    nibbles: gl.constexpr = gl.DotOperandLayout(0, mma, 1)
    out: gl.constexpr = y_desc.dtype
    # What is added to base + code before the scale: see _unpack.
    EARLY: gl.constexpr = 4 if BITS == 2 and out == gl.bfloat16 else 0
    MIDDLE: gl.constexpr = 1.5 if BITS == 2 else 3.5

    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    groups = steps // GROUP_STEPS
    tiles = tiles_n * tiles_m
    parts = gl.num_programs(0) // tiles if SPLIT else 1
    _, items = items_of(0, tiles * parts)
    y_own = ys.index(HALF)
    slot = 0
    phase = 0
    beyond = ()
    if D > 0:
        for plane in gl.static_range(4):
            beyond = beyond + (gl.load(offset + plane % D).to(gl.float32) + MIDDLE,)
    for i in range(items):
        tile, part, _ = item_at(i, 0, parts, SPLIT)
        begin, end = steps * part // parts, steps * (part + 1) // parts
        n_tile, m0 = tile_at(tile, tiles_n, tiles_m, BM)
        n0 = n_tile + HALF * 64
        row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights)), N - 1)
        scale_at, zero_at = scale + row * groups, zero + row * groups
        n_safe = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, mma)), N - 1)
        s = gl.load(scale_at + begin // GROUP_STEPS)
        z = s
        if HAS_ZERO:
            z = gl.load(zero_at + begin // GROUP_STEPS)
        high = s
        if BITS == 3:
            high_row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, nibbles)), N - 1).to(gl.int64)
            high_at = codes + gl.expand_dims(high_row * (K // 8 * 3) + K // 4, 1)
            high_at += gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, nibbles)), 0)
            high = gl.load(high_at + begin * 16)
        acc = gl.zeros([64, BM], gl.float32, mma)
        for step in range(begin, end):
            after = gl.minimum(step + 1, steps - 1)
            s_next = gl.load(scale_at + after // GROUP_STEPS)
            z_next = s_next
            if HAS_ZERO:
                z_next = gl.load(zero_at + after // GROUP_STEPS)
            high_next = s_next
            if BITS == 3:
                high_next = gl.load(high_at + after * 16)
            mbarrier.wait(full.index(slot), phase)
            w = ws.index(2 * slot + HALF).load(weights)
            h = w
            if BITS == 3:
                h = gl.convert_layout(gl.reshape(gl.join(high, high), [64, 32]), weights, assert_trivial=True)
            minus = gl.expand_dims(s, 1)
            if HAS_ZERO:
                minus = gl.expand_dims((z.to(gl.float32) * (-1.0 / ZERO_STEPS) - EARLY).to(out), 1)
            d = ()
            if D > 0:
                for plane in gl.static_range(4):
                    d = d + (gl.expand_dims((s.to(gl.float32) * beyond[plane]).to(out), 1),)
            planes = _floats(w, h, gl.expand_dims(s, 1), minus, d, BITS, HAS_ZERO, D, out)
            for plane in gl.static_range(4):
                use = True if plane else step != begin
                acc = warpgroup_mma(
                    planes[plane], xs.index(4 * slot + plane).permute((1, 0)), acc, use_acc=use, is_async=True
                )
            s, z, high = s_next, z_next, high_next
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = advance(slot, phase, STAGES)
        finish = True
        if SPLIT:
            counter = counters + 2 * tile + HALF
            finish, acc = add_parts(acc, 2 * tile * parts + HALF, part, parts, partials, counter, 2, BM)
        if finish:
            y = acc
            if HAS_BIAS:
                y += gl.expand_dims(gl.load(bias + n_safe).to(gl.float32), 1)
            pieces = (y,) if PIECES == 1 else halves(y)
            for j in gl.static_range(PIECES):
                tma.store_wait(0)
                thread_barrier()
                store_y(pieces[j], y_own, y_desc, m0 + j * (BM // PIECES), n0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def lattice_wgmma(
    w_desc, x_desc, y_desc, codes, scale, zero, offset, bias, partials, counters, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr,
    ZERO_STEPS: gl.constexpr, SPLIT: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr,
    PIECES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows times BM tokens; y goes out in PIECES. GROUP_STEPS steps of 128 columns share a scale.

    Descriptors: codes (N, K BITS / 8) int8 in boxes (64, 32); x (T, K), four planes in a row, in (BM, 32); y (T, N) of
    the same dtype in (BM / PIECES, 64). partials: 2 * 64 * BM fp32 a program; counters: 2 a tile, zero. REGISTERS: of a
    thread of the second warpgroup; the first gets what is left.
    """
    out: gl.constexpr = y_desc.dtype
    ws = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 64, 32], w_desc.layout)
    xs = gl.allocate_shared_memory(out, [4 * STAGES, BM, 32], x_desc.layout)
    ys = gl.allocate_shared_memory(out, [2, BM // PIECES, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if PDL:
        grid_release(T)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, y_desc, ws, xs, ys, full, empty, codes, scale, zero, offset, bias, partials, counters,
                         T, N, K, BM, STAGES, GROUP_STEPS, BITS, D, ZERO_STEPS, SPLIT, HAS_ZERO, HAS_BIAS, PIECES)),
            (_multiply, (1, y_desc, ws, xs, ys, full, empty, codes, scale, zero, offset, bias, partials, counters,
                         T, N, K, BM, STAGES, GROUP_STEPS, BITS, D, ZERO_STEPS, SPLIT, HAS_ZERO, HAS_BIAS, PIECES)),
            (_copy_tiles, (w_desc, x_desc, ws, xs, full, empty, T, N, K, BM, STAGES, SPLIT, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
    # fmt: on
