"""Codes of ``lattice_gemv``: how a lane gets those it needs, and how they become bytes. A lane has 16 bytes of the low
bits of every pair of units and every row, and for 3 bits 8 bytes of the high ones."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcompile.kernels.gluon_common import async_load, load_live

_LOW = gl.constexpr("{ .reg .b32 s; and.b32 $0, $4, 0x03030303; and.b32 $1, $4, 0x0C0C0C0C; shr.u32 s, $4, 4; "
                    "and.b32 $2, s, 0x03030303; and.b32 $3, s, 0x0C0C0C0C; }")  # fmt: skip
# The high bits of 16 codes are two bytes, the lower one in both lower bytes of $5: after two masks, each byte has four.
_HIGH = gl.constexpr(
    "{ .reg .b32 s, h, u; shr.u32 s, $4, 4; shr.u32 h, $5, 4; and.b32 h, h, 0x0F000F00; "
    "lop3.b32 u, $5, 0x000F000F, h, 0xEA; "
    "and.b32 $0, $4, 0x03030303; shl.b32 h, u, 2; lop3.b32 $0, h, 0x04040404, $0, 0xEA; "
    "and.b32 $1, $4, 0x0C0C0C0C; shl.b32 h, u, 3; lop3.b32 $1, h, 0x10101010, $1, 0xEA; "
    "and.b32 $2, s, 0x03030303; lop3.b32 $2, u, 0x04040404, $2, 0xEA; "
    "and.b32 $3, s, 0x0C0C0C0C; shl.b32 h, u, 1; lop3.b32 $3, h, 0x10101010, $3, 0xEA; }"
)


@gluon.jit
def unpack(word, high, BITS: gl.constexpr):
    """Columns 0, 1, 2, 3 of every four of a word of 16 codes, a byte each; columns 1 and 3 times four.
    high: for 3 bits, the word's two bytes of high bits, each twice."""
    if BITS == 3:
        return gl.inline_asm_elementwise(
            _HIGH, "=&r,=&r,=&r,=&r,r,r", [word, high],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        _LOW, "=&r,=&r,=&r,=&r,r", [word], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def twice(high, ORDER: gl.constexpr):
    """Two of the four bytes, each in two neighbouring ones."""
    asm: gl.constexpr = f"prmt.b32 $0, $1, $1, {ORDER};"
    return gl.inline_asm_elementwise(asm, "=r,r", [high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_codes(
    w_at, high_at, half_w, half_h, start: gl.constexpr, UNROLL: gl.constexpr, OWN: gl.constexpr, U: gl.constexpr,
    BITS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """The codes of pairs start .. start + UNROLL of every row, in registers: low bits, high bits."""
    lows = ()
    highs = ()
    for i in gl.static_range(start, start + UNROLL):
        if i < OWN:
            for r in gl.static_range(len(w_at)):
                lows = lows + (load_live(w_at[r] + i * 16, half_w < 2 * U - 4 * i, EDGE),)
                if BITS == 3:
                    highs = highs + (load_live(high_at[r] + i * 8, half_h < 2 * U - 4 * i, EDGE),)
    return lows, highs


@gluon.jit
def room(W: gl.constexpr, WORDS: gl.constexpr):
    """Shared memory for WORDS words of every lane."""
    return gl.allocate_shared_memory(gl.int32, [W, 32, WORDS], gl.SwizzledSharedLayout(WORDS, 1, 1, [2, 1, 0]))


@gluon.jit
def _copy(room, at, live, MASKED: gl.constexpr):
    if MASKED:
        async_load(room, at, mask=live)
    else:
        async_load(room, at)


@gluon.jit
def ask_for(
    lows, highs, w_at, high_at, half_w, half_h, step: gl.constexpr, UNROLL: gl.constexpr, OWN: gl.constexpr,
    U: gl.constexpr, BITS: gl.constexpr, DEPTH: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Copy the codes of UNROLL pairs of every row, each lane its own, to where step - DEPTH had them."""
    for i in gl.static_range(step * UNROLL, (step + 1) * UNROLL):
        if i < OWN:
            for r in gl.static_range(len(w_at)):
                _copy(lows[i % (DEPTH * UNROLL) * len(w_at) + r], w_at[r] + i * 16, half_w < 2 * U - 4 * i, EDGE)
                if BITS == 3:
                    _copy(highs[i % (DEPTH * UNROLL) * len(w_at) + r], high_at[r] + i * 8, half_h < 2 * U - 4 * i, EDGE)
    async_copy.commit_group()


@gluon.jit
def arrived(
    lows, highs, place: gl.constexpr, number: gl.constexpr, of_w: gl.constexpr, of_h: gl.constexpr, BITS: gl.constexpr
):
    """As :func:`load_codes`, of what was copied."""
    ws = ()
    hs = ()
    for i in gl.static_range(place * number, (place + 1) * number):
        ws = ws + (lows[i].load(of_w),)
        if BITS == 3:
            hs = hs + (highs[i].load(of_h),)
    return ws, hs
