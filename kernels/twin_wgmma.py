"""Gluon kernel of ``tqcompile::twin_gemm`` on Hopper: int8 ``wgmma`` with the 4-bit weights as register operand.

y^T = W x^T. A program has three warp-specialised parts: one warp copies tiles of packed weights, of x and of t with
TMA through a ring of STAGES buffers; two warpgroups each take 64 of a tile's 128 rows, unpack their weights in
registers and multiply. While one unpacks, the tensor cores work for the other.

Group scales are a row's number times an integer m in 1 .. 16 (``channel_scale``), and q * m fits in int8. So the
unpacking multiplies by m, the sum stays in int32 over all of K, and only the epilogue scales: x_scale, channel
scale, ``up @ t`` in 16-bit floats with fp32 sums, bias, addend.

Programs are persistent. Where whole tiles do not fill the GPU, K is cut (SPLIT): the parts of a tile go to global
memory as int32, and the last program to arrive adds them. Integer sums are exact, so bits do not depend on timing.
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

_UNPACK = gl.constexpr("""{ .reg .b32 l, h;
    and.b32 l, $2, 0x0F0F0F0F; xor.b32 l, l, 0x08080808;
    shr.u32 h, $2, 4; and.b32 h, h, 0x0F0F0F0F; xor.b32 h, h, 0x08080808;
    mad.lo.u32 l, l, $3, $7; mad.lo.u32 h, h, $3, $7;
    xor.b32 $0, l, 0x80808080; xor.b32 $1, h, 0x80808080; }""")


@gluon.jit
def _tile_of(tile, tiles_n, tiles_m, BM: gl.constexpr, BAND: gl.constexpr):
    """First row and token of a tile. Bands of BAND token tiles: tiles that run together share weights and x in L2."""
    band = tile // (BAND * tiles_n)
    height = gl.minimum(tiles_m - BAND * band, BAND)
    inside = tile % (BAND * tiles_n)
    return (inside // height) * 128, (BAND * band + inside % height) * BM


@gluon.jit
def _plan(T, N, steps, whole, BM: gl.constexpr, SPLIT: gl.constexpr):
    """(tiles_n, tiles_m, shared, first, last, parts): what this program does.

    ``whole`` tiles a program are its own; the other tiles are cut evenly, in K steps, over all programs: this one
    takes steps first .. last of the ``shared`` ones. parts: tiles it works on, whole or not.
    """
    tiles_n = (N + 127) // 128
    tiles_m = (T + BM - 1) // BM
    if not SPLIT:
        whole = (tiles_n * tiles_m - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
        return tiles_n, tiles_m, whole, 1, 0, 0, whole
    shared = (tiles_n * tiles_m - whole * gl.num_programs(0)) * steps
    first = shared * gl.program_id(0) // gl.num_programs(0)
    last = shared * (gl.program_id(0) + 1) // gl.num_programs(0)
    parts = whole
    if last > first:
        parts += (last - 1) // steps - first // steps + 1
    return tiles_n, tiles_m, whole, shared, first, last, parts


@gluon.jit
def _part(i, steps, whole, first, last):
    """(tile, number among the shared tiles, first step, last step) of the i-th tile of this program."""
    tile = gl.program_id(0) + i * gl.num_programs(0)
    number = 0
    begin = 0
    end = steps
    if i >= whole:
        number = first // steps + i - whole
        tile = whole * gl.num_programs(0) + number
        begin = gl.maximum(first - number * steps, 0)
        end = gl.minimum(last - number * steps, steps)
    return tile, number, begin, end


@gluon.jit
def _operand(w, scale, inverse):
    mult = (scale.to(gl.float32) * inverse + 0.5).to(gl.int32)
    offset = mult * -0x08080808 + -2139062144
    m2 = gl.expand_dims(mult, 1)
    o2 = gl.expand_dims(offset, 1)
    return gl.inline_asm_elementwise(
        _UNPACK, "=&r,=&r,r,r,r,r,r,r,r,r,r", [w, m2, o2], dtype=(gl.int8, gl.int8), is_pure=False, pack=4
    )


@gluon.jit
def _produce(
    w_desc,
    x_desc,
    t_desc,
    ws,
    xs,
    ts,
    full,
    empty,
    t_full,
    t_empty,
    T,
    N,
    K,
    whole,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    SUB: gl.constexpr,
    PACK: gl.constexpr,
    R: gl.constexpr,
    SPLIT: gl.constexpr,
    BAND: gl.constexpr,
    PDL: gl.constexpr,
):
    BYTES: gl.constexpr = SUB * (128 * 64 + 2 * BM * 64)
    steps = K // (128 * SUB)
    tiles_n, tiles_m, whole, shared, first, last, parts = _plan(T, N, steps, whole, BM, SPLIT)
    slot = 0
    phase = 1
    for i in range(parts):
        tile, number, begin, end = _part(i, steps, whole, first, last)
        n0, m0 = _tile_of(tile, tiles_n, tiles_m, BM, BAND)
        for step in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            for j in gl.static_range(SUB // PACK):
                at = (step * SUB + j * PACK) * 64
                tma.async_copy_global_to_shared(w_desc, [n0, at], bar, ws.index((slot * (SUB // PACK) + j) * 2))
                tma.async_copy_global_to_shared(
                    w_desc, [n0 + 64, at], bar, ws.index((slot * (SUB // PACK) + j) * 2 + 1)
                )
            if PDL:
                if (i == 0) & (step == begin):
                    grid_wait(step)
            for j in gl.static_range(SUB // PACK):
                at = (step * SUB + j * PACK) * 64
                tma.async_copy_global_to_shared(x_desc, [m0, at], bar, xs.index((slot * (SUB // PACK) + j) * 2))
                tma.async_copy_global_to_shared(
                    x_desc, [m0, K // 2 + at], bar, xs.index((slot * (SUB // PACK) + j) * 2 + 1)
                )
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if R > 0:
            # After the tile's other copies: what was in ``ts`` is read until the end of the tile before.
            mbarrier.wait(t_empty, (i & 1) ^ 1)
            mbarrier.expect(t_full, BM * R * 2)
            tma.async_copy_global_to_shared(t_desc, [m0, 0], t_full, ts.index(0))
            tma.async_copy_global_to_shared(t_desc, [m0, R // 2], t_full, ts.index(1))


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    y_desc,
    ws,
    xs,
    ts,
    ys,
    full,
    empty,
    t_full,
    t_empty,
    scale,
    channel,
    x_scale,
    up,
    up_scale,
    bias,
    addend,
    partials,
    counters,
    T,
    N,
    K,
    whole,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    SUB: gl.constexpr,
    PACK: gl.constexpr,
    GROUP_STEPS: gl.constexpr,
    R: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr,
    PARTS: gl.constexpr,
    SPLIT: gl.constexpr,
    BAND: gl.constexpr,
):
    MN: gl.constexpr = BM if BM < 128 else 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MN, 32])
    mma16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MN, 16])
    opa: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    opa16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
    rows: gl.constexpr = gl.SliceLayout(1, opa)
    out_rows: gl.constexpr = gl.SliceLayout(1, mma)
    out_cols: gl.constexpr = gl.SliceLayout(0, mma)
    out: gl.constexpr = y_desc.dtype

    steps = K // (128 * SUB)
    groups = K // (128 * GROUP_STEPS)
    tiles_n, tiles_m, whole, shared, first, last, parts = _plan(T, N, steps, whole, BM, SPLIT)
    y_own = ys.index(HALF)
    slot = 0
    phase = 0
    for i in range(parts):
        tile, number, begin, end = _part(i, steps, whole, first, last)
        n_tile, m0 = _tile_of(tile, tiles_n, tiles_m, BM, BAND)
        n0 = n_tile + HALF * 64
        row = gl.minimum(n0 + gl.arange(0, 64, rows), N - 1)
        scale_at = scale + row * groups
        inverse = 1.0 / gl.load(channel + row)
        n = n0 + gl.arange(0, 64, out_rows)
        n_safe = gl.minimum(n, N - 1)
        # What the epilogue needs of the weights, early: from memory it takes as long as several steps.
        c = gl.load(channel + n_safe)
        if R > 0:
            u_s = gl.load(up_scale + n_safe).to(gl.float32)
            urow = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, opa16)), N - 1)
            ucol = gl.arange(0, R // 2, gl.SliceLayout(0, opa16))
            u = gl.load(up + gl.expand_dims(urow * (R // 2), 1) + gl.expand_dims(ucol, 0)).to(gl.int8, bitcast=True)
        top = K // 128 - 1
        s = ()
        s_next = ()
        for j in gl.static_range(SUB):
            s = s + (gl.load(scale_at + (begin * SUB + j) // GROUP_STEPS),)
            s_next = s_next + (gl.load(scale_at + gl.minimum(begin * SUB + SUB + j, top) // GROUP_STEPS),)
        acc = gl.zeros([64, BM], gl.int32, mma)
        for step in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            # One warpgroup unpacks while the tensor cores work for the other.
            for j in gl.static_range(SUB):
                box = (slot * (SUB // PACK) + j // PACK) * 2
                packed = ws.index(box + HALF).slice((j % PACK) * 64, 64, dim=1)
                even = xs.index(box).slice((j % PACK) * 64, 64, dim=1).permute((1, 0))
                odd = xs.index(box + 1).slice((j % PACK) * 64, 64, dim=1).permute((1, 0))
                low, high = _operand(packed.load(opa), s[j], inverse)
                acc = warpgroup_mma(low, even, acc, use_acc=(step != begin) | (j > 0), is_async=True)
                acc = warpgroup_mma(high, odd, acc, is_async=True)
            s = s_next
            s_next = ()
            for j in gl.static_range(SUB):
                s_next = s_next + (gl.load(scale_at + gl.minimum((step + 2) * SUB + j, top) // GROUP_STEPS),)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1

        m = m0 + gl.arange(0, BM, out_cols)
        finish = True
        if SPLIT:
            if end - begin < steps:
                # int32 sums are exact: the order in which the parts of a tile arrive does not matter.
                c_low = ((number * steps + 1) * gl.num_programs(0) - 1) // shared
                c_high = ((number * steps + steps) * gl.num_programs(0) - 1) // shared
                block: gl.constexpr = 64 * BM
                # In the order of the registers: 16 bytes a thread, 512 a warp.
                flat = gl.reshape(gl.permute(gl.reshape(acc, [4, 2, 8, BM // 8, 4, 2]), (0, 3, 2, 4, 1, 5)), [block])
                at = gl.arange(0, block, flat.type.layout)
                mine = gl.program_id(0) * 2 + (number != first // steps).to(gl.int32)
                gl.store(partials + (mine * 2 + HALF).to(gl.int64) * block + at, flat)
                gl.thread_barrier()
                arrived = gl.atomic_add(counters + 2 * number + HALF, 1, sem="acq_rel", scope="gpu")
                finish = arrived == c_high - c_low
                if finish:
                    for other in range(c_low, c_high + 1):
                        if other != gl.program_id(0):
                            theirs = other * 2 + (number != shared * other // gl.num_programs(0) // steps).to(gl.int32)
                            flat += gl.load(
                                partials + (theirs * 2 + HALF).to(gl.int64) * block + at, cache_modifier=".cg"
                            )
                    gl.store(counters + 2 * number + HALF, 0)
                    acc = gl.convert_layout(
                        gl.reshape(
                            gl.permute(gl.reshape(flat, [4, BM // 8, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5)), [64, BM]
                        ),
                        mma,
                    )
        if R > 0:
            mbarrier.wait(t_full, i & 1)
        if finish:
            x_s = gl.load(x_scale + m, mask=m < T, other=0.0)
            if R > 0:
                y = acc.to(gl.float32) * gl.expand_dims(c / u_s, 1) * gl.expand_dims(x_s, 0)
                u_low = ((u << 4) >> 4).to(out)
                u_high = (u >> 4).to(out)
                y = gl.convert_layout(y, mma16)
                y = warpgroup_mma(u_low, ts.index(0).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma(u_high, ts.index(1).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma_wait(0, deps=[y])
                y = gl.convert_layout(y, mma) * gl.expand_dims(u_s, 1)
            else:
                y = acc.to(gl.float32) * gl.expand_dims(c, 1) * gl.expand_dims(x_s, 0)
            if HAS_BIAS:
                y += gl.expand_dims(gl.load(bias + n_safe).to(gl.float32), 1)
            if HAS_ADDEND:
                live = gl.expand_dims(m < T, 0) & gl.expand_dims(n < N, 1)
                y += gl.load(
                    addend + gl.expand_dims(m.to(gl.int64) * N, 0) + gl.expand_dims(n, 1), mask=live, other=0.0
                ).to(gl.float32)
            yo = y.to(out)
            if PARTS == 1:
                tma.store_wait(0)
                gl.thread_barrier()
                y_own.permute((1, 0)).store(yo)
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(y_desc, [m0, n0], y_own)
            else:
                a, b = gl.split(gl.permute(gl.reshape(yo, [64, 2, BM // 2]), (0, 2, 1)))
                tma.store_wait(0)
                gl.thread_barrier()
                y_own.permute((1, 0)).store(a)
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(y_desc, [m0, n0], y_own)
                tma.store_wait(0)
                gl.thread_barrier()
                y_own.permute((1, 0)).store(b)
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(y_desc, [m0 + BM // 2, n0], y_own)
        if R > 0:
            mbarrier.arrive(t_empty, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "whole"])
def twin_wgmma(
    w_desc,
    x_desc,
    t_desc,
    y_desc,
    scale,
    channel,
    x_scale,
    up,
    up_scale,
    bias,
    addend,
    partials,
    counters,
    T,
    N,
    K,
    whole,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    SUB: gl.constexpr,
    PACK: gl.constexpr,
    GROUP_STEPS: gl.constexpr,
    R: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_ADDEND: gl.constexpr,
    PARTS: gl.constexpr,
    SPLIT: gl.constexpr,
    BAND: gl.constexpr,
    REGS: gl.constexpr,
    PDL: gl.constexpr,
):
    out: gl.constexpr = y_desc.dtype
    ws = gl.allocate_shared_memory(gl.int8, [2 * STAGES * SUB // PACK, 64, 64 * PACK], w_desc.layout)
    xs = gl.allocate_shared_memory(gl.int8, [2 * STAGES * SUB // PACK, BM, 64 * PACK], x_desc.layout)
    ys = gl.allocate_shared_memory(out, [2, BM // PARTS, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ts = gl.allocate_shared_memory(out, [2, BM if R > 0 else 8, R // 2 if R > 0 else 32], t_desc.layout)
    t_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(t_full, count=1)
    mbarrier.init(t_empty, count=2)
    fence_async_shared()
    if PDL:
        grid_release(T)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    y_desc,
                    ws,
                    xs,
                    ts,
                    ys,
                    full,
                    empty,
                    t_full,
                    t_empty,
                    scale,
                    channel,
                    x_scale,
                    up,
                    up_scale,
                    bias,
                    addend,
                    partials,
                    counters,
                    T,
                    N,
                    K,
                    whole,
                    BM,
                    STAGES,
                    SUB,
                    PACK,
                    GROUP_STEPS,
                    R,
                    HAS_BIAS,
                    HAS_ADDEND,
                    PARTS,
                    SPLIT,
                    BAND,
                ),
            ),
            (
                _consume,
                (
                    1,
                    y_desc,
                    ws,
                    xs,
                    ts,
                    ys,
                    full,
                    empty,
                    t_full,
                    t_empty,
                    scale,
                    channel,
                    x_scale,
                    up,
                    up_scale,
                    bias,
                    addend,
                    partials,
                    counters,
                    T,
                    N,
                    K,
                    whole,
                    BM,
                    STAGES,
                    SUB,
                    PACK,
                    GROUP_STEPS,
                    R,
                    HAS_BIAS,
                    HAS_ADDEND,
                    PARTS,
                    SPLIT,
                    BAND,
                ),
            ),
            (
                _produce,
                (
                    w_desc,
                    x_desc,
                    t_desc,
                    ws,
                    xs,
                    ts,
                    full,
                    empty,
                    t_full,
                    t_empty,
                    T,
                    N,
                    K,
                    whole,
                    BM,
                    STAGES,
                    SUB,
                    PACK,
                    R,
                    SPLIT,
                    BAND,
                    PDL,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )
