"""Gluon kernel of ``tqcompile::twin_gemm`` on Hopper for up to 16 tokens: memory to shared memory by TMA, then
``mma.sync``.

y^T = W x^T as in ``twin_wgmma``: one warp copies tiles of packed weights, of x and of t through a ring of STAGES
buffers, two warpgroups each unpack 64 of a tile's 128 rows, group scales are a row's number times an integer, and an
int32 sum lives over all of K. So few tokens leave tensor cores idle; what counts is the time and the instructions of a
step. A buffer therefore holds 256 channels, whose halves and whose low and high nibbles do not wait for each other.

With LOW the kernel makes t itself, as ``twin_wgmma`` does; here each warpgroup takes one half of every buffer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tqcompile.kernels.gluon_common import grid_release, grid_wait, thread_barrier, tma_load
from tqcompile.kernels.wgmma_tiles import (
    ROWS,
    add_parts,
    advance,
    await_t,
    copy_t,
    early_item,
    give_t,
    init_barriers,
    int8_operand,
    item_at,
    items_of,
    of_rows,
    reset_after_all,
    store_y,
    tile_at,
)

BYTES = gl.constexpr(128)  # of a row of weights in a buffer: 256 channels


@gluon.jit
def _copy_tiles(
    w_desc, x_desc, t_desc, d_desc, l_desc, ws, xs, ts, full, empty, t_full, t_empty, ready, low_parts, parts, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr, LOW: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp. Beyond K come zeros for weights, so what comes for x does not count."""
    steps, tiles_n, tiles_m = (K // 2 + BYTES - 1) // BYTES, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    own_low, own = items_of(LOW * tiles_m * low_parts, tiles_n * tiles_m * parts)
    slot = 0
    phase = 1
    t_phase = 1
    for i in range(own_low + own):
        tile, part, of = item_at(i - own_low, 0, parts, SPLIT)
        n0, m0 = tile_at(tile, tiles_n, tiles_m, BM)
        of_t = i < own_low
        from_desc = x_desc
        if LOW > 0:
            if of_t:
                from_desc = l_desc
                tile, part = early_item(i, low_parts)
                n0, m0, of = tile % LOW * 64, tile // LOW * BM, low_parts
        begin = steps * part // of
        for step in range(begin, steps * (part + 1) // of):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, (ROWS + 2 * BM) * BYTES)
            if of_t:
                tma_load(d_desc, [n0, step * BYTES], bar, ws.index(slot))
            else:
                tma_load(w_desc, [n0, step * BYTES], bar, ws.index(slot))
            if PDL:
                if (i == 0) & (step == begin):  # the weights do not depend on the kernel before, x and t do
                    grid_wait(step)
            tma_load(from_desc, [m0, step * BYTES], bar, xs.index(2 * slot))
            tma_load(from_desc, [m0, K // 2 + step * BYTES], bar, xs.index(2 * slot + 1))
            slot, phase = advance(slot, phase, STAGES)
        if R > 0:
            if i >= own_low:
                if LOW > 0:
                    await_t(ready + m0 // BM, LOW)
                copy_t(t_desc, ts, m0, t_full, t_empty, t_phase, BM, R)
                t_phase ^= 1
    if LOW > 0:
        reset_after_all(ready, tiles_m)


@gluon.jit
def _product(w, xs, slot, acc, PLANE: gl.constexpr, HALF: gl.constexpr):
    """acc + w (64, 64) times half of a buffer's plane of x."""
    layout: gl.constexpr = gl.DotOperandLayout(1, acc.type.layout, 4)
    return mma_v2(w, xs.index(2 * slot + PLANE).slice(HALF * 64, 64, dim=1).permute((1, 0)).load(layout), acc)


@gluon.jit
def _let_go(bar):
    """The buffer may be filled again. No product has waited for what was read from it, so a warp could be a copy behind
    its own loads; the fence waits for them."""
    fence_async_shared()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _multiply_down(
    HALF: gl.constexpr, mma: gl.constexpr, weights: gl.constexpr, ws, xs, full, empty, x_scale, low_ratio, down_scale,
    t, partials, counters, ready, slot, phase, tile, part, parts, T, K,
    BM: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr, LOW: gl.constexpr, DOWN_STEPS: gl.constexpr,
):  # fmt: skip
    """A warpgroup's share of a part of a tile of t: 64 rows of down, half of the channels. Returns slot and phase."""
    n0, m0 = tile % LOW * 64, tile // LOW * BM
    steps, groups = (K // 2 + BYTES - 1) // BYTES, K // 128 // DOWN_STEPS
    begin, end = steps * part // parts, steps * (part + 1) // parts
    one = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, weights))
    r = n0 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    scale_at = down_scale + gl.minimum(r, R - 1) * groups
    s = gl.load(scale_at + gl.minimum((2 * begin + HALF) // DOWN_STEPS, groups - 1))
    total = gl.zeros([64, BM], gl.float32, mma)
    for step in range(begin, end):
        s_next = gl.load(scale_at + gl.minimum((2 * step + 2 + HALF) // DOWN_STEPS, groups - 1))
        mbarrier.wait(full.index(slot), phase)
        w = ws.index(slot).slice(0, 64, dim=0).slice(64 * HALF, 64, dim=1).load(weights)
        low, high = int8_operand(w, one, one)
        acc = _product(low, xs, slot, gl.zeros([64, BM], gl.int32, mma), 0, HALF)
        acc = _product(high, xs, slot, acc, 1, HALF)
        _let_go(empty.index(slot))
        total += acc.to(gl.float32) * gl.expand_dims(s.to(gl.float32), 1)
        s = s_next
        slot, phase = advance(slot, phase, STAGES)
    first = 2 * tile * parts
    finish, total = add_parts(total, first, 2 * part + HALF, 2 * parts, partials, counters + 2 * tile, 1, BM)
    if finish:
        m = m0 + gl.arange(0, BM, gl.SliceLayout(0, mma))
        give_t(total * low_ratio, m, r, x_scale, t, ready + tile // LOW, T, R, True)
    return slot, phase


@gluon.jit
def _scales_at(scale_at, step, groups, GROUP_STEPS: gl.constexpr, PAIRS: gl.constexpr):
    """fp32 scales of both halves of a step. PAIRS: neighbours of type bfloat16, read as one word."""
    if PAIRS:
        pair = gl.load(scale_at + step)
        return (pair << 16).to(gl.float32, bitcast=True), (pair & -65536).to(gl.float32, bitcast=True)
    first = gl.load(scale_at + 2 * step // GROUP_STEPS).to(gl.float32)
    return first, gl.load(scale_at + gl.minimum((2 * step + 1) // GROUP_STEPS, groups - 1)).to(gl.float32)


@gluon.jit
def _multiply(
    HALF: gl.constexpr, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full,
    scale, channel, x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready, low_parts, parts,
    T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, PAIRS: gl.constexpr, R: gl.constexpr,
    LOW: gl.constexpr, DOWN_STEPS: gl.constexpr, SPLIT: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows HALF * 64 .. of every tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    tokens16: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    out: gl.constexpr = y_desc.dtype
    steps, tiles_n, tiles_m = (K // 2 + BYTES - 1) // BYTES, (N + ROWS - 1) // ROWS, (T + BM - 1) // BM
    groups, low_tiles = K // 128 // GROUP_STEPS, LOW * tiles_m
    own_low, own = items_of(low_tiles * low_parts, tiles_n * tiles_m * parts)
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
            slot, phase = _multiply_down(
                HALF, mma, weights, ws, xs, full, empty, x_scale, low_ratio, down_scale, t, partials, counters, ready,
                slot, phase, tile, part, low_parts, T, K, BM, STAGES, R, LOW, DOWN_STEPS,
            )  # fmt: skip
    for i in range(own):
        tile, part, of = item_at(i, 0, parts, SPLIT)
        begin, end = steps * part // of, steps * (part + 1) // of
        n0, m0 = tile_at(tile, tiles_n, tiles_m, BM)
        n0 += HALF * 64
        # From memory these take as long as several steps.
        row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights)), N - 1)
        scale_at = scale + row * groups
        if PAIRS:
            scale_at = scale.to(gl.pointer_type(gl.int32), bitcast=True) + row * (groups // 2)
        inverse = 1.0 / gl.load(channel + row)
        s0, s1 = _scales_at(scale_at, begin, groups, GROUP_STEPS, PAIRS)
        c, up_s, u = of_rows(n0, mma, mma, channel, up, up_scale, N, R)
        if HAS_ADDEND:
            # It waits where y will stand; the store of the tile before has been read by now.
            tma.store_wait(0)
            thread_barrier()
            mbarrier.expect(a_bar, BM * 64 * 2)
            tma_load(a_desc, [m0, n0], a_bar, y_own)

        mbarrier.wait(full.index(slot), phase)  # when x is there, so is its scale
        token = m0 + gl.arange(0, BM, gl.SliceLayout(0, mma))
        x_factor = gl.load(x_scale + token, mask=token < T, other=0.0)
        low_sum = gl.zeros([64, BM], gl.int32, mma)
        high_sum = gl.zeros([64, BM], gl.int32, mma)
        for step in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            w = ws.index(slot).slice(HALF * 64, 64, dim=0)
            low0, high0 = int8_operand(w.slice(0, 64, dim=1).load(weights), s0, inverse)
            low1, high1 = int8_operand(w.slice(64, 64, dim=1).load(weights), s1, inverse)
            s0, s1 = _scales_at(scale_at, gl.minimum(step + 1, steps - 1), groups, GROUP_STEPS, PAIRS)
            low_sum = _product(low0, xs, slot, low_sum, 0, 0)
            high_sum = _product(high0, xs, slot, high_sum, 1, 0)
            low_sum = _product(low1, xs, slot, low_sum, 0, 1)
            high_sum = _product(high1, xs, slot, high_sum, 1, 1)
            _let_go(empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)

        acc = low_sum + high_sum
        finish = True
        if SPLIT:
            first, counter = 2 * (low_tiles * low_parts + tile * of) + HALF, counters + 2 * (low_tiles + tile) + HALF
            finish, acc = add_parts(acc, first, part, of, partials, counter, 2, BM)
        if R > 0:
            mbarrier.wait(t_full, t_phase)
            t_phase ^= 1
        if finish:
            y = acc.to(gl.float32) * gl.expand_dims(c, 1) * gl.expand_dims(x_factor, 0)
            if R > 0:
                u_low, u_high = ((u << 4) >> 4).to(out), (u >> 4).to(out)
                z = gl.zeros([64, BM], gl.float32, mma)
                z = mma_v2(u_low, ts.index(0).permute((1, 0)).load(tokens16), z)
                z = mma_v2(u_high, ts.index(1).permute((1, 0)).load(tokens16), z)
                y += z * gl.expand_dims(up_s, 1)
            if HAS_BIAS:
                n = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, mma)), N - 1)
                y += gl.expand_dims(gl.load(bias + n).to(gl.float32), 1)
            if HAS_ADDEND:
                mbarrier.wait(a_bar, a_phase)
                y += y_own.permute((1, 0)).load(mma).to(gl.float32)
            else:
                tma.store_wait(0)
            thread_barrier()
            store_y(y, y_own, y_desc, m0, n0)
        elif HAS_ADDEND:
            mbarrier.wait(a_bar, a_phase)
        a_phase ^= 1
        if R > 0:
            _let_go(t_empty)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "low_parts", "parts"])
def twin_narrow(
    w_desc, x_desc, t_desc, y_desc, a_desc, d_desc, l_desc, scale, channel, x_scale, up, up_scale, down_scale,
    low_ratio, t, bias, partials, counters, ready, low_parts, parts, T, N, K,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP_STEPS: gl.constexpr, PAIRS: gl.constexpr, R: gl.constexpr,
    LOW: gl.constexpr, DOWN_STEPS: gl.constexpr, SPLIT: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows times BM tokens, in ``parts`` parts of K with SPLIT. GROUP_STEPS times 128 channels share a
    scale; PAIRS: bfloat16 scales, one for each 128 channels, an even number of them.

    Descriptors: packed weights (N, K/2) int8 in boxes (128, 128); x (T, K) int8 planes in (BM, 128); t (T, R) planes in
    (BM, R / 2); y and the addend (T, N) in (BM, 64). partials: 2 * 64 * BM words a part of a tile or of t; counters: 2
    a tile of t and a tile, zero. LOW, low_parts, low_ratio, DOWN_STEPS, ready, REGISTERS: as in ``twin_wgmma``; d_desc
    is down (R, K/2) in boxes (128, 128), l_desc like x_desc.
    """
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, BYTES], w_desc.layout)
    xs = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BM, BYTES], x_desc.layout)
    ts = gl.allocate_shared_memory(y_desc.dtype, [2, BM, R // 2 if R > 0 else 32], t_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [2, BM, 64], y_desc.layout)
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
            (_multiply, (0, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale, channel,
                         x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready, low_parts,
                         parts, T, N, K, BM, STAGES, GROUP_STEPS, PAIRS, R, LOW, DOWN_STEPS, SPLIT, HAS_BIAS,
                         HAS_ADDEND, PDL)),
            (_multiply, (1, y_desc, a_desc, ws, xs, ts, ys, full, empty, t_full, t_empty, a_full, scale, channel,
                         x_scale, up, up_scale, down_scale, low_ratio, t, bias, partials, counters, ready, low_parts,
                         parts, T, N, K, BM, STAGES, GROUP_STEPS, PAIRS, R, LOW, DOWN_STEPS, SPLIT, HAS_BIAS,
                         HAS_ADDEND, PDL)),
            (_copy_tiles, (w_desc, x_desc, t_desc, d_desc, l_desc, ws, xs, ts, full, empty, t_full, t_empty, ready,
                           low_parts, parts, T, N, K, BM, STAGES, R, LOW, SPLIT, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
    # fmt: on
