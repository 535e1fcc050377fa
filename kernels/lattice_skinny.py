"""Gluon kernel of ``tqcompile::lattice_linear`` for a few tokens: codes go from memory straight into ``mma.sync``.

A warp takes 16 RT rows and U / KS units of 128 columns. A lane's 8 bytes of a row are two words of 16 codes: a
shift, a mask and a multiply-add leave codes i and i + 8 as an exact pair of floats, the operand of a product of depth
16, and x_i, x_(i+8) are paired to match. Zero points and offsets act through the sums of x of a unit, which one more
product (with ones, or with the offset) leaves where they are needed. No shared memory but for one sum over the KS
warps that share rows, in a fixed order. Scales are applied to the fp32 sum of each unit, or of K where a row has one.

At 2 bits a weight costs 2.1 instructions (compiled for sm_90, two row tiles), 0.8 of them logic, shifts and permutes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.gluon_common import grid_release, grid_wait, load_live
from tqcompile.kernels.skinny_codes import codes_of_word, permute, row_words
from tqcompile.kernels.twin_skinny import _mma_float, _words, finish_tiles, shared_sums, split_columns


@gluon.jit
def _paired(r):
    """16 values of x in order, two a register -> values i and i + 8 in register i."""
    return (
        permute(r[0], r[4], 0x5410), permute(r[0], r[4], 0x7632),
        permute(r[1], r[5], 0x5410), permute(r[1], r[5], 0x7632),
        permute(r[2], r[6], 0x5410), permute(r[2], r[6], 0x7632),
        permute(r[3], r[7], 0x5410), permute(r[3], r[7], 0x7632),
    )  # fmt: skip


@gluon.jit
def _mma_word(a, b, x, c, FLOAT: gl.constexpr):
    """c + the four products of depth 16 that a word of rows lane/4 (a) and lane/4 + 8 (b) holds."""
    for i in gl.static_range(0, 8, 2):
        c = _mma_float(a[i], b[i], a[i + 1], b[i + 1], x[i], x[i + 1], c[0], c[1], c[2], c[3], FLOAT)
    return c


@gluon.jit
def _sum_of_pieces(v):
    """v of this lane, and of those whose row differs in the last two bits."""
    asm: gl.constexpr = """{ .reg .f32 a, b; shfl.sync.bfly.b32 a, $1, 4, 31, -1; add.f32 a, a, $1;
        shfl.sync.bfly.b32 b, a, 8, 31, -1; add.f32 $0, a, b; }"""
    return gl.inline_asm_elementwise(asm, "=f,f", [v], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _offset_piece(value, lane, FLOAT: gl.constexpr):
    """An fp32 number as three floats: the one of this lane's row (of four), twice in a register."""
    first = value.to(FLOAT)
    rest = value - first.to(gl.float32)
    second = rest.to(FLOAT)
    third = (rest - second.to(gl.float32)).to(FLOAT)
    piece = lane // 4 % 4
    mine = gl.where(piece == 0, first, gl.where(piece == 1, second, third))
    mine = gl.where(piece == 3, mine * 0, mine)
    bits = mine.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return bits | (bits << 16)


@gluon.jit
def _x_of_unit(
    x, own, lane, word, unit: gl.constexpr, layout: gl.constexpr, T,
    U: gl.constexpr, TILES: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """A lane's 64 values of x of every 8 tokens: four tuples of four registers. Lanes without a token read nothing,
    which with one token saves most of the traffic from L1; what they hold is in columns that are not stored."""
    found = ()
    for j in gl.static_range(TILES):
        token = 8 * j + lane // 4
        at = x + token * (64 * U) + ((own + unit) * 64 + lane % 4 * 16 + word)
        for i in gl.static_range(4):
            if EDGE:
                values = gl.load(at + 4 * i, mask=(token < T) & (own < U - unit), other=0)
            else:
                values = gl.load(at + 4 * i, mask=token < T)
            found = found + (_words(values, layout),)
    return found


@gluon.jit
def _totals(ones, pairs0, pairs1, c, FLOAT: gl.constexpr):
    """c + the sums of a unit of x that its zero points or the offset need, as four values of a product."""
    c = _mma_word(ones + ones, ones + ones, pairs0, c, FLOAT)
    return _mma_word(ones + ones, ones + ones, pairs1, c, FLOAT)


@gluon.jit
def _whole(total, D: gl.constexpr):
    """A total of all pieces of an offset: its rows hold the three, and nothing. Others are whole already."""
    if D > 0:
        t0, t1 = _sum_of_pieces(total[0]), _sum_of_pieces(total[1])
        total = (t0, t1, t0, t1)
    return total


@gluon.jit
def _scaled(
    c, total, old, scale_a, scale_b, zero_a, zero_b, ZERO_STEPS: gl.constexpr, HAS_ZERO: gl.constexpr, D: gl.constexpr
):
    """old + scale * (c + what the zero point or the offset adds); a, b: of rows lane/4 and lane/4 + 8, as stored."""
    sa, sb = scale_a.to(gl.float32), scale_b.to(gl.float32)
    c0, c1, c2, c3 = c
    if D > 0:
        c0, c1, c2, c3 = c0 + total[0], c1 + total[1], c2 + total[2], c3 + total[3]
    elif HAS_ZERO:
        za, zb = zero_a.to(gl.float32) * (-1.0 / ZERO_STEPS), zero_b.to(gl.float32) * (-1.0 / ZERO_STEPS)
        c0, c1, c2, c3 = c0 + za * total[0], c1 + za * total[1], c2 + zb * total[2], c3 + zb * total[3]
    return old[0] + c0 * sa, old[1] + c1 * sa, old[2] + c2 * sb, old[3] + c3 * sb


@gluon.jit
def _add_scaled(
    c, total, old, scales, zeros, r: gl.constexpr, i: gl.constexpr,
    ONE: gl.constexpr, ZERO_STEPS: gl.constexpr, HAS_ZERO: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """old + the products c of unit i and row tile r, scaled; c itself, where a row has one scale."""
    if not ONE:
        at = zeros if HAS_ZERO else scales
        c = _scaled(
            c,
            total,
            old,
            scales[2 * r][i],
            scales[2 * r + 1][i],
            at[2 * r][i],
            at[2 * r + 1][i],
            ZERO_STEPS,
            HAS_ZERO,
            D,
        )
    return c


@gluon.jit
def _pairs_and_total(
    x, j: gl.constexpr, ones, totals, none,
    ONE: gl.constexpr, HAS_ZERO: gl.constexpr, D: gl.constexpr, FLOAT: gl.constexpr,
):  # fmt: skip
    """x of 8 tokens of a unit, paired, word by word; its sums, with those before where a row has one scale."""
    low, high = _paired(x[4 * j] + x[4 * j + 1]), _paired(x[4 * j + 2] + x[4 * j + 3])
    total = totals[j] if ONE else none
    if HAS_ZERO or D > 0:
        total = _totals(ones, low, high, total, FLOAT)
    return low, high, total


@gluon.jit
def _unit_at_once(
    ws, highs, scales, zeros, x, sums, totals, ones, i: gl.constexpr, layout: gl.constexpr,
    TILES: gl.constexpr, RT: gl.constexpr, ONE: gl.constexpr, ZERO_STEPS: gl.constexpr,
    HAS_ZERO: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr, FLOAT: gl.constexpr,
):  # fmt: skip
    """The sums of products, and of x, with unit i. All rows are unpacked first."""
    zero = gl.zeros([ws[0].shape[0], 32], gl.float32, layout)
    none = (zero, zero, zero, zero)
    rows = ()  # the codes of every row, word by word
    for r in gl.static_range(2 * RT):
        first, second = row_words(ws, highs, i * 2 * RT + r, layout, BITS)
        rows = rows + (codes_of_word(first, BITS, TILES, FLOAT), codes_of_word(second, BITS, TILES, FLOAT))
    new = ()
    new_totals = ()
    for j in gl.static_range(TILES):
        low, high, total = _pairs_and_total(x, j, ones, totals, none, ONE, HAS_ZERO, D, FLOAT)
        pairs = (low, high)
        new_totals = new_totals + (total,)
        whole = total if ONE else _whole(total, D)
        for r in gl.static_range(RT):
            old = sums[j * RT + r]
            c = old if ONE else none
            for word in gl.static_range(2):
                c = _mma_word(rows[4 * r + word], rows[4 * r + 2 + word], pairs[word], c, FLOAT)
            new = new + (_add_scaled(c, whole, old, scales, zeros, r, i, ONE, ZERO_STEPS, HAS_ZERO, D),)
    return new, new_totals


@gluon.jit
def _unit_by_words(
    ws, highs, scales, zeros, x, sums, totals, ones, i: gl.constexpr, layout: gl.constexpr,
    TILES: gl.constexpr, RT: gl.constexpr, ONE: gl.constexpr, ZERO_STEPS: gl.constexpr,
    HAS_ZERO: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr, FLOAT: gl.constexpr,
):  # fmt: skip
    """As :func:`_unit_at_once`, each word of a row unpacked just before its products, which needs fewer registers."""
    zero = gl.zeros([ws[0].shape[0], 32], gl.float32, layout)
    none = (zero, zero, zero, zero)
    pairs = ()  # of every 8 tokens, word by word
    products = ()
    new_totals = ()
    for j in gl.static_range(TILES):
        low, high, total = _pairs_and_total(x, j, ones, totals, none, ONE, HAS_ZERO, D, FLOAT)
        pairs = pairs + (low, high)
        new_totals = new_totals + (total,)
        for r in gl.static_range(RT):
            products = products + (sums[j * RT + r] if ONE else none,)
    for word in gl.static_range(2):
        after = ()
        for r in gl.static_range(RT):
            a = codes_of_word(row_words(ws, highs, 2 * (i * RT + r), layout, BITS)[word], BITS, TILES, FLOAT)
            b = codes_of_word(row_words(ws, highs, 2 * (i * RT + r) + 1, layout, BITS)[word], BITS, TILES, FLOAT)
            for j in gl.static_range(TILES):
                after = after + (_mma_word(a, b, pairs[2 * j + word], products[j * RT + r], FLOAT),)
        products = ()
        for j in gl.static_range(TILES):
            for r in gl.static_range(RT):
                products = products + (after[r * TILES + j],)
    new = ()
    for j in gl.static_range(TILES):
        whole = new_totals[j] if ONE else _whole(new_totals[j], D)
        for r in gl.static_range(RT):
            c, old = products[j * RT + r], sums[j * RT + r]
            new = new + (_add_scaled(c, whole, old, scales, zeros, r, i, ONE, ZERO_STEPS, HAS_ZERO, D),)
    return new, new_totals


@gluon.jit(do_not_specialize=["T"])
def lattice_skinny(
    x, codes, scale, zero, offset, bias, y, T, N,
    TILES: gl.constexpr, RT: gl.constexpr, RW: gl.constexpr, KS: gl.constexpr, UNROLL: gl.constexpr, V: gl.constexpr,
    U: gl.constexpr, OWN: gl.constexpr, GROUP_UNITS: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr,
    ZERO_STEPS: gl.constexpr, FLOAT: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """16 RT RW rows times 8 TILES tokens a program. U: units of 128 columns in K; GROUP_UNITS of them
    share a scale, and a warp takes OWN.

    x: int32 view (T, 64 U) of values of type FLOAT. codes: int32 view (N, 4 BITS U). D: 0 for no offset. V: scales of a
    row that a lane loads at once, which must divide UNROLL, OWN and U: more than 1 only where GROUP_UNITS is.
    """
    WARPS: gl.constexpr = RW * KS
    EDGE: gl.constexpr = OWN * KS > U  # the last warps have fewer
    ONE: gl.constexpr = GROUP_UNITS == U  # one scale a row: applied at the end
    # On an H200, 28672 x 4096, 16 tokens, 3 bits: 38 us at once, 48 by words. With 2 bits words save up to 13 %.
    unit: gl.constexpr = _unit_at_once if BITS == 3 and TILES > 1 else _unit_by_words
    KW: gl.constexpr = 4 * BITS * U
    of_x: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # (warps, lanes, words)
    of_w: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    of_s: gl.constexpr = gl.BlockedLayout([1, 1, V], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(2, of_x)
    flat_w: gl.constexpr = gl.SliceLayout(2, of_w)
    flat_s: gl.constexpr = gl.SliceLayout(2, of_s)
    rooms = shared_sums(RT * TILES, RW, KS)
    if PDL:
        grid_release(N)
    warp = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, flat)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat)), 0)
    warp_w = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, flat_w)), 1)
    lane_w = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat_w)), 0)
    warp_s = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, flat_s)), 1)
    lane_s = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat_s)), 0)
    word4 = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, of_x))), 0), 1)
    word2 = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, of_w))), 0), 1)
    scale_v = gl.expand_dims(gl.expand_dims(gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, of_s))), 0), 1)
    # Warp i works on rows 16 (i % RW).. of every 16 RW of the program and on units OWN (i // RW) .. of K.
    n0 = gl.program_id(0) * (16 * RT * RW)
    own, own_w = warp // RW * OWN + lane * 0, warp_w // RW * OWN + lane_w * 0
    own_s = warp_s // RW * OWN + lane_s * 0
    own3, lane3 = gl.expand_dims(own, 2), gl.expand_dims(lane, 2)
    own_w3, lane_w3 = gl.expand_dims(own_w, 2), gl.expand_dims(lane_w, 2)
    own_s3 = gl.expand_dims(own_s, 2)
    w_at = ()
    high_at = ()
    group_at = ()
    row_at = ()
    for r in gl.static_range(2 * RT):  # rows lane/4, then lane/4 + 8, of every tile
        first = n0 + r // 2 * (16 * RW) + r % 2 * 8
        row_w = gl.minimum(first + warp_w % RW * 16 + lane_w // 4, N - 1).to(gl.int64) * KW
        row = gl.minimum(first + warp % RW * 16 + lane // 4, N - 1)
        row_s = gl.minimum(first + warp_s % RW * 16 + lane_s // 4, N - 1)
        w_at = w_at + (codes + gl.expand_dims(row_w, 2) + (own_w3 * 8 + lane_w3 % 4 * 2 + word2),)
        high_at = high_at + (codes + row.to(gl.int64) * KW + (8 * U + own * 4 + lane % 4),)
        group_at = group_at + (gl.expand_dims(row_s * (U // GROUP_UNITS), 2),)
        row_at = row_at + (row,)
    ones = ()  # what multiplies x for the sum that a zero point or an offset needs, for columns 0 to 3 of every four
    if D > 0:
        for i in gl.static_range(4):
            ones = ones + (_offset_piece(gl.load(offset + i % D).to(gl.float32), lane + 0 * warp, FLOAT),)
    elif HAS_ZERO:
        one: gl.constexpr = 0x3F803F80 if gl.bfloat16 == FLOAT else 0x3C003C00
        for _i in gl.static_range(4):
            ones = ones + (gl.full([WARPS, 32], one, gl.int32, flat),)
    none = gl.zeros([WARPS, 32], gl.float32, flat)
    sums = ()
    totals = ()
    for _i in gl.static_range(RT * TILES):
        sums = sums + ((none, none, none, none),)
    for _i in gl.static_range(TILES):
        totals = totals + ((none, none, none, none),)
    for start in gl.static_range(0, OWN, UNROLL):
        ws = ()
        highs = ()
        scales = ()  # of every row, of every unit
        zeros = ()
        for i in gl.static_range(UNROLL):
            if start + i < OWN:
                for r in gl.static_range(2 * RT):
                    ws = ws + (load_live(w_at[r] + (start + i) * 8, own_w3 < U - start - i, EDGE),)
                    if BITS == 3:
                        highs = highs + (load_live(high_at[r] + (start + i) * 4, own < U - start - i, EDGE),)
        if not ONE:
            for r in gl.static_range(2 * RT):
                of_row = ()
                zeros_of_row = ()
                for i in gl.static_range(0, UNROLL, V):
                    if start + i < OWN:
                        at = group_at[r] + (own_s3 + (start + i) + scale_v) // GROUP_UNITS
                        of_row = of_row + split_columns(load_live(scale + at, own_s3 < U - start - i, EDGE), flat)
                        if HAS_ZERO:
                            zeros_of_row = zeros_of_row + split_columns(
                                load_live(zero + at, own_s3 < U - start - i, EDGE), flat
                            )
                scales = scales + (of_row,)
                zeros = zeros + (zeros_of_row,)
        if PDL and start == 0:
            x += 4 * grid_wait(N)  # 16 bytes stay 16 bytes for the compiler
        if start == 0:
            ahead = _x_of_unit(x, own3, lane3, word4, 0, flat, T, U, TILES, EDGE)
        for i in gl.static_range(UNROLL):
            if start + i < OWN:
                now = ahead
                if start + i + 1 < OWN:  # from L2 x takes as long as a unit of work
                    ahead = _x_of_unit(x, own3, lane3, word4, start + i + 1, flat, T, U, TILES, EDGE)
                sums, totals = unit(
                    ws, highs, scales, zeros, now, sums, totals, ones, i, flat,
                    TILES, RT, ONE, ZERO_STEPS, HAS_ZERO, BITS, D, FLOAT,
                )  # fmt: skip
    tiles = ()
    for j in gl.static_range(TILES):
        for r in gl.static_range(RT):
            c = sums[j * RT + r]
            if ONE:
                scale_a, scale_b = gl.load(scale + row_at[2 * r]), gl.load(scale + row_at[2 * r + 1])
                zero_a, zero_b = scale_a, scale_b  # not read
                if HAS_ZERO:
                    zero_a, zero_b = gl.load(zero + row_at[2 * r]), gl.load(zero + row_at[2 * r + 1])
                old, total = (none, none, none, none), _whole(totals[j], D)
                c = _scaled(c, total, old, scale_a, scale_b, zero_a, zero_b, ZERO_STEPS, HAS_ZERO, D)
            tiles = tiles + (c,)
    finish_tiles(tiles, rooms, n0, bias, y, y, T, N, RT * TILES, RT, RW, KS, HAS_BIAS, False)
