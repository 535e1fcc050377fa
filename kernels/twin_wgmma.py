"""Gluon kernel of ``tqcompile::twin_gemm`` on Hopper: ``wgmma`` with the 4-bit weights as register operand.

y^T = W x^T. A program has three warp-specialised parts: one warp copies tiles of packed weights, of x and of t with
TMA through a ring of STAGES buffers; two warpgroups each take 64 of a tile's 128 rows, unpack their weights in
registers and multiply. While one unpacks, the tensor cores work for the other, and for its own step before.

Group scales are a row's number times an integer m in 1 .. 16 (``channel_scale``), and q * m is exact in int8, bf16 and
fp16. So the unpacking multiplies by m, one sum (int32, fp32 for floating-point x) lives over all of K, and only the
epilogue scales: x_scale, channel scale, ``up @ t`` in 16-bit floats with fp32 sums, bias, addend.

Programs are persistent and take tile after tile. With SPLIT the tiles behind the ``whole`` first ones come in parts of
K: these go to global memory, and the last program to arrive adds them in the order of K, so the bits do not depend on
who was last.

With LOW the kernel makes t itself: its first tiles, in parts of K too, are 64 rows of ``down`` times BM tokens, and
each warpgroup takes half of the tokens, which leaves room for a second sum, so that the group scales of ``down`` may be
any. A counter for each BM tokens says when their t is in memory; the copying warps wait for it at the end of their
tiles. Tiles of t wait for no other program and lie in the first ones, so there is always one that goes on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tqcompile.kernels.gluon_common import grid_release, grid_wait, thread_barrier, tma_load
from tqcompile.kernels.wgmma_down import multiply_down
from tqcompile.kernels.wgmma_tiles import (
    ROWS,
    add_parts,
    advance,
    await_t,
    copy_t,
    early_item,
    exchange_parts,
    halves,
    init_barriers,
    item_at,
    items_of,
    multiply_step,
    of_rows,
    reset_after_all,
    store_y,
    tile_at,
)


@gluon.jit
def _copy_tiles(
    w_desc, x_desc, t_desc, d_desc, l_desc, ws, xs, ts, full, empty, t_full, t_empty, ready, low_parts, whole, parts,
    T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr, LOW: gl.constexpr, SPLIT: gl.constexpr,
    SHARES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    SHARE: gl.constexpr = BM // SHARES
    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    own_low, own = items_of(LOW * tiles_m * low_parts, whole + (tiles_n * tiles_m - whole) * parts)
    slot = 0
    phase = 1
    t_phase = 1
    for i in range(own_low + own):
        tile, part, of = item_at(i - own_low, whole, parts, SPLIT)
        n0, m0 = tile_at(tile, tiles_n, tiles_m, BM)
        of_t = i < own_low
        from_desc = x_desc
        if LOW > 0:
            if of_t:
                from_desc = l_desc
                tile, part = early_item(i, low_parts)
                n0, m0, of = tile % LOW * 64, tile // LOW * BM, low_parts
        begin, end = steps * part // of, steps * (part + 1) // of
        for step in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            x_bytes: gl.constexpr = 2 * BM * 64 * (x_desc.dtype.primitive_bitwidth // 8)
            if of_t:
                mbarrier.expect(bar, 64 * 64 + x_bytes)
                tma_load(d_desc, [n0, step * 64], bar, ws.index(2 * slot))
            else:
                mbarrier.expect(bar, ROWS * 64 + x_bytes)
                tma_load(w_desc, [n0, step * 64], bar, ws.index(2 * slot))
                tma_load(w_desc, [n0 + 64, step * 64], bar, ws.index(2 * slot + 1))
            if PDL:
                if (i == 0) & (step == begin):  # the weights do not depend on the kernel before, x and t do
                    grid_wait(step)
            tma_load(from_desc, [m0, step * 64], bar, xs.index(2 * slot))
            tma_load(from_desc, [m0, K // 2 + step * 64], bar, xs.index(2 * slot + 1))
            slot, phase = advance(slot, phase, STAGES)
        if R > 0:
            if i >= own_low:
                if LOW > 0:
                    await_t(ready + m0 // BM, 2 * LOW)
                # Last: what is in ts now is read until the tile before this one ends.
                m_t = m0 + part * SHARE if SHARES > 1 else m0
                copy_t(t_desc, ts, m_t, t_full, t_empty, t_phase, SHARE, R)
                t_phase ^= 1
    if LOW > 0:
        reset_after_all(ready, tiles_m)


@gluon.jit
def _item(
    i, HALF: gl.constexpr, weights: gl.constexpr, scale, channel, whole, parts, tiles_n, tiles_m, steps, N,
    BM: gl.constexpr, GROUP_STEPS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A warpgroup's i-th item: tile, part, of how many, first row and token; where the scales of its rows begin, the
    rows' units, the scales of two steps."""
    tile, part, of = item_at(i, whole, parts, SPLIT)
    begin = steps * part // of
    n_tile, m0 = tile_at(gl.minimum(tile, tiles_n * tiles_m - 1), tiles_n, tiles_m, BM)  # a program may have none
    n0 = n_tile + HALF * 64
    row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights)), N - 1)
    scale_at = scale + row * (steps // GROUP_STEPS)
    unit = gl.load(channel + row)
    s = gl.load(scale_at + begin // GROUP_STEPS)
    s_next = gl.load(scale_at + gl.minimum(begin + 1, steps - 1) // GROUP_STEPS)
    return (tile, part, of, n0, m0), scale_at, unit, s, s_next


@gluon.jit
def _multiply(
    HALF: gl.constexpr, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full,
    scale, channel, x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready, low_parts, whole,
    parts, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, R: gl.constexpr, LOW: gl.constexpr,
    DOWN_STEPS: gl.constexpr, SPLIT: gl.constexpr, SHARES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr, PIECES: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows HALF * 64 .. of every tile."""
    SHARE: gl.constexpr = BM // SHARES  # tokens of the epilogue
    PIECE: gl.constexpr = SHARE // PIECES
    WIDTH: gl.constexpr = BM if BM < 128 else 128  # of one instruction
    LAST_WIDTH: gl.constexpr = SHARE if SHARE < 128 else 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    mma16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    INT: gl.constexpr = x_desc.dtype == gl.int8
    weights16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 4) if INT else weights16
    last: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LAST_WIDTH, 32])
    last16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LAST_WIDTH, 16])
    tokens: gl.constexpr = gl.BlockedLayout([PIECE // 128 if PIECE > 128 else 1], [32], [4], [0])
    out: gl.constexpr = y_desc.dtype
    # A step's weights are unpacked beside the products of the step before; in pairs, since products that are on their
    # way over the edge of a loop make ptxas wait behind every one.
    BEHIND: gl.constexpr = INT and AHEAD and EVEN
    EARLY: gl.constexpr = BM < 128  # there is room in registers for what the epilogue needs

    steps, tiles_n, tiles_m = K // 128, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    tiles, low_tiles = tiles_n * tiles_m, LOW * tiles_m
    own_low, own = items_of(low_tiles * low_parts, whole + (tiles - whole) * parts)
    y_own, a_bar = ys.index(HALF), a_full.index(HALF)
    slot = 0
    phase = 0
    a_phase = 0
    t_phase = 0
    if PDL:
        if HAS_ADDEND:
            grid_wait(T)
    if LOW > 0:
        for i in range(own_low):
            tile, part = early_item(i, low_parts)
            slot, phase = multiply_down(
                HALF, x_desc, ws, xs, full, empty, x_scale, low_ratio, down_scale, t, partials, counters, ready, slot,
                phase, tile, part, low_parts, steps, T, BM, STAGES, R, LOW, DOWN_STEPS,
            )  # fmt: skip
    if AHEAD:
        place, scale_at, unit, s, s_next = _item(
            0, HALF, weights, scale, channel, whole, parts, tiles_n, tiles_m, steps, N, BM, GROUP_STEPS, SPLIT
        )
    for i in range(own):
        if not AHEAD:
            place, scale_at, unit, s, s_next = _item(
                i, HALF, weights, scale, channel, whole, parts, tiles_n, tiles_m, steps, N, BM, GROUP_STEPS, SPLIT
            )
        tile, part, of, n0, m0 = place
        begin, end = steps * part // of, steps * (part + 1) // of
        m_y = m0 + part * SHARE if SHARES > 1 else m0
        inverse = 1.0 / unit
        if HAS_ADDEND:
            # The addend's first piece waits where y will stand; the store of the tile before has been read by now.
            tma.store_wait(0)
            thread_barrier()
            mbarrier.expect(a_bar, PIECE * 64 * 2)
            tma_load(a_desc, [m_y, n0], a_bar, y_own)

        if EARLY:
            c, up_s, u = of_rows(n0, last, last16, channel, up, up_scale, N, R)
        if INT:  # when x is there, so is its scale; it has all of K to come
            mbarrier.wait(full.index(slot), phase)
            x_factors = ()
            for j in gl.static_range(PIECES):
                token = m_y + j * PIECE + gl.arange(0, PIECE, tokens)
                x_factors = x_factors + (gl.load(x_scale + token, mask=token < T, other=0.0),)
        acc = gl.zeros([64, BM], gl.int32, mma) if INT else gl.zeros([64, BM], gl.float32, mma16)
        if BEHIND:
            for pair in range(begin, end - 2, 2):
                acc = multiply_step(acc, pair != begin, ws, xs, full, slot, phase, HALF, s, inverse, weights)
                s, s_next = s_next, gl.load(scale_at + gl.minimum(pair + 2, steps - 1) // GROUP_STEPS)
                before = slot
                slot, phase = advance(slot, phase, STAGES)
                acc = multiply_step(acc, True, ws, xs, full, slot, phase, HALF, s, inverse, weights)
                s, s_next = s_next, gl.load(scale_at + gl.minimum(pair + 3, steps - 1) // GROUP_STEPS)
                acc = warpgroup_mma_wait(2, deps=[acc])
                mbarrier.arrive(empty.index(before), count=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = advance(slot, phase, STAGES)
            acc = multiply_step(acc, begin != end - 2, ws, xs, full, slot, phase, HALF, s, inverse, weights)
            s = s_next
            before = slot
            slot, phase = advance(slot, phase, STAGES)
        else:
            for step in range(begin, end - 1):
                acc = multiply_step(acc, step != begin, ws, xs, full, slot, phase, HALF, s, inverse, weights)
                s, s_next = s_next, gl.load(scale_at + gl.minimum(step + 2, steps - 1) // GROUP_STEPS)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = advance(slot, phase, STAGES)
        acc = multiply_step(acc, begin != end - 1, ws, xs, full, slot, phase, HALF, s, inverse, weights)
        if not EARLY:
            c, up_s, u = of_rows(n0, last, last16, channel, up, up_scale, N, R)
        if AHEAD:
            place, scale_at, unit, s, s_next = _item(
                gl.minimum(i + 1, own - 1), HALF, weights, scale, channel, whole, parts, tiles_n, tiles_m, steps, N,
                BM, GROUP_STEPS, SPLIT,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        if BEHIND:
            mbarrier.arrive(empty.index(before), count=1)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)

        finish = True
        counter = counters + 2 * (low_tiles + tile - whole) + HALF
        first = low_tiles * low_parts + (tile - whole) * of
        if SHARES > 1:
            layout: gl.constexpr = last if INT else last16
            acc = exchange_parts(acc, first, part, partials, counter, HALF, BM, SHARES, layout)
        elif SPLIT:
            if of > 1:
                finish, acc = add_parts(acc, 2 * first + HALF, part, of, partials, counter, 2, BM)
        if R > 0:
            mbarrier.wait(t_full, t_phase)
            t_phase ^= 1
        if finish:
            # With a low rank in units of up_scale, so that up @ t is added by the tensor cores: to one piece, while
            # the other is scaled and stored.
            pieces = (acc,) if PIECES == 1 else halves(acc)
            sums = ()
            for j in gl.static_range(PIECES):
                y = gl.convert_layout(pieces[j].to(gl.float32), last, assert_trivial=True)
                y *= gl.expand_dims(c / up_s if R > 0 else c, 1)
                if INT:
                    y *= gl.expand_dims(gl.convert_layout(x_factors[j], gl.SliceLayout(0, last)), 0)
                if R > 0:
                    u_low, u_high = ((u << 4) >> 4).to(out), (u >> 4).to(out)
                    t_even, t_odd = ts.index(0).slice(j * PIECE, PIECE), ts.index(1).slice(j * PIECE, PIECE)
                    y = gl.convert_layout(y, last16, assert_trivial=True)
                    y = warpgroup_mma(u_low, t_even.permute((1, 0)), y, is_async=True)
                    y = warpgroup_mma(u_high, t_odd.permute((1, 0)), y, is_async=True)
                sums = sums + (y,)
            for j in gl.static_range(PIECES):
                y = sums[j]
                if R > 0:
                    y = warpgroup_mma_wait(2 * (PIECES - 1 - j), deps=[y])
                    y = gl.convert_layout(y, last, assert_trivial=True) * gl.expand_dims(up_s, 1)
                if HAS_BIAS:
                    n = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, last)), N - 1)
                    y += gl.expand_dims(gl.load(bias + n).to(gl.float32), 1)
                if HAS_ADDEND:
                    if j > 0:
                        tma.store_wait(0)
                        thread_barrier()
                        mbarrier.expect(a_bar, PIECE * 64 * 2)
                        tma_load(a_desc, [m_y + j * PIECE, n0], a_bar, y_own)
                    mbarrier.wait(a_bar, a_phase)
                    a_phase ^= 1
                    y += y_own.permute((1, 0)).load(y.type.layout).to(gl.float32)
                else:
                    tma.store_wait(0)
                thread_barrier()
                store_y(y, y_own, y_desc, m_y + j * PIECE, n0)
        elif HAS_ADDEND:
            mbarrier.wait(a_bar, a_phase)
            a_phase ^= 1
        if R > 0:
            mbarrier.arrive(t_empty, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "low_parts", "whole", "parts"])
def twin_wgmma(
    w_desc, x_desc, t_desc, y_desc, a_desc, d_desc, l_desc, scale, channel, x_scale, up, up_scale, down_scale,
    low_ratio, t, bias, partials, counters, ready, low_parts, whole, parts, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, R: gl.constexpr, LOW: gl.constexpr,
    DOWN_STEPS: gl.constexpr, SPLIT: gl.constexpr, SHARES: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr, PIECES: gl.constexpr, EVEN: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows times BM tokens; y goes out in PIECES. GROUP_STEPS steps of 128 channels share a scale.

    Descriptors: packed weights (N, K/2) int8 in boxes (64, 64); x (T, K) planes, int8 or of the dtype of y, in
    (BM, 64); t (T, R) planes in (BM / SHARES, R/2); y and the addend (T, N) in (BM / SHARES / PIECES, 64).
    SHARES: 1, or the parts of K of every tile, whose programs then exchange them.
    partials: 2 * 64 * BM words a part; counters: 2 a tile that has parts, zero.
    LOW: 0, or how many tiles of 64 rows ``down`` has. Then d_desc is down (R, K/2) in (64, 64), DOWN_STEPS steps share
    a scale of it, and l_desc is what t is made from: x, or the 8-bit integers beside a 4-bit x, whose scale is
    low_ratio times x_scale. Tiles of t (T, R) come in low_parts parts, and ready has a counter for each BM tokens and
    one more, zero.
    EVEN: every part of K has an even number of steps.
    REGISTERS: of a thread of the second warpgroup; the first gets what is left.
    """
    out: gl.constexpr = y_desc.dtype
    INT: gl.constexpr = x_desc.dtype == gl.int8
    AHEAD: gl.constexpr = REGISTERS >= 240 and (INT or R * BM < 128 * 256)  # there is room in registers
    ws = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 64, 64], w_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, BM, 64], x_desc.layout)
    ys = gl.allocate_shared_memory(out, [2, BM // SHARES // PIECES, 64], y_desc.layout)
    ts = gl.allocate_shared_memory(out, [2, BM // SHARES if R > 0 else 8, R // 2 if R > 0 else 32], t_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    a_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, a_full, t_full, t_empty, STAGES, R, HAS_ADDEND)
    if PDL:
        grid_release(T)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale,
                         channel, x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready,
                         low_parts, whole, parts, T, N, K, BM, STAGES, GROUP_STEPS, R, LOW, DOWN_STEPS, SPLIT, SHARES,
                         HAS_BIAS, HAS_ADDEND, PIECES, AHEAD, EVEN, PDL)),
            (_multiply, (1, x_desc, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale,
                         channel, x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready,
                         low_parts, whole, parts, T, N, K, BM, STAGES, GROUP_STEPS, R, LOW, DOWN_STEPS, SPLIT, SHARES,
                         HAS_BIAS, HAS_ADDEND, PIECES, AHEAD, EVEN, PDL)),
            (_copy_tiles, (w_desc, x_desc, t_desc, d_desc, l_desc, ws, xs, ts, full, empty, t_full, t_empty, ready,
                           low_parts, whole, parts, T, N, K, BM, STAGES, R, LOW, SPLIT, SHARES, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
    # fmt: on
