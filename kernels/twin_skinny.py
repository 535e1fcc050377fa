"""Gluon kernel of ``tqcompile::twin_gemm`` for a few tokens: weights go from memory straight into ``mma.sync``.

A warp takes 16 rows and OWN groups of 128 channels. A lane's 16 bytes of a row hold what four products of
depth 32 (16 for floats) expect in its registers: low nibbles meet the even channels, high nibbles the odd ones,
and in plane order those are 16 contiguous bytes of x too. No shared memory but for one sum over the KS warps that
share rows, in a fixed order. Group scales are applied to the fp32 sum of each group.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.gluon_common import grid_release, grid_wait, load_live, thread_barrier
from tqcompile.kernels.twin_linear import BF16_NIBBLES, FP16_NIBBLES

_MMA = "mma.sync.aligned.m16n8k{}.row.col.{}.{}.{}.{} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
_MMA_INT8 = gl.constexpr(_MMA.format(32, "s32", "s8", "s8", "s32"))
_MMA_BF16 = gl.constexpr(_MMA.format(16, "f32", "bf16", "bf16", "f32"))
_MMA_FP16 = gl.constexpr(_MMA.format(16, "f32", "f16", "f16", "f32"))


@gluon.jit
def _words(v, layout: gl.constexpr):
    """(A, B, 4) -> its four columns (A, B); nothing moves between lanes."""
    a, b = gl.split(gl.reshape(v, [v.shape[0], v.shape[1], 2, 2]))
    w0, w2 = gl.split(a)
    w1, w3 = gl.split(b)
    return (
        gl.convert_layout(w0, layout, assert_trivial=True),
        gl.convert_layout(w1, layout, assert_trivial=True),
        gl.convert_layout(w2, layout, assert_trivial=True),
        gl.convert_layout(w3, layout, assert_trivial=True),
    )


@gluon.jit
def split_columns(v, layout: gl.constexpr):
    """(A, B, V) -> its V columns (A, B), for V of 1, 2, 4 or 8; nothing moves between lanes."""
    V: gl.constexpr = v.shape[2]
    if V == 1:
        parts = (gl.reshape(v, [v.shape[0], v.shape[1]]),)
    elif V == 2:
        parts = gl.split(v)
    else:
        even, odd = gl.split(gl.reshape(v, [v.shape[0], v.shape[1], V // 2, 2]))
        if V == 4:
            a, b = gl.split(even), gl.split(odd)
            parts = (a[0], b[0], a[1], b[1])
        else:
            e0, e1 = gl.split(gl.reshape(even, [v.shape[0], v.shape[1], 2, 2]))
            o0, o1 = gl.split(gl.reshape(odd, [v.shape[0], v.shape[1], 2, 2]))
            a, b, c, d = gl.split(e0), gl.split(e1), gl.split(o0), gl.split(o1)
            parts = (a[0], c[0], b[0], d[0], a[1], c[1], b[1], d[1])
    found = ()
    for i in gl.static_range(V):
        found = found + (gl.convert_layout(parts[i], layout, assert_trivial=True),)
    return found


@gluon.jit
def _load_weights(at, live, MASKED: gl.constexpr):
    """Past L1, which is for x."""
    if MASKED:
        return gl.load(at, mask=live, other=0, cache_modifier=".cg")
    return gl.load(at, cache_modifier=".cg")


@gluon.jit
def _mma_int8(wa, wb, even, odd, c0, c1, c2, c3):
    """c + 16 times the product of depth 32: wa, wb: a word of rows lane/4 and lane/4 + 8."""
    return gl.inline_asm_elementwise(
        _MMA_INT8, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [(wa << 4) & -252645136, (wb << 4) & -252645136, wa & -252645136, wb & -252645136, even, odd, c0, c1, c2, c3],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _floats(w, FLOAT: gl.constexpr):
    asm: gl.constexpr = BF16_NIBBLES if gl.bfloat16 == FLOAT else FP16_NIBBLES
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,=&r,=&r,r", [w], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _mma_float(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, FLOAT: gl.constexpr):
    asm: gl.constexpr = _MMA_BF16 if gl.bfloat16 == FLOAT else _MMA_FP16
    return gl.inline_asm_elementwise(
        asm, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _mma_words(wa, wb, e0, e1, o0, o1, c0, c1, c2, c3, FLOAT: gl.constexpr):
    """c + the two products of depth 16 that a word of each row holds; e, o: two words of even and of odd channels."""
    la0, la1, ha0, ha1 = _floats(wa, FLOAT)
    lb0, lb1, hb0, hb1 = _floats(wb, FLOAT)
    c0, c1, c2, c3 = _mma_float(la0, lb0, la1, lb1, e0, e1, c0, c1, c2, c3, FLOAT)
    return _mma_float(ha0, hb0, ha1, hb1, o0, o1, c0, c1, c2, c3, FLOAT)


@gluon.jit
def store_output(value, n, m, bias, addend, y, T, N, HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr):
    live = (n < N) & (m < T)
    at = m.to(gl.int64) * N + n
    if HAS_BIAS:
        value += gl.load(bias + gl.minimum(n, N - 1)).to(gl.float32)
    if HAS_ADDEND:
        value += gl.load(addend + at, mask=live, other=0.0).to(gl.float32)
    gl.store(y + at, value.to(y.dtype.element_ty), mask=live)


@gluon.jit
def shared_sums(TILES: gl.constexpr, RW: gl.constexpr, KS: gl.constexpr):
    """Room for the sums of TILES tiles by all warps of a program."""
    SIZE: gl.constexpr = RW * 128 if KS > 1 else 1
    return gl.allocate_shared_memory(gl.float32, [TILES, KS, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def finish_tiles(
    tiles, rooms, n0, bias, addend, y, T, N,
    COUNT: gl.constexpr, RT: gl.constexpr, RW: gl.constexpr, KS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr,
):  # fmt: skip
    """Add what the KS warps that share rows have, in their order, and store it.

    tiles: COUNT times the four values of a lane, (warps, lanes) each: of every 8 tokens in turn, RT tiles of rows. n0:
    first row of the first; the next tile of rows is 16 RW further.
    """
    if KS == 1:
        for i in gl.static_range(COUNT):
            v0, v1, v2, v3 = tiles[i]
            lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, v0.type.layout)), 0)
            warp = gl.expand_dims(gl.arange(0, RW, gl.SliceLayout(1, v0.type.layout)), 1)
            n = n0 + i % RT * (16 * RW) + warp * 16 + lane // 4
            m = i // RT * 8 + 2 * (lane % 4) + 0 * warp
            store_output(v0, n, m, bias, addend, y, T, N, HAS_BIAS, HAS_ADDEND)
            store_output(v1, n, m + 1, bias, addend, y, T, N, HAS_BIAS, HAS_ADDEND)
            store_output(v2, n + 8, m, bias, addend, y, T, N, HAS_BIAS, HAS_ADDEND)
            store_output(v3, n + 8, m + 1, bias, addend, y, T, N, HAS_BIAS, HAS_ADDEND)
    else:
        for i in gl.static_range(COUNT):  # 16 bytes a lane, no two of them in one bank
            v0, v1, v2, v3 = tiles[i]
            rooms.index(i).store(gl.reshape(gl.join(gl.join(v0, v2), gl.join(v1, v3)), [KS, RW * 128]))
        thread_barrier()
        across: gl.constexpr = gl.BlockedLayout([KS, 1], [1, 32], [1, RW * KS], [1, 0])
        at = gl.arange(0, RW * 128, gl.SliceLayout(0, across))
        for i in gl.static_range(COUNT):
            n = n0 + i % RT * (16 * RW) + at // 128 * 16 + at // 16 % 8 + at // 2 % 2 * 8
            m = i // RT * 8 + at // 4 % 4 * 2 + at % 2
            value = gl.sum(rooms.index(i).load(across), axis=0)
            store_output(value, n, m, bias, addend, y, T, N, HAS_BIAS, HAS_ADDEND)


@gluon.jit(do_not_specialize=["T"])
def twin_skinny(
    x, x_scale, t, w, scale, up, up_scale, bias, addend, y, T, N, KW,
    TILES: gl.constexpr, RW: gl.constexpr, KS: gl.constexpr, UNROLL: gl.constexpr, V: gl.constexpr,
    G: gl.constexpr, OWN: gl.constexpr, GROUP_STEPS: gl.constexpr, R: gl.constexpr, FLOAT: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """16 RW rows times 8 TILES tokens a program. G: groups of 128 in K; GROUP_STEPS of them share a scale, and a warp
    takes OWN. V: scales of a row that a lane loads at once, which must divide UNROLL, OWN and G: more than 1 only where
    GROUP_STEPS is.

    w: int32 view (N, KW), KW = K/8. x: int32 view of planes, (T, 2 KW) int8 or (T, 4 KW) 16-bit floats of type FLOAT
    (None: int8). t: int32 view (T, R/2) of 16-bit planes. up: int32 view (N, R/8).
    """
    out: gl.constexpr = y.dtype.element_ty
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [RW * KS, 1, 1], [2, 1, 0])  # (warps, lanes, words)
    flat: gl.constexpr = gl.SliceLayout(2, cube)
    of_s: gl.constexpr = gl.BlockedLayout([1, 1, V], [1, 32, 1], [RW * KS, 1, 1], [2, 1, 0])
    flat_s: gl.constexpr = gl.SliceLayout(2, of_s)
    EDGE: gl.constexpr = OWN * KS > G  # the last warps have fewer groups
    rooms = shared_sums(TILES, RW, KS)
    if PDL:
        grid_release(N)
    warp = gl.expand_dims(gl.arange(0, RW * KS, gl.SliceLayout(1, flat)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat)), 0)
    word = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, cube))), 0), 1)
    warp_s = gl.expand_dims(gl.arange(0, RW * KS, gl.SliceLayout(1, flat_s)), 1)
    lane_s = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, flat_s)), 0)
    column = gl.expand_dims(gl.expand_dims(gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, of_s))), 0), 1)
    # Warp i works on rows 16 (i % RW).. of the program and on groups OWN (i // RW) ..
    n0 = gl.program_id(0) * (16 * RW)
    row = n0 + warp % RW * 16 + lane // 4
    row_a, row_b = gl.minimum(row, N - 1), gl.minimum(row + 8, N - 1)
    own = warp // RW * OWN + lane * 0
    own_s = gl.expand_dims(warp_s // RW * OWN + lane_s * 0, 2)
    own3, lane3 = gl.expand_dims(own, 2), gl.expand_dims(lane, 2)
    inner = own3 * 16 + (lane3 % 4) * 4 + word
    wa_at = w + gl.expand_dims(row_a.to(gl.int64) * KW, 2) + inner
    wb_at = w + gl.expand_dims(row_b.to(gl.int64) * KW, 2) + inner
    row_s = n0 + warp_s % RW * 16 + lane_s // 4
    sa_at = scale + gl.expand_dims(gl.minimum(row_s, N - 1) * (G // GROUP_STEPS), 2)
    sb_at = scale + gl.expand_dims(gl.minimum(row_s + 8, N - 1) * (G // GROUP_STEPS), 2)
    if R > 0:
        # Early: from memory these take as long as the weights.
        up_a, up_b = gl.load(up_scale + row_a), gl.load(up_scale + row_b)
        uas = ()
        ubs = ()
        for k in gl.static_range(0, R // 8, 4):
            live = k + lane % 4 + 0 * row_a < R // 8
            uas = uas + (gl.load(up + row_a * (R // 8) + k + lane % 4, mask=live, other=0),)
            ubs = ubs + (gl.load(up + row_b * (R // 8) + k + lane % 4, mask=live, other=0),)
    sums = ()
    for _i in gl.static_range(4 * TILES):
        sums = sums + (gl.zeros([RW * KS, 32], gl.float32, flat),)
    zero: gl.constexpr = gl.int32 if FLOAT is None else gl.float32
    for start in gl.static_range(0, OWN, UNROLL):
        was = ()
        wbs = ()
        sas = ()
        sbs = ()
        for i in gl.static_range(UNROLL):
            if start + i < OWN:
                was = was + (_load_weights(wa_at + (start + i) * 16, own3 < G - start - i, EDGE),)
                wbs = wbs + (_load_weights(wb_at + (start + i) * 16, own3 < G - start - i, EDGE),)
        for i in gl.static_range(0, UNROLL, V):
            if start + i < OWN:
                group = (own_s + (start + i) + column) // GROUP_STEPS
                sas = sas + split_columns(load_live(sa_at + group, own_s < G - start - i, EDGE), flat)
                sbs = sbs + split_columns(load_live(sb_at + group, own_s < G - start - i, EDGE), flat)
        if PDL and start == 0:
            x += 4 * grid_wait(N)  # 0; as a multiple of 16 bytes it keeps what is known of x's alignment
        for i in gl.static_range(UNROLL):
            if start + i < OWN:
                live3 = own3 < G - start - i
                a0, a1, a2, a3 = _words(was[i], flat)
                b0, b1, b2, b3 = _words(wbs[i], flat)
                sa, sb = sas[i].to(gl.float32), sbs[i].to(gl.float32)
                new = ()
                for j in gl.static_range(TILES):
                    token = gl.minimum(8 * j + lane3 // 4, T - 1)
                    c0 = gl.zeros([RW * KS, 32], zero, flat)
                    c1, c2, c3 = c0, c0, c0
                    if FLOAT is None:
                        at = x + token * 2 * KW + inner + (start + i) * 16
                        e0, e1, e2, e3 = _words(load_live(at, live3, EDGE), flat)
                        o0, o1, o2, o3 = _words(load_live(at + KW, live3, EDGE), flat)
                        c0, c1, c2, c3 = _mma_int8(a0, b0, e0, o0, c0, c1, c2, c3)
                        c0, c1, c2, c3 = _mma_int8(a1, b1, e1, o1, c0, c1, c2, c3)
                        c0, c1, c2, c3 = _mma_int8(a2, b2, e2, o2, c0, c1, c2, c3)
                        c0, c1, c2, c3 = _mma_int8(a3, b3, e3, o3, c0, c1, c2, c3)
                    else:
                        # A lane's 16 even channels of a group, then its odd ones: two 16-byte loads each.
                        at = x + token * 4 * KW + (own3 + start + i) * 32 + (lane3 % 4) * 8 + word
                        e0, e1, e2, e3 = _words(load_live(at, live3, EDGE), flat)
                        o0, o1, o2, o3 = _words(load_live(at + 2 * KW, live3, EDGE), flat)
                        c0, c1, c2, c3 = _mma_words(a0, b0, e0, e1, o0, o1, c0, c1, c2, c3, FLOAT)
                        c0, c1, c2, c3 = _mma_words(a1, b1, e2, e3, o2, o3, c0, c1, c2, c3, FLOAT)
                        e0, e1, e2, e3 = _words(load_live(at + 4, live3, EDGE), flat)
                        o0, o1, o2, o3 = _words(load_live(at + 2 * KW + 4, live3, EDGE), flat)
                        c0, c1, c2, c3 = _mma_words(a2, b2, e0, e1, o0, o1, c0, c1, c2, c3, FLOAT)
                        c0, c1, c2, c3 = _mma_words(a3, b3, e2, e3, o2, o3, c0, c1, c2, c3, FLOAT)
                    new = new + (
                        sums[4 * j] + c0.to(gl.float32) * sa,
                        sums[4 * j + 1] + c1.to(gl.float32) * sa,
                        sums[4 * j + 2] + c2.to(gl.float32) * sb,
                        sums[4 * j + 3] + c3.to(gl.float32) * sb,
                    )
                sums = new
    if R > 0:
        # Of the warps that share rows, one adds the low-rank part.
        first = (own == 0).to(gl.float32)
        up_a, up_b = up_a.to(gl.float32) * first, up_b.to(gl.float32) * first
    tiles = ()
    for j in gl.static_range(TILES):
        v0, v1, v2, v3 = sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]
        if FLOAT is None:
            column = 8 * j + 2 * (lane % 4)
            x0 = gl.load(x_scale + gl.minimum(column, T - 1)) * 0.0625
            x1 = gl.load(x_scale + gl.minimum(column + 1, T - 1)) * 0.0625
            v0, v1, v2, v3 = v0 * x0, v1 * x1, v2 * x0, v3 * x1
        if R > 0:
            c0 = gl.zeros([RW * KS, 32], gl.float32, flat)
            c1, c2, c3 = c0, c0, c0
            token = gl.minimum(8 * j + lane // 4, T - 1) + 0 * row_a
            for k in gl.static_range(0, R // 8, 4):
                at = t + token * (R // 2) + gl.minimum(k + lane % 4, R // 8 - 1) * 2
                e0, e1, o0, o1 = gl.load(at), gl.load(at + 1), gl.load(at + R // 4), gl.load(at + R // 4 + 1)
                c0, c1, c2, c3 = _mma_words(uas[k // 4], ubs[k // 4], e0, e1, o0, o1, c0, c1, c2, c3, out)
            v0, v1, v2, v3 = v0 + c0 * up_a, v1 + c1 * up_a, v2 + c2 * up_b, v3 + c3 * up_b
        tiles = tiles + ((v0, v1, v2, v3),)
    finish_tiles(tiles, rooms, n0, bias, addend, y, T, N, TILES, 1, RW, KS, HAS_BIAS, HAS_ADDEND)
