"""Gluon kernel of ``tqcompile::lattice_linear`` for one token: integer products of codes and x.

Unpacked to bytes, 16 codes of a word cost five instructions (as pairs of floats eighteen): two masks leave two of them
times one and two times four, a shift by four the others. So x is made integer too. A unit of 128 columns becomes a
power of two times integers below 2**22, three signed bytes each: a bfloat16 value down to 2**-14 of the unit's largest
one is exact, and what is lost of a smaller one is below an fp32 rounding of the largest. The three bytes are columns
of an ``mma.sync``: columns 0, 1 and 3 of one unit of a pair and 4, 5 and 7 of the other, with zeros where a lane's
codes belong to the other unit. So 16 bytes of codes a lane, half a unit, serve two groups with one product. Sums of a
unit are exact; scales, zero points and offsets act on them in fp32. Warps share K and meet once, in a fixed order.

Every program makes its own integers, while its first codes are on their way: to registers, or with DEPTH each lane
copies those it will read to shared memory of its own (``cp.async``), so that more can be on their way and the loop
loads no codes. Compiled for sm_90 a weight of 2 bits costs 1.2 instructions in all, with DEPTH 1.3; of the first 0.85
do not make x integer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcompile.kernels.gemv_codes import arrived, ask_for, load_codes, room, twice, unpack
from tqcompile.kernels.gluon_common import grid_release, grid_wait, load_live, thread_barrier
from tqcompile.kernels.twin_skinny import split_columns, store_output

_MMA = gl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)
_DIGITS = gl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $3, $4, 0x5140; prmt.b32 b, $5, $6, 0x5140; "
    "prmt.b32 $2, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; "
    "prmt.b32 a, $3, $4, 0x0062; prmt.b32 b, $5, $6, 0x0062; prmt.b32 $0, a, b, 0x5410; "
    "xor.b32 $1, $1, 0x80808080; xor.b32 $2, $2, 0x80808080; }"
)


@gluon.jit
def _mma(a0, b0, a1, b1, x0, x1, c):
    """c + a product of depth 32: a0, a1: words of row lane/4, b0, b1: of row lane/4 + 8."""
    return gl.inline_asm_elementwise(
        _MMA, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, b0, a1, b1, x0, x1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _of_lanes(v):
    """The sum of the four lanes that share a row."""
    asm: gl.constexpr = """{ .reg .f32 a, b; shfl.sync.bfly.b32 a, $1, 1, 31, -1; add.f32 a, a, $1;
        shfl.sync.bfly.b32 b, a, 2, 31, -1; add.f32 $0, a, b; }"""
    return gl.inline_asm_elementwise(asm, "=f,f", [v], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _columns(v, S: gl.constexpr):
    """(S, 8, 4, 4) -> four tensors (S, 8, 4): row i of a run in tensor i; nothing moves between lanes."""
    even, odd = gl.split(gl.reshape(gl.permute(v, (0, 1, 3, 2)), [S, 8, 4, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def _unit_of_slot(slot, U: gl.constexpr, KS: gl.constexpr, OWN: gl.constexpr):
    """Slots 2 q and 2 q + 1 are pair q / KS of warp q % KS. Returns a unit's number in K, and whether there is one."""
    q = slot // 2
    unit = 2 * (q % KS * OWN + q // KS) + slot % 2
    return unit, (unit < U) & (q // KS < OWN)


@gluon.jit
def _place(runs: gl.constexpr):
    """(1, 1, 4, 4) the number of a column in its run of 16."""
    four = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, runs))))
    one = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, runs))))
    one = gl.expand_dims(gl.expand_dims(gl.expand_dims(one, 0), 1), 2)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(four, 0), 1), 3) * 4 + one


@gluon.jit
def _integers(v, offset, S: gl.constexpr, D: gl.constexpr):
    """v (S, 8, 4, 4) fp32, units of 8 runs of 16 columns. Returns high, middle and low bytes (S, 32), the power of two
    that they are to be multiplied by (S,), and the sum of v, times the offset where there is one (S,)."""
    runs: gl.constexpr = v.type.layout
    largest = gl.max(gl.max(gl.max(v.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 3), 2), 1)
    exponent = gl.maximum(largest >> 23, 32)
    back = ((exponent - 21) << 23).to(gl.float32, bitcast=True)  # 2**(e - 21), of a largest value below 2**(e + 1)
    back = gl.where(largest >= 0x7F800000, float("nan"), back)  # infinite or not a number
    ahead = ((275 - exponent) << 23).to(gl.float32, bitcast=True)
    # Adding 1.5 * 2**23 leaves the integer in the low bits. 0x8080 makes what is below two bytes non-negative.
    wide = v * gl.expand_dims(gl.expand_dims(gl.expand_dims(ahead, 1), 2), 3) + 12582912.0
    a, b, c, d = _columns(wide.to(gl.int32, bitcast=True) + (0x8080 - 0x400000), S)
    high, middle, low = gl.inline_asm_elementwise(
        _DIGITS, "=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )
    if D > 0:
        v = v * gl.load(offset + _place(runs) % D).to(gl.float32)
    shift = gl.sum(gl.sum(gl.sum(v, 3), 2), 1)
    return gl.reshape(high, [S, 32]), gl.reshape(middle, [S, 32]), gl.reshape(low, [S, 32]), back, shift


@gluon.jit
def _make_integer(
    x, offset, digits, factors,
    U: gl.constexpr, KS: gl.constexpr, OWN: gl.constexpr, S: gl.constexpr, W: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Bytes of x to ``digits`` (4, S / 2, 64 words), each unit's power of two and what its shift adds to ``factors``
    (2, S / 2, 2)."""
    P: gl.constexpr = 4 * KS // W  # columns of every four that a lane has
    runs: gl.constexpr = gl.BlockedLayout([1, 1, 4, P], [P, 8, 1, 4 // P], [W, 1, 1, 1], [3, 2, 1, 0])
    of_runs: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, runs))  # (slots, runs)
    unit, live = _unit_of_slot(gl.arange(0, S, gl.SliceLayout(1, of_runs)), U, KS, OWN)
    run = gl.expand_dims(unit, 1) * 128 + gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, of_runs)), 0) * 16
    live = gl.expand_dims(gl.expand_dims(gl.expand_dims(live, 1), 2), 3)
    at = x + gl.expand_dims(gl.expand_dims(run, 2), 3) + _place(runs)
    v = gl.load(at, mask=live, other=0.0).to(gl.float32)
    high, middle, low, back, shift = _integers(v, offset, S, D)
    digits.slice(0, 1, dim=0).store(gl.reshape(high, [1, S // 2, 64]))
    digits.slice(1, 1, dim=0).store(gl.reshape(middle, [1, S // 2, 64]))
    digits.slice(3, 1, dim=0).store(gl.reshape(low, [1, S // 2, 64]))
    factors.index(0).store(gl.reshape(back, [S // 2, 2]))
    factors.index(1).store(gl.reshape(shift, [S // 2, 2]))


@gluon.jit
def _of_pair(digits, start: gl.constexpr, lane, RW: gl.constexpr, KS: gl.constexpr):
    """The 16 words of x of a lane for a pair of units: of column lane / 4 of the product. The first four columns are
    the first unit's, and 0 where a lane reads the second; the last four are the second unit's."""
    # (warps of K, warps of N, columns of one unit or the other, columns, words)
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 16], [1, 1, 2, 4, 4], [KS, RW, 1, 1, 1], [4, 3, 2, 1, 0])
    part = digits.slice(start, KS, dim=1)
    v = part.permute((1, 0, 2)).load(gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    everywhere = gl.zeros([KS, RW, 2, 4, 64], gl.int32, cube)
    v = gl.broadcast(gl.expand_dims(gl.expand_dims(v, 1), 2), everywhere)[0]
    first, second = gl.split(gl.permute(gl.reshape(v, [KS * RW, 32, 2, 8]), (0, 1, 3, 2)))
    flat: gl.constexpr = lane.type.layout
    words = split_columns(first, flat) + split_columns(second, flat)
    found = ()
    for i in gl.static_range(16):
        found = found + (gl.where(lane // 16 == lane % 4 // 2, words[i], 0),)
    return found


@gluon.jit
def _of_lane(factors, which: gl.constexpr, start: gl.constexpr, lane, RW: gl.constexpr, KS: gl.constexpr):
    """(warps, lanes) the factor of the unit that a lane's columns of the product belong to."""
    # (warps of K, warps of N, rows of the product, units, columns of one)
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 1], [1, 1, 8, 2, 2], [KS, RW, 1, 1, 1], [4, 3, 2, 1, 0])
    of_units: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, cube)))
    v = factors.index(which).slice(start, KS).load(of_units)
    v = gl.expand_dims(gl.expand_dims(gl.expand_dims(v, 1), 2), 4)
    v = gl.broadcast(v, gl.zeros([KS, RW, 8, 2, 2], gl.float32, cube))[0]
    return gl.convert_layout(gl.reshape(v, [KS * RW, 32]), lane.type.layout, assert_trivial=True)


@gluon.jit
def _of_groups(
    at, own, lane_s, lane, start: gl.constexpr, COUNT: gl.constexpr, OWN: gl.constexpr, V: gl.constexpr,
    U: gl.constexpr, GROUP_UNITS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """A row's values of the unit that a lane's columns belong to, for COUNT pairs from start on. at: of the row, and
    own: a warp's first unit, (warps, lanes, 1). V neighbours are loaded at once."""
    flat: gl.constexpr = lane.type.layout
    found = ()
    if V == 1:
        unit = own + lane_s % 4 // 2
        for i in gl.static_range(start, start + COUNT):
            if i < OWN:
                one = load_live(at + (unit + 2 * i) // GROUP_UNITS, unit < U - 2 * i, EDGE)
                found = found + split_columns(one, flat)
    else:
        layout: gl.constexpr = own.type.layout
        v = gl.expand_dims(gl.expand_dims(gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1)
        for i in gl.static_range(start, start + COUNT, V // 2):
            if i < OWN:
                several = split_columns(load_live(at + own + (2 * i + v), own < U - 2 * i, EDGE), flat)
                for j in gl.static_range(V // 2):
                    found = found + (gl.where(lane % 4 < 2, several[2 * j], several[2 * j + 1]),)
    return found


@gluon.jit
def _and_groups(
    found, at, group_at, own, lane_s, lane, start: gl.constexpr, COUNT: gl.constexpr, OWN: gl.constexpr,
    V: gl.constexpr, U: gl.constexpr, GROUP_UNITS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """What was found for every row, and :func:`_of_groups` of COUNT pairs from start on."""
    more = ()
    for r in gl.static_range(len(group_at)):
        of_row = _of_groups(at + group_at[r], own, lane_s, lane, start, COUNT, OWN, V, U, GROUP_UNITS, EDGE)
        more = more + (found[r] + of_row,)
    return more


@gluon.jit
def _cube(layout: gl.constexpr, W: gl.constexpr, V: gl.constexpr):
    """Warp, lane and value numbers of a tensor (W, 32, V)."""
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    value = gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    warp, lane = gl.expand_dims(gl.expand_dims(warp, 1), 2), gl.expand_dims(gl.expand_dims(lane, 0), 2)
    return warp, lane, gl.expand_dims(gl.expand_dims(value, 0), 1)


@gluon.jit
def lattice_gemv(
    x, codes, scale, zero, offset, bias, y, N,
    RT: gl.constexpr, RW: gl.constexpr, KS: gl.constexpr, UNROLL: gl.constexpr, V: gl.constexpr,
    U: gl.constexpr, OWN: gl.constexpr, S: gl.constexpr, GROUP_UNITS: gl.constexpr, BITS: gl.constexpr,
    D: gl.constexpr, ZERO_STEPS: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr,
    DEPTH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """16 RT RW rows a program, RW times KS warps, KS of which share K and take OWN pairs of units each.

    S: 2 KS OWN, rounded up to a power of two and at least 4 KS. V: scales of a row that a lane loads at once: 1, or an
    even number that divides U, 2 UNROLL and 2 OWN, and then GROUP_UNITS is 1. DEPTH: steps of UNROLL pairs whose codes
    are on their way to shared memory; 0: to registers. x: (128 U,) 16-bit floats. The other arguments are those of
    ``lattice_skinny``.
    """
    EDGE: gl.constexpr = 2 * OWN * KS > U  # the last warps have fewer
    SHIFTED: gl.constexpr = HAS_ZERO or D > 0
    KW: gl.constexpr = 4 * BITS * U
    W: gl.constexpr = RW * KS
    AT_ONCE: gl.constexpr = OWN if DEPTH > 0 else UNROLL  # pairs whose scales are loaded together
    of_w: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [W, 1, 1], [2, 1, 0])  # (warps, lanes, words)
    of_h: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [W, 1, 1], [2, 1, 0])
    of_s: gl.constexpr = gl.BlockedLayout([1, 1, V], [1, 32, 1], [W, 1, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(2, of_w)
    if PDL:
        grid_release(N)
    warp, lane, word = _cube(of_w, W, 4)
    warp_h, lane_h, word_h = _cube(of_h, W, 2)
    warp_s, lane_s, _ = _cube(of_s, W, V)
    # Warp i works on rows 16 (i % RW).. of every 16 RW of the program and on pairs OWN (i // RW) .. of K. A lane has
    # half a unit of each pair.
    n0 = gl.program_id(0) * (16 * RT * RW)
    half_w = warp // RW * (4 * OWN) + lane % 4
    half_h = warp_h // RW * (4 * OWN) + lane_h % 4
    own_s = warp_s // RW * (2 * OWN) + 0 * lane_s
    w_at = ()
    high_at = ()
    group_at = ()
    for r in gl.static_range(2 * RT):  # rows lane/4, then lane/4 + 8, of every tile
        first = n0 + r // 2 * (16 * RW) + r % 2 * 8
        row = gl.minimum(first + warp % RW * 16 + lane // 4, N - 1)
        w_at = w_at + (codes + row.to(gl.int64) * KW + (half_w * 4 + word),)
        row = gl.minimum(first + warp_h % RW * 16 + lane_h // 4, N - 1)
        high_at = high_at + (codes + row.to(gl.int64) * KW + (8 * U + half_h * 2 + word_h),)
        group_at = group_at + (gl.minimum(first + warp_s % RW * 16 + lane_s // 4, N - 1) * (U // GROUP_UNITS),)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat)), 0) + gl.zeros([W, 32], gl.int32, flat)
    weight = gl.where(lane % 2 == 0, 256, 0)  # of the first column of a lane's two: high and middle byte, or low byte
    unit_of = gl.where(lane % 2 == 0, 64.0, 0.25)
    once = gl.where(lane % 2 == 0, 1.0, 0.0)
    sums = ()
    for _i in gl.static_range(2 * RT):
        sums = sums + (gl.zeros([W, 32], gl.float32, flat),)
    # A buffer each: the compiler puts a barrier between two copies to parts of one.
    low_rooms = ()
    high_rooms = ()
    for _place in gl.static_range(DEPTH * UNROLL * 2 * RT):
        low_rooms = low_rooms + (room(W, 4),)
        if BITS == 3:
            high_rooms = high_rooms + (room(W, 2),)
    digits = gl.allocate_shared_memory(gl.int32, [4, S // 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    factors = gl.allocate_shared_memory(gl.float32, [2, S // 2, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scales = ()
    for _i in gl.static_range(2 * RT):
        scales = scales + ((),)
    zeros = scales
    for step in gl.static_range(DEPTH):
        ask_for(low_rooms, high_rooms, w_at, high_at, half_w, half_h, step, UNROLL, OWN, U, BITS, DEPTH, EDGE)
    for start in gl.static_range(0, OWN, UNROLL):
        if DEPTH == 0:
            lows, highs = load_codes(w_at, high_at, half_w, half_h, start, UNROLL, OWN, U, BITS, EDGE)
        if DEPTH == 0 or start == 0:
            scales = _and_groups(
                scales, scale, group_at, own_s, lane_s, lane, start, AT_ONCE, OWN, V, U, GROUP_UNITS, EDGE
            )
            if HAS_ZERO:
                zeros = _and_groups(
                    zeros, zero, group_at, own_s, lane_s, lane, start, AT_ONCE, OWN, V, U, GROUP_UNITS, EDGE
                )
        if start == 0:
            if PDL:
                x += 8 * grid_wait(N)  # 16 bytes stay 16 bytes for the compiler
            _make_integer(x, offset, digits, factors, U, KS, OWN, S, W, D)
        if DEPTH > 0:
            async_copy.wait_group(DEPTH - 1)
            lows, highs = arrived(low_rooms, high_rooms, start // UNROLL % DEPTH, UNROLL * 2 * RT, of_w, of_h, BITS)
        for i in gl.static_range(UNROLL):
            if start + i < OWN:
                rows = ()  # the codes of every row, word by word
                for r in gl.static_range(2 * RT):
                    low = split_columns(lows[i * 2 * RT + r], flat)
                    of_row = ()
                    high = (low[0], low[0])
                    if BITS == 3:
                        high = split_columns(highs[i * 2 * RT + r], flat)
                    for j in gl.static_range(4):
                        of_word = high[j // 2]
                        if BITS == 3:
                            of_word = twice(of_word, 0x1100 if j % 2 == 0 else 0x3322)
                        of_row = of_row + unpack(low[j], of_word, BITS)
                    rows = rows + (of_row,)
                x_words = _of_pair(digits, (start + i) * KS, lane, RW, KS)
                step = _of_lane(factors, 0, (start + i) * KS, lane, RW, KS) * unit_of
                if SHIFTED:
                    shift = _of_lane(factors, 1, (start + i) * KS, lane, RW, KS) * once
                new = ()
                for r in gl.static_range(RT):
                    nothing = gl.zeros([W, 32], gl.int32, flat)
                    ones = (nothing, nothing, nothing, nothing)
                    fours = ones
                    a, b = rows[2 * r], rows[2 * r + 1]
                    for h in gl.static_range(0, 16, 4):
                        ones = _mma(a[h], b[h], a[h + 2], b[h + 2], x_words[h], x_words[h + 2], ones)
                        fours = _mma(a[h + 1], b[h + 1], a[h + 3], b[h + 3], x_words[h + 1], x_words[h + 3], fours)
                    for half in gl.static_range(2):
                        s = scales[2 * r + half][start + i].to(gl.float32)
                        exact = (ones[2 * half] * weight + ones[2 * half + 1]) * 4
                        exact += fours[2 * half] * weight + fours[2 * half + 1]
                        total = sums[2 * r + half] + exact.to(gl.float32) * (s * step)
                        if HAS_ZERO:
                            z = zeros[2 * r + half][start + i].to(gl.float32) * (-1.0 / ZERO_STEPS)
                            total += s * (z * shift)
                        elif D > 0:
                            total += s * shift
                        new = new + (total,)
                sums = new
        if DEPTH > 0:
            ask_for(
                low_rooms, high_rooms, w_at, high_at, half_w, half_h, start // UNROLL + DEPTH, UNROLL, OWN, U, BITS,
                DEPTH, EDGE,
            )  # fmt: skip
    rooms = gl.allocate_shared_memory(gl.float32, [RT, KS, 64 * RW], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for i in gl.static_range(RT):
        rooms.index(i).store(gl.reshape(gl.join(_of_lanes(sums[2 * i]), _of_lanes(sums[2 * i + 1])), [KS, 64 * RW]))
    thread_barrier()
    across: gl.constexpr = gl.BlockedLayout([KS, 1], [1, 32], [1, W], [1, 0])
    at = gl.arange(0, 64 * RW, gl.SliceLayout(0, across))
    for i in gl.static_range(RT):
        n = n0 + (i * RW + at // 64) * 16 + at // 8 % 8 + at % 2 * 8
        n = gl.where(at // 2 % 4 == 0, n, N)  # of four lanes with one sum, one stores it
        store_output(gl.sum(rooms.index(i).load(across), axis=0), n, 0 * n, bias, y, y, 1, N, HAS_BIAS, False)
