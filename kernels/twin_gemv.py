"""Gluon kernel of ``tqcompile::twin_gemm`` for one or two tokens: every weight goes from memory to registers once.

A warp owns ROWS rows over all of K. A lane holds 16 bytes of a row (32 weights): int8 products by ``dp4a``, one fp32
scaling a word, one sum over the lanes at the end. No shared memory, no barrier. Loads of the weights come first, so
that with programmatic dependent launch they overlap the prologue.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.gluon_common import grid_release, grid_wait, load_live


@gluon.jit
def _dot4(a, b, c):
    """c + the products of the four signed bytes of a and b."""
    return gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _load_weights(at, live, MASKED: gl.constexpr):
    """Read once, so first to leave the cache."""
    if MASKED:
        return gl.load(at, mask=live, other=0, eviction_policy="evict_first")
    return gl.load(at, eviction_policy="evict_first")


@gluon.jit
def twin_gemv(
    x, x_scale, t, w, scale, up, up_scale, bias, addend, y, N, KW,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr,
    G: gl.constexpr, WORDS: gl.constexpr, R: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADDEND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x: int32 view (TOKENS, 2 KW) of int8 planes. w: int32 view (N, KW), KW = K/8. A group is WORDS = g/8 words.
    t: (TOKENS, R) in plane order."""
    BN: gl.constexpr = ROWS * WARPS
    LANES: gl.constexpr = WORDS // 4  # of one group
    GC: gl.constexpr = 32 // LANES  # groups a warp reads at a time
    cube: gl.constexpr = gl.BlockedLayout(
        [ROWS, 1, 4], [1, GC, LANES], [WARPS, 1, 1], [2, 1, 0]
    )  # (rows, groups, words)
    by_group: gl.constexpr = gl.SliceLayout(2, cube)
    by_row: gl.constexpr = gl.SliceLayout(1, by_group)
    of_x: gl.constexpr = gl.SliceLayout(0, cube)
    if PDL:
        grid_release(N)
    n0 = gl.program_id(0) * BN
    row = gl.minimum(n0 + gl.arange(0, BN, by_row), N - 1)
    group_s = gl.expand_dims(gl.arange(0, GC, gl.SliceLayout(0, by_group)), 0)
    group_x = gl.expand_dims(gl.arange(0, GC, gl.SliceLayout(1, of_x)), 1)
    inner = group_x * WORDS + gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, of_x)), 0)
    w_at = w + gl.expand_dims(gl.expand_dims(row.to(gl.int64) * KW, 1), 2) + gl.expand_dims(inner, 0)
    s_at = scale + gl.expand_dims(row * G, 1) + group_s
    sums = ()
    for _token in gl.static_range(TOKENS):
        sums = sums + (gl.zeros([BN, GC, WORDS], gl.float32, cube),)
    for start in gl.static_range(0, G, GC * UNROLL):
        ws = ()
        ss = ()
        for i in gl.static_range(UNROLL):
            if start + i * GC < G:
                left = G - start - i * GC
                w_live = gl.expand_dims(group_x < left, 0)
                ws = ws + (_load_weights(w_at + (start + i * GC) * WORDS, w_live, start + i * GC + GC > G),)
                ss = ss + (load_live(s_at + start + i * GC, group_s < left, start + i * GC + GC > G),)
        if PDL and start == 0:
            x += 4 * grid_wait(N)  # 0; as a multiple of 16 bytes it keeps what is known of x's alignment
        for i in gl.static_range(UNROLL):
            if start + i * GC < G:
                live = group_x < G - start - i * GC
                s = gl.expand_dims(ss[i].to(gl.float32), 2)
                low = (ws[i] << 4) & -252645136  # 0xF0F0F0F0: 16 times the nibbles, as signed bytes
                high = ws[i] & -252645136
                new = ()
                for token in gl.static_range(TOKENS):
                    x_at = x + token * 2 * KW + (start + i * GC) * WORDS + inner
                    even = gl.expand_dims(load_live(x_at, live, start + i * GC + GC > G), 0)
                    odd = gl.expand_dims(load_live(x_at + KW, live, start + i * GC + GC > G), 0)
                    product = _dot4(high, odd, _dot4(low, even, 0))
                    new = new + (sums[token] + product.to(gl.float32) * s,)
                sums = new
    if R > 0:
        RB: gl.constexpr = R // 2 if R < 64 else 32
        flat: gl.constexpr = gl.BlockedLayout([ROWS, R // 2 // RB], [32 // RB, RB], [WARPS, 1], [1, 0])
        u_row = gl.minimum(n0 + gl.arange(0, BN, gl.SliceLayout(1, flat)), N - 1)
        byte = gl.arange(0, R // 2, gl.SliceLayout(0, flat))
        u = gl.load(up + gl.expand_dims(u_row * (R // 2), 1) + gl.expand_dims(byte, 0)).to(gl.int8, bitcast=True)
        u_low = ((u << 4) >> 4).to(gl.float32)
        u_high = (u >> 4).to(gl.float32)
        u_scale = gl.load(up_scale + row).to(gl.float32)
    live_rows = n0 + gl.arange(0, BN, by_row) < N
    for token in gl.static_range(TOKENS):
        value = gl.sum(gl.sum(sums[token], axis=2), axis=1) * (gl.load(x_scale + token) * 0.0625)
        if R > 0:
            t_even = gl.expand_dims(gl.load(t + token * R + byte).to(gl.float32), 0)
            t_odd = gl.expand_dims(gl.load(t + token * R + R // 2 + byte).to(gl.float32), 0)
            value += gl.convert_layout(gl.sum(u_low * t_even + u_high * t_odd, axis=1), by_row) * u_scale
        if HAS_BIAS:
            value += gl.load(bias + row).to(gl.float32)
        if HAS_ADDEND:
            value += gl.load(addend + token * N + row).to(gl.float32)
        gl.store(y + token * N + row, value.to(y.dtype.element_ty), mask=live_rows)
