"""Gluon kernel of ``tqcompile::twin_gemm`` on Hopper: ``wgmma`` with the 4-bit weights as register operand.

y^T = W x^T. A program has three warp-specialised parts: one warp copies tiles of packed weights, of x and of t with
TMA through a ring of STAGES buffers; two warpgroups each take 64 of a tile's 128 rows, unpack their weights in
registers and multiply. While one unpacks, the tensor cores work for the other.

Group scales are a row's number times an integer m in 1 .. 16 (``channel_scale``), and q * m is exact in int8, bf16 and
fp16. So the unpacking multiplies by m, one sum (int32, fp32 for floating-point x) lives over all of K, and only the
epilogue scales: x_scale, channel scale, ``up @ t`` in 16-bit floats with fp32 sums, bias, addend.

Programs are persistent and take tile after tile. With SPLIT they share all tiles evenly, in steps of K: the parts of a
tile go to global memory, and the last program to arrive adds them in the order of K, so the bits do not depend on who
was last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tqcompile.kernels.gluon_common import grid_release, grid_wait

ROWS = gl.constexpr(128)  # of a tile
BAND = gl.constexpr(8)  # token tiles that run together, so that they share weights and x in the L2 cache

# 4 packed bytes -> the low nibbles times m in $0, the high ones in $1. With u = q + 8 the bytes of u * m + 128 - 8 m
# are q * m + 128 in 0 .. 240: no carries, and flipping the top bits leaves q * m. $3: m; $7: the four 128 - 8 m.
_UNPACK = gl.constexpr("""{ .reg .b32 l, h;
    and.b32 l, $2, 0x0F0F0F0F; xor.b32 l, l, 0x08080808;
    shr.u32 h, $2, 4; and.b32 h, h, 0x0F0F0F0F; xor.b32 h, h, 0x08080808;
    mad.lo.u32 l, l, $3, $7; mad.lo.u32 h, h, $3, $7;
    xor.b32 $0, l, 0x80808080; xor.b32 $1, h, 0x80808080; }""")
# The same to floats: $0, $1 the low nibbles times m, $2, $3 the high ones. A byte u = q + 8 under the byte of 128.0
# (bf16; 1024.0 in fp16) is the number 128 + u, and (128 + u) * m - 136 * m is exact. $5, $6: m; $7, $8: -136 m.
_FLOATS = """{ .reg .b32 l, h;
    lop3.b32 l, $4, 0x0F0F0F0F, 0x08080808, 0x6A;
    shr.u32 h, $4, 4; lop3.b32 h, h, 0x0F0F0F0F, 0x08080808, 0x6A;
    prmt.b32 $0, l, BASE, 0x4140; prmt.b32 $1, l, BASE, 0x4342;
    prmt.b32 $2, h, BASE, 0x4140; prmt.b32 $3, h, BASE, 0x4342;
    fma.rn.TYPE $0, $0, $5, $7; fma.rn.TYPE $1, $1, $6, $8;
    fma.rn.TYPE $2, $2, $5, $7; fma.rn.TYPE $3, $3, $6, $8; }"""
_UNPACK_BF16 = gl.constexpr(_FLOATS.replace("BASE", "0x43434343").replace("TYPE", "bf16x2"))
_UNPACK_FP16 = gl.constexpr(_FLOATS.replace("BASE", "0x64646464").replace("TYPE", "f16x2"))


@gluon.jit
def _tile(number, tiles_n, tiles_m, BM: gl.constexpr):
    """First row and first token of a tile."""
    band = number // (BAND * tiles_n)
    height = gl.minimum(tiles_m - BAND * band, BAND)
    inside = number % (BAND * tiles_n)
    return (inside // height) * ROWS, (BAND * band + inside % height) * BM


@gluon.jit
def _share(tiles, steps, SPLIT: gl.constexpr):
    """(first, last, parts): this program's steps of all tiles * steps, and on how many tiles they lie. Not SPLIT: only
    the number of its tiles."""
    pid, programs = gl.program_id(0), gl.num_programs(0)
    if SPLIT:
        first = tiles * steps * pid // programs
        last = tiles * steps * (pid + 1) // programs
        return first, last, (last - 1) // steps - first // steps + 1
    return 0, 0, (tiles - pid + programs - 1) // programs


@gluon.jit
def _part(i, steps, first, last, SPLIT: gl.constexpr):
    """(tile, first step, last step) of the i-th tile of this program."""
    if SPLIT:
        tile = first // steps + i
        return tile, gl.maximum(first - tile * steps, 0), gl.minimum(last - tile * steps, steps)
    return gl.program_id(0) + i * gl.num_programs(0), steps * 0, steps


@gluon.jit
def _operand(w, scale, inverse):
    """Packed bytes (64, 64) -> q * m of the low and of the high nibbles, int8 (64, 64) each. m = scale * inverse."""
    m = (scale.to(gl.float32) * inverse + 0.5).to(gl.int32)
    offset = m * -0x08080808 - 2139062144  # four bytes of 128 - 8 m
    args = [w, gl.expand_dims(m, 1), gl.expand_dims(offset, 1)]
    return gl.inline_asm_elementwise(
        _UNPACK, "=&r,=&r,r,r,r,r,r,r,r,r,r", args, dtype=(gl.int8, gl.int8), is_pure=False, pack=4
    )


@gluon.jit
def _float_operand(w, scale, inverse, FLOAT: gl.constexpr):
    """As :func:`_operand`, to 16-bit floats."""
    m = gl.floor(scale.to(gl.float32) * inverse + 0.5)
    if gl.bfloat16 == FLOAT:
        args = [w, gl.expand_dims(m.to(FLOAT), 1), gl.expand_dims((m * -136).to(FLOAT), 1)]
        low, high = gl.inline_asm_elementwise(
            _UNPACK_BF16, "=&r,=&r,=&r,=&r,r,r,r,r,r", args, dtype=(gl.bfloat16, gl.bfloat16), is_pure=False, pack=4
        )
    else:
        args = [w, gl.expand_dims(m.to(FLOAT), 1), gl.expand_dims((m * -1032).to(FLOAT), 1)]
        low, high = gl.inline_asm_elementwise(
            _UNPACK_FP16, "=&r,=&r,=&r,=&r,r,r,r,r,r", args, dtype=(gl.float16, gl.float16), is_pure=False, pack=4
        )
    return low, high


@gluon.jit
def _copy_tiles(
    w_desc, x_desc, t_desc, ws, xs, ts, full, empty, t_full, t_empty, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    first, last, parts = _share(tiles_n * tiles_m, steps, SPLIT)
    slot = 0
    phase = 1
    for i in range(parts):
        tile, begin, end = _part(i, steps, first, last, SPLIT)
        n0, m0 = _tile(tile, tiles_n, tiles_m, BM)
        for step in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, ROWS * 64 + 2 * BM * 64 * (x_desc.dtype.primitive_bitwidth // 8))
            tma.async_copy_global_to_shared(w_desc, [n0, step * 64], bar, ws.index(2 * slot))
            tma.async_copy_global_to_shared(w_desc, [n0 + 64, step * 64], bar, ws.index(2 * slot + 1))
            if PDL:
                if (i == 0) & (step == begin):  # the weights do not depend on the kernel before, x and t do
                    grid_wait(step)
            tma.async_copy_global_to_shared(x_desc, [m0, step * 64], bar, xs.index(2 * slot))
            tma.async_copy_global_to_shared(x_desc, [m0, K // 2 + step * 64], bar, xs.index(2 * slot + 1))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if R > 0:
            # Last: what is in ts now is read until the tile before this one ends.
            mbarrier.wait(t_empty, (i & 1) ^ 1)
            mbarrier.expect(t_full, BM * R * 2)
            tma.async_copy_global_to_shared(t_desc, [m0, 0], t_full, ts.index(0))
            tma.async_copy_global_to_shared(t_desc, [m0, R // 2], t_full, ts.index(1))


@gluon.jit
def _add_parts(acc, tile, steps, tiles, partials, counter, HALF: gl.constexpr, BM: gl.constexpr):
    """Store this program's part of a tile; True and the sum of all parts for the program that stores the last one."""
    pid, programs = gl.program_id(0), gl.num_programs(0)
    total = tiles * steps
    lowest = ((tile * steps + 1) * programs - 1) // total  # the programs that have a part of this tile
    highest = ((tile + 1) * steps * programs - 1) // total
    SIZE: gl.constexpr = 64 * BM
    # In the order of the registers: 16 bytes a thread, 512 a warp.
    flat = gl.reshape(gl.permute(gl.reshape(acc, [4, 2, 8, BM // 8, 4, 2]), (0, 3, 2, 4, 1, 5)), [SIZE])
    at = gl.arange(0, SIZE, flat.type.layout)
    # A program has at most two tiles that it shares: its first and its last.
    mine = 2 * pid + (tile != total * pid // programs // steps).to(gl.int32)
    gl.store(partials + (2 * mine + HALF).to(gl.int64) * SIZE + at, flat)
    gl.thread_barrier()  # all stores come before the one thread's release
    is_last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == highest - lowest
    if is_last:
        if acc.dtype != gl.int32:  # in one order; integers need none, and keep their own part in registers
            flat = gl.zeros_like(flat)
        for other in range(lowest, highest + 1):
            if (other != pid) | (acc.dtype != gl.int32):
                theirs = 2 * other + (tile != total * other // programs // steps).to(gl.int32)
                flat += gl.load(partials + (2 * theirs + HALF).to(gl.int64) * SIZE + at, cache_modifier=".cg")
        gl.store(counter, 0)  # clean for the next launch and for graph replay
    summed = gl.permute(gl.reshape(flat, [4, BM // 8, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
    return is_last, gl.convert_layout(gl.reshape(summed, [64, BM]), acc.type.layout)


@gluon.jit
def _multiply(
    HALF: gl.constexpr, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full,
    scale, channel, x_scale, up, up_scale, bias, partials, counters, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, R: gl.constexpr, SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr, PIECES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows HALF * 64 .. of every tile."""
    WIDTH: gl.constexpr = BM if BM < 128 else 128  # of one instruction
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    mma16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    INT: gl.constexpr = x_desc.dtype == gl.int8
    weights16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 4) if INT else weights16
    out: gl.constexpr = y_desc.dtype

    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    groups = steps // GROUP_STEPS
    first, last, parts = _share(tiles_n * tiles_m, steps, SPLIT)
    y_own, a_bar = ys.index(HALF), a_full.index(HALF)
    slot = 0
    phase = 0
    a_phase = 0
    if PDL:
        if HAS_ADDEND:
            grid_wait(T)
    for i in range(parts):
        tile, begin, end = _part(i, steps, first, last, SPLIT)
        n_tile, m0 = _tile(tile, tiles_n, tiles_m, BM)
        n0 = n_tile + HALF * 64
        row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights)), N - 1)
        scale_at = scale + row * groups
        inverse = 1.0 / gl.load(channel + row)
        n = n0 + gl.arange(0, 64, gl.SliceLayout(1, mma))
        n_safe = gl.minimum(n, N - 1)
        # What the epilogue needs of the weights, early: from memory it takes as long as several steps.
        c = gl.load(channel + n_safe)
        if R > 0:
            up_s = gl.load(up_scale + n_safe).to(gl.float32)
            up_row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights16)), N - 1)
            up_byte = gl.arange(0, R // 2, gl.SliceLayout(0, weights16))
            up_at = up + gl.expand_dims(up_row * (R // 2), 1) + gl.expand_dims(up_byte, 0)
            u = gl.load(up_at).to(gl.int8, bitcast=True)

        if HAS_ADDEND:
            # The addend's first piece waits where y will stand; the store of the tile before has been read by now.
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.expect(a_bar, BM // PIECES * 64 * 2)
            tma.async_copy_global_to_shared(a_desc, [m0, n0], a_bar, y_own)

        s = gl.load(scale_at + begin // GROUP_STEPS)
        s_next = gl.load(scale_at + gl.minimum(begin + 1, steps - 1) // GROUP_STEPS)
        acc = gl.zeros([64, BM], gl.int32, mma) if INT else gl.zeros([64, BM], gl.float32, mma16)
        for step in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            w = ws.index(2 * slot + HALF).load(weights)
            low, high = _operand(w, s, inverse) if INT else _float_operand(w, s, inverse, x_desc.dtype)
            even, odd = xs.index(2 * slot).permute((1, 0)), xs.index(2 * slot + 1).permute((1, 0))
            acc = warpgroup_mma(low, even, acc, use_acc=step != begin, is_async=True)
            acc = warpgroup_mma(high, odd, acc, is_async=True)
            s = s_next
            s_next = gl.load(scale_at + gl.minimum(step + 2, steps - 1) // GROUP_STEPS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1

        finish = True
        if SPLIT:
            if end - begin < steps:
                finish, acc = _add_parts(
                    acc, tile, steps, tiles_n * tiles_m, partials, counters + 2 * tile + HALF, HALF, BM
                )
        if R > 0:
            mbarrier.wait(t_full, i & 1)
        if finish:
            m = m0 + gl.arange(0, BM, gl.SliceLayout(0, mma))
            # With a low rank in units of up_scale, so that up @ t is added by the tensor cores.
            y = gl.convert_layout(acc.to(gl.float32), mma, assert_trivial=True)
            y *= gl.expand_dims(c / up_s if R > 0 else c, 1)
            if INT:
                y *= gl.expand_dims(gl.load(x_scale + m, mask=m < T, other=0.0), 0)
            if R > 0:
                u_low, u_high = ((u << 4) >> 4).to(out), (u >> 4).to(out)
                y = gl.convert_layout(y, mma16, assert_trivial=True)
                y = warpgroup_mma(u_low, ts.index(0).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma(u_high, ts.index(1).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma_wait(0, deps=[y])
                y = gl.convert_layout(y, mma, assert_trivial=True) * gl.expand_dims(up_s, 1)
            if HAS_BIAS:
                y += gl.expand_dims(gl.load(bias + n_safe).to(gl.float32), 1)
            pieces = (y,) if PIECES == 1 else gl.split(gl.permute(gl.reshape(y, [64, 2, BM // 2]), (0, 2, 1)))
            for j in gl.static_range(PIECES):
                piece = pieces[j]
                if HAS_ADDEND:
                    if j > 0:
                        tma.store_wait(0)
                        gl.thread_barrier()
                        mbarrier.expect(a_bar, BM // PIECES * 64 * 2)
                        tma.async_copy_global_to_shared(a_desc, [m0 + j * (BM // PIECES), n0], a_bar, y_own)
                    mbarrier.wait(a_bar, a_phase)
                    a_phase ^= 1
                    piece += y_own.permute((1, 0)).load(piece.type.layout).to(gl.float32)
                    gl.thread_barrier()
                else:
                    tma.store_wait(0)
                    gl.thread_barrier()
                y_own.permute((1, 0)).store(piece.to(out))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(y_desc, [m0 + j * (BM // PIECES), n0], y_own)
        elif HAS_ADDEND:
            mbarrier.wait(a_bar, a_phase)
            a_phase ^= 1
        if R > 0:
            mbarrier.arrive(t_empty, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def twin_wgmma(
    w_desc, x_desc, t_desc, y_desc, a_desc, scale, channel, x_scale, up, up_scale, bias, partials, counters, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, R: gl.constexpr, SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr, PIECES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows times BM tokens; y goes out in PIECES. GROUP_STEPS steps of 128 channels share a scale.

    Descriptors: packed weights (N, K/2) int8 in boxes (64, 64); x (T, K) planes, int8 or of the dtype of y, in
    (BM, 64); t (T, R) planes in (BM, R/2); y and the addend (T, N) in (BM / PIECES, 64). partials: 4 * 64 * BM int32,
    fp32 for floating-point x, a program; counters: 2 a tile, zero.
    REGISTERS: of a thread of the second warpgroup; the first gets what is left.
    """
    out: gl.constexpr = y_desc.dtype
    ws = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 64, 64], w_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, BM, 64], x_desc.layout)
    ys = gl.allocate_shared_memory(out, [2, BM // PIECES, 64], y_desc.layout)
    ts = gl.allocate_shared_memory(out, [2, BM if R > 0 else 8, R // 2 if R > 0 else 32], t_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    a_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(a_full.index(i), count=1)
    mbarrier.init(t_full, count=1)
    mbarrier.init(t_empty, count=2)
    fence_async_shared()
    if PDL:
        grid_release(T)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale,
                         channel, x_scale, up, up_scale, bias, partials, counters, T, N, K, BM, STAGES, GROUP_STEPS, R,
                         SPLIT, HAS_BIAS, HAS_ADDEND, PIECES, PDL)),
            (_multiply, (1, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale,
                         channel, x_scale, up, up_scale, bias, partials, counters, T, N, K, BM, STAGES, GROUP_STEPS, R,
                         SPLIT, HAS_BIAS, HAS_ADDEND, PIECES, PDL)),
            (_copy_tiles, (w_desc, x_desc, t_desc, ws, xs, ts, full, empty, t_full, t_empty, T, N, K, BM, STAGES, R,
                           SPLIT, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
    # fmt: on
