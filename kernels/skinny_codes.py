"""Codes of 2 and 3 bits of the skinny form of ``tqcompile::lattice_linear``: 16 of a word to eight pairs of floats."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.twin_skinny import split_columns


def _low_bits(i: int, word: str, place: int, bits: int, base: int) -> str:
    """PTX: ``bits`` bits from ``place`` on, in both halves of a word, under the exponent of a base -> $i."""
    return f"lop3.b32 ${i}, {word}, {((1 << bits) - 1 << place) * 0x10001:#x}, {base * 0x10001:#x}, 0xEA;"


def _pairs(bits: int, pair: str, one: int, bases: tuple[int, int, int], spread: bool = False) -> gl.constexpr:
    """PTX: a word of 16 low codes in $8 (their high bits in $9: of 0 to 7 in the low byte, of the others from bit 16
    on) -> codes i and i + 8 in $i, two floats. Under the exponent of a base, a code reads base + code where its lowest
    bit is worth 1: at bits 0, 2 and 4 for three bases, so a shift serves two or three pairs. The fma leaves the code.

    spread: 3 bits with a quarter less of logic, through a chain of multiply-adds and more registers.
    """
    lines = [".reg .b32 a, b, h, t, e, o, one, n0, n2, n4;"]
    if bits == 3 and not spread:  # at 2 bits each just before its use: as measured
        lines.append("shr.u32 a, $8, 6; shr.u32 b, $8, 12;")
    lines.append(f"mov.b32 one, {one * 0x10001:#x};")
    lines += [f"mov.b32 n{2 * i}, {base * 0x10001 | 0x80008000:#x};" for i, base in enumerate(bases)]

    def leave(i: int, place: int) -> str:
        return f"fma.rn.{pair} ${i}, ${i}, one, n{place};"

    if not spread:
        for i in range(8):
            place = 2 * (i % 3)
            if bits == 2 and i in (3, 6):
                lines.append(f"shr.u32 {' ab'[i // 3]}, $8, {2 * i};")
            lines.append(_low_bits(i, ("$8", "a", "b")[i // 3], place, 2, bases[i % 3]))
            if bits == 3:
                left = place + 2 - i
                lines.append(f"shl.b32 h, $9, {left};" if left >= 0 else f"shr.u32 h, $9, {-left};")
                lines.append(f"lop3.b32 ${i}, h, {(4 << place) * 0x10001:#x}, ${i}, 0xEA;")
            lines.append(leave(i, place))
        return gl.constexpr(" ".join(["{", *lines, "}"]))
    # High bits spread to pairs of neighbours, 4 apart: what a multiply-add moves costs no logical instruction.
    lines.append("and.b32 t, $9, 0x00F000F0; mad.lo.u32 h, t, 15, $9;")
    lines.append("and.b32 t, h, 0x0C0C0C0C; mad.lo.u32 h, t, 3, h;")
    # Codes 0, 2, .. in the nibbles of e and 1, 3, .. in those of o; their fourth bits are anything.
    lines.append("mul.lo.u32 t, h, 4; lop3.b32 e, $8, t, 0x33333333, 0xE4;")
    lines.append("mul.lo.u32 t, h, 2; shr.u32 o, $8, 2; lop3.b32 o, o, t, 0x33333333, 0xE4;")
    for first, word in ((0, "e"), (1, "o")):
        for half in (0, 4):
            if half:
                lines.append(f"shr.u32 {word}, {word}, 8;")
            for i, place in ((first + half, 0), (first + half + 2, 4)):
                lines += [_low_bits(i, word, place, 3, bases[place // 2]), leave(i, place)]
    return gl.constexpr(" ".join(["{", *lines, "}"]))


_BF16 = ("bf16x2", 0x3F80, (0x4300, 0x4200, 0x4100))  # 1; 128, 32, 8
_FP16 = ("f16x2", 0x3C00, (0x6400, 0x5C00, 0x5400))  # 1; 1024, 256, 64
_BF16_2, _BF16_3, _FP16_2, _FP16_3 = (_pairs(bits, *form) for form in (_BF16, _FP16) for bits in (2, 3))
_BF16_3_SPREAD, _FP16_3_SPREAD = (_pairs(3, *form, spread=True) for form in (_BF16, _FP16))
_OUTPUTS = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@gluon.jit
def permute(a, b, ORDER: gl.constexpr):
    """Four of the eight bytes of a and b."""
    asm: gl.constexpr = f"prmt.b32 $0, $1, $2, {ORDER};"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def codes_of_word(word, BITS: gl.constexpr, TILES: gl.constexpr, FLOAT: gl.constexpr):
    """Codes i and i + 8 of a word (and its high bits), two floats, for i = 0 to 7. With more tokens registers are
    scarce."""
    bf16: gl.constexpr = _BF16_2 if BITS == 2 else _BF16_3_SPREAD if TILES == 1 else _BF16_3
    fp16: gl.constexpr = _FP16_2 if BITS == 2 else _FP16_3_SPREAD if TILES == 1 else _FP16_3
    asm: gl.constexpr = bf16 if gl.bfloat16 == FLOAT else fp16
    return gl.inline_asm_elementwise(
        asm, _OUTPUTS, [word[0], word[1]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def row_words(ws, highs, at: gl.constexpr, layout: gl.constexpr, BITS: gl.constexpr):
    """A lane's two words of low bits of a row of a unit, each with its high bits."""
    low0, low1 = split_columns(ws[at], layout)
    high0, high1 = low0, low1
    if BITS == 3:
        high0 = permute(highs[at], 0 * low0, 0x4140)
        high1 = permute(highs[at], 0 * low0, 0x4342)
    return (low0, high0), (low1, high1)
