"""What the ``wgmma`` kernels share: which tile and which steps of K a program has, weights unpacked to the register
operand, the sum of a tile's parts, hand-over of t between programs of one launch, and the way of a tile to memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from tqcompile.kernels.gluon_common import thread_barrier, tma_load, tma_store

ROWS = gl.constexpr(128)  # of a tile
BAND = gl.constexpr(8)  # token tiles that run together, so that they share weights and x in the L2 cache

# 4 packed bytes -> the low nibbles times m in $0, the high ones in $1. With u = q + 8 the bytes of u * m + 128 - 8 m
# are q * m + 128 in 0 .. 240: no carries, and flipping the top bits leaves q * m. $3: m; $7: the four 128 - 8 m.
_UNPACK = gl.constexpr("""{ .reg .b32 l, h;
    lop3.b32 l, $2, 0x0F0F0F0F, 0x08080808, 0x6A;
    shr.u32 h, $2, 4; lop3.b32 h, h, 0x0F0F0F0F, 0x08080808, 0x6A;
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
def tile_at(number, tiles_n, tiles_m, BM: gl.constexpr):
    """First row and first token of a tile."""
    band = number // (BAND * tiles_n)
    height = gl.minimum(tiles_m - BAND * band, BAND)
    inside = number % (BAND * tiles_n)
    return (inside // height) * ROWS, (BAND * band + inside % height) * BM


@gluon.jit
def items_of(early, items):
    """(a, b): how many of the ``early`` items, of which the first programs have one more, and of the other items, of
    which the last programs have one more, are this program's."""
    pid, programs = gl.program_id(0), gl.num_programs(0)
    return (early + programs - 1 - pid) // programs, (items + pid) // programs


@gluon.jit
def early_item(i, parts):
    """(tile, part) of this program's i-th early item, for tiles in ``parts`` parts of K."""
    item = gl.program_id(0) + i * gl.num_programs(0)
    return item // parts, item % parts


@gluon.jit
def item_at(i, whole, parts, SPLIT: gl.constexpr):
    """(tile, part, of how many parts of K) of this program's i-th item: first come ``whole`` tiles as they are, then
    with SPLIT the others in ``parts`` parts."""
    item = gl.num_programs(0) - 1 - gl.program_id(0) + i * gl.num_programs(0)
    if SPLIT:
        tile, part, of = item, item * 0, item * 0 + 1
        if item >= whole:
            tile, part, of = whole + (item - whole) // parts, (item - whole) % parts, parts
        return tile, part, of
    return item, 0, 1


@gluon.jit
def init_barriers(
    full, empty, a_full, t_full, t_empty, STAGES: gl.constexpr, R: gl.constexpr, HAS_ADDEND: gl.constexpr
):
    """Those of the ring; of the addend and of t, where there are such. Not those that nobody waits for: the compiler
    would put a warpgroup's scratch where they are, and a barrier that was not invalidated then changes it (about once
    in 10^4 launches of two programs a multiprocessor)."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if HAS_ADDEND:
        for i in gl.static_range(2):
            mbarrier.init(a_full.index(i), count=1)
    if R > 0:
        mbarrier.init(t_full, count=1)
        mbarrier.init(t_empty, count=2)
    fence_async_shared()


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next buffer of the ring."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def int8_operand(w, scale, inverse):
    """Packed bytes (64, 64) -> q * m of the low and of the high nibbles, int8 (64, 64) each. m = scale * inverse."""
    m = (scale.to(gl.float32) * inverse + 0.5).to(gl.int32)
    offset = m * -0x08080808 - 2139062144  # four bytes of 128 - 8 m
    args = [w, gl.expand_dims(m, 1), gl.expand_dims(offset, 1)]
    return gl.inline_asm_elementwise(
        _UNPACK, "=&r,=&r,r,r,r,r,r,r,r,r,r", args, dtype=(gl.int8, gl.int8), is_pure=False, pack=4
    )


@gluon.jit
def float_operand(w, scale, inverse, FLOAT: gl.constexpr):
    """As :func:`int8_operand`, to 16-bit floats."""
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
def multiply_step(acc, more, ws, xs, full, slot, phase, HALF: gl.constexpr, s, inverse, weights: gl.constexpr):
    """Start the products of a step of 128 channels, when its tiles are there; with ``more`` onto acc."""
    mbarrier.wait(full.index(slot), phase)
    w = ws.index(2 * slot + HALF).load(weights)
    low, high = int8_operand(w, s, inverse) if xs.dtype == gl.int8 else float_operand(w, s, inverse, xs.dtype)
    acc = warpgroup_mma(low, xs.index(2 * slot).permute((1, 0)), acc, use_acc=more, is_async=True)
    return warpgroup_mma(high, xs.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def of_rows(n0, mma: gl.constexpr, mma16: gl.constexpr, channel, up, up_scale, N, R: gl.constexpr):
    """Of 64 rows in the layout of the result: the unit and the scale of up; up. The unit where there is no low rank."""
    n = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, mma)), N - 1)
    c = gl.load(channel + n)
    up_s, u = c, c
    if R > 0:
        weights16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
        up_s = gl.load(up_scale + n).to(gl.float32)
        up_row = gl.minimum(n0 + gl.arange(0, 64, gl.SliceLayout(1, weights16)), N - 1)
        up_byte = gl.arange(0, R // 2, gl.SliceLayout(0, weights16))
        at = up + gl.expand_dims(up_row * (R // 2), 1) + gl.expand_dims(up_byte, 0)
        u = gl.load(at).to(gl.int8, bitcast=True)
    return c, up_s, u


@gluon.jit
def _flat(x):
    """(64, W) as one dimension, in the order of the registers: 16 bytes a thread, 512 a warp."""
    ordered = gl.permute(gl.reshape(x, [4, 2, 8, x.shape[1] // 8, 4, 2]), (0, 3, 2, 4, 1, 5))
    return gl.reshape(ordered, [64 * x.shape[1]])


@gluon.jit
def _tile(flat, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Inverse of :func:`_flat`."""
    ordered = gl.permute(gl.reshape(flat, [4, WIDTH // 8, 8, 4, 2, 2]), (0, 4, 2, 1, 3, 5))
    return gl.convert_layout(gl.reshape(ordered, [64, WIDTH]), layout)


@gluon.jit
def halves(x):
    """(64, W) -> its first and its last W / 2 columns, without a move."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def add_parts(acc, first, part, parts, partials, counter, STEP: gl.constexpr, BM: gl.constexpr):
    """Store a part of a tile, acc (64, at most BM) int32 or fp32, as number ``first`` + STEP * part; True and the sum
    of all parts for the warpgroup that stores the last one."""
    WIDTH: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    PLACE: gl.constexpr = 64 * BM
    flat = _flat(acc)
    at = gl.arange(0, 64 * WIDTH, flat.type.layout)
    partials = partials.to(gl.pointer_type(acc.dtype), bitcast=True)
    gl.store(partials + (first + STEP * part).to(gl.int64) * PLACE + at, flat)
    thread_barrier()  # all stores come before the one thread's release
    is_last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        if acc.dtype != gl.int32:  # in one order; integers need none, and keep their own part in registers
            flat = gl.zeros_like(flat)
        for other in range(parts):
            if (other != part) | (acc.dtype != gl.int32):
                theirs = (first + STEP * other).to(gl.int64) * PLACE
                flat += gl.load(partials + theirs + at, cache_modifier=".cg")
        gl.store(counter, 0)  # clean for the next launch and for graph replay
    return is_last, _tile(flat, WIDTH, LAYOUT)


@gluon.jit
def exchange_parts(
    acc, first, part, partials, counter, HALF: gl.constexpr, BM: gl.constexpr, SHARES: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Of a tile in SHARES (2 or 4) parts of K every program gets the sum of the share of the tokens that has its own
    number: (64, BM / SHARES) in ``layout``. They wait for each other, so a program may have no other tile. As they are
    neighbours, and a GPU starts the programs of a launch in order, their turn comes whatever else is running."""
    WIDTH: gl.constexpr = BM // SHARES
    PLACE: gl.constexpr = 64 * BM
    shares = halves(acc)
    if SHARES == 4:
        shares = halves(shares[0]) + halves(shares[1])
    partials = partials.to(gl.pointer_type(acc.dtype), bitcast=True)
    own = (2 * (first + part) + HALF).to(gl.int64) * PLACE
    mine = _flat(shares[0])
    at = gl.arange(0, 64 * WIDTH, mine.type.layout)
    for j in gl.static_range(SHARES):
        flat = _flat(shares[j])
        if part == j:
            mine = flat
        else:
            gl.store(partials + own + j * 64 * WIDTH + at, flat)
    thread_barrier()  # all stores come before the one thread's release
    gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    _await(counter, SHARES)
    theirs = partials + (2 * first + HALF).to(gl.int64) * PLACE + part * 64 * WIDTH
    for other in gl.static_range(SHARES):
        if part != other:
            mine += gl.load(theirs + other * 2 * PLACE + at, cache_modifier=".cg")
    if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == 2 * SHARES - 1:
        gl.store(counter, 0)  # nobody waits any more; clean for the next launch and for graph replay
    return _tile(mine, WIDTH, layout)


@gluon.jit
def _await(counter, arrivals):
    """Wait until the counter has come to ``arrivals``; what was stored before can then be loaded."""
    gl.inline_asm_elementwise(
        """{ .reg .pred early; .reg .b32 value;
        again: ld.acquire.gpu.global.b32 value, [$1];
        setp.lt.s32 early, value, $2;
        @early bra again;
        mov.b32 $0, value; }""",
        "=r,l,r", [counter.to(gl.int64, bitcast=True), arrivals], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _async_proxy(counter):
    """Between accesses to global memory and those of TMA."""
    gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, 0;", "=r,l", [counter.to(gl.int64, bitcast=True)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def give_t(total, m, r, x_scale, t, counter, T, R: gl.constexpr, INT: gl.constexpr):
    """Store total (64, tokens), elements r of tokens m of t (T, R), in plane order; then one more on the counter."""
    if INT:
        total *= gl.expand_dims(gl.load(x_scale + m, mask=m < T, other=0.0), 0)
    at = gl.expand_dims(m * R, 0) + gl.expand_dims(r % 2 * (R // 2) + r // 2, 1)
    gl.store(t + at, total.to(t.dtype.element_ty), mask=gl.expand_dims(m < T, 0) & gl.expand_dims(r < R, 1))
    _async_proxy(counter)
    thread_barrier()  # all stores come before the one thread's release
    gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@gluon.jit
def await_t(counter, givers):
    """Wait until ``givers`` warpgroups have given their t, which can then be copied with TMA."""
    _await(counter, givers)
    _async_proxy(counter)


@gluon.jit
def copy_t(t_desc, ts, m, full, empty, phase, TOKENS: gl.constexpr, R: gl.constexpr):
    """Both planes of t of TOKENS tokens from m on, when the tile before needs what is in ts no more."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, TOKENS * R * 2)
    tma_load(t_desc, [m, 0], full, ts.index(0))
    tma_load(t_desc, [m, R // 2], full, ts.index(1))


@gluon.jit
def reset_after_all(counters, number):
    """The last program to come here sets the counters to zero, for the next launch and for graph replay, and so the one
    behind them, which counts the programs."""
    if gl.atomic_add(counters + number, 1, sem="acq_rel", scope="gpu") == gl.num_programs(0) - 1:
        for i in range(number + 1):
            gl.store(counters + i, 0)


@gluon.jit
def store_y(y, y_own, y_desc, m, n):
    """y (64, tokens) to rows m .. and columns n .. of y_desc, through y_own, which nobody reads any more."""
    y_own.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    thread_barrier()
    tma_store(y_desc, [m, n], y_own)
