"""The values of t that a program of ``prologue`` computes of the one token it holds.

Integers meet four at a time: words of four neighbouring values of a plane, and words of eight weights.
"""

import triton
import triton.language as tl


@triton.jit
def in_planes(r, R):
    """Where element r of R stands in plane order."""
    return r % 2 * (R // 2) + r // 2


@triton.jit
def words_of(q, INTERPRET: tl.constexpr):
    """(ROWS, 4 W) int32 in -128 .. 127 -> (ROWS, W) int32, four neighbours a word."""
    a, b = tl.split(tl.reshape(q, [q.shape[0], q.shape[1] // 4, 2, 2]))
    first, third = tl.split(a)
    second, fourth = tl.split(b)
    if INTERPRET:
        return first & 255 | (second & 255) << 8 | (third & 255) << 16 | fourth << 24
    return tl.inline_asm_elementwise(
        "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x40; prmt.b32 h, $3, $4, 0x40; prmt.b32 $0, l, h, 0x5410; }",
        "=r,r,r,r,r", [first, second, third, fourth], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _dot_words(d, even, odd, INTERPRET: tl.constexpr):
    """16 times the sum of 8 products: nibbles of d, low ones times the bytes of even, high ones times those of odd."""
    if INTERPRET:
        total = tl.zeros_like(d)
        for i in tl.static_range(4):
            total += ((d << 28 - 8 * i) >> 28) * ((even << 24 - 8 * i) >> 24)
            total += ((d << 24 - 8 * i) >> 28) * ((odd << 24 - 8 * i) >> 24)
        return total * 16
    return tl.inline_asm_elementwise(
        """{ .reg .b32 l, h; shl.b32 l, $1, 4; and.b32 l, l, 0xF0F0F0F0; and.b32 h, $1, 0xF0F0F0F0;
        dp4a.s32.s32 l, l, $2, 0; dp4a.s32.s32 $0, h, $3, l; }""",
        "=r,r,r,r", [d, even, odd], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def down_rows(
    down, down_scale, r, row, K, limit, COLS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Rows r (STEP,) < limit of down, words (STEP, ROWS, COLS / 8) or bytes (STEP, ROWS, COLS / 2), and their scales,
    of the same shape or (STEP, ROWS)."""
    per: tl.constexpr = 8 if WORDS else 2
    unit = row * (COLS // per) + tl.arange(0, COLS // per)[None, :]
    r2, r3 = r[:, None], r[:, None, None]
    live = (unit < K // per)[None, :, :] & (r3 < limit)
    d = tl.load(down + r3 * (K // per) + unit[None, :, :], mask=live, other=0)
    if GROUP % COLS == 0:  # one scale for a row of the tile
        first = tl.reshape(row, [1, row.shape[0]]) * COLS
        scale = tl.load(down_scale + r2 * (K // GROUP) + first // GROUP, mask=(first < K) & (r2 < limit), other=0.0)
    else:
        scale = tl.load(down_scale + r3 * (K // GROUP) + (unit * per // GROUP)[None, :, :], mask=live, other=0.0)
    return d, scale.to(tl.float32)


@triton.jit
def t_values(
    d, down_scale, even, odd, scale, A_ROW: tl.constexpr, INT: tl.constexpr, WORDS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """(STEP,) values of t from rows of down, as :func:`down_rows` gives them, and the token's two planes."""
    if WORDS:
        products = _dot_words(d, even[None, :, :], odd[None, :, :], INTERPRET)
    else:
        wide = d.to(tl.int8, bitcast=True).to(tl.int32)
        low, high = (wide << 28) >> 28, wide >> 4
        if INT:
            products = low * even[None, :, :] + high * odd[None, :, :]
        else:
            products = low.to(tl.float32) * even[None, :, :] + high.to(tl.float32) * odd[None, :, :]
    if A_ROW:  # integers have exact sums
        sums = tl.sum(products, axis=2).to(tl.float32) * down_scale
    else:
        sums = tl.sum(products.to(tl.float32) * down_scale, axis=2)
    return tl.sum(sums, axis=1) * (scale * 0.0625 if WORDS else scale)
