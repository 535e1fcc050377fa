"""What the kernels' inline assembly makes of packed words, without a GPU: their PTX, interpreted, against shifts."""

import numpy as np
import pytest
import torch
from ptx import pair, run, words

pytest.importorskip("triton")
from tqcompile.kernels import gemv_codes as gemv
from tqcompile.kernels import lattice_gemv, twin_linear
from tqcompile.kernels import lattice_wgmma as wgmma
from tqcompile.kernels import skinny_codes as skinny
from tqcompile.kernels import wgmma_tiles as tiles

COUNT = 4096
DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
NAMES = {"bf16x2": "BF16", "f16x2": "FP16"}


@pytest.fixture
def rng():
    return np.random.default_rng()


def random_words(rng):
    return rng.integers(0, 2**32, COUNT, dtype=np.uint32)


def nibbles(word, high: int) -> np.ndarray:
    """(n, 4) the low or the high signed nibbles of the bytes."""
    return ((word[:, None] >> np.arange(0, 32, 8) + 4 * high & 0xF).astype(np.int32) ^ 8) - 8


def signed_bytes(word) -> np.ndarray:
    return np.ascontiguousarray(word).view(np.int8).reshape(-1, 4).astype(np.int32)


def codes(low, high, bits: int) -> np.ndarray:
    """(n, 16) codes: two bits each of ``low``, the third of ``high``, whose bits 0 to 15 they are."""
    value = (low[:, None] >> np.arange(0, 32, 2) & 3).astype(np.int32)
    return value if bits == 2 else value | (high[:, None] >> np.arange(16) & 1).astype(np.int32) << 2


def apart(high) -> np.ndarray:
    """Two bytes of high bits, the second from bit 16 on."""
    return (high & 0xFF) | (high >> 8 & 0xFF) << 16


@pytest.mark.parametrize(("asm", "dtype"), [(twin_linear.BF16_NIBBLES, "bf16x2"), (twin_linear.FP16_NIBBLES, "f16x2")])
def test_nibbles_become_floats(asm, dtype, rng):
    word = random_words(rng)
    found = torch.cat([pair(part, DTYPES[dtype]) for part in run(asm.value, 4, [word])], 1)
    assert np.array_equal(found.float().numpy(), np.concatenate([nibbles(word, 0), nibbles(word, 1)], 1))


def test_nibbles_times_a_group_scale_become_bytes(rng):
    word, m = random_words(rng), rng.integers(1, 17, COUNT).astype(np.int64)
    offset = (m * -0x08080808 - 2139062144) & 0xFFFFFFFF
    low, high = run(tiles._UNPACK.value, 2, [word, *[m] * 4, *[offset] * 4])
    assert np.array_equal(signed_bytes(low), nibbles(word, 0) * m[:, None])
    assert np.array_equal(signed_bytes(high), nibbles(word, 1) * m[:, None])


@pytest.mark.parametrize(
    ("asm", "dtype", "middle"), [(tiles._UNPACK_BF16, "bf16x2", -136), (tiles._UNPACK_FP16, "f16x2", -1032)]
)
def test_nibbles_times_a_group_scale_become_floats(asm, dtype, middle, rng):
    word, m = random_words(rng), rng.integers(1, 17, COUNT)
    twice = torch.from_numpy(m).to(DTYPES[dtype])[:, None].repeat(1, 2)
    scale, offset = words(twice), words(twice * middle)
    found = torch.cat(
        [pair(part, DTYPES[dtype]) for part in run(asm.value, 4, [word, scale, scale, offset, offset])], 1
    )
    expected = np.concatenate([nibbles(word, 0), nibbles(word, 1)], 1) * m[:, None]
    assert np.array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize(("bits", "form"), [(2, "2"), (3, "3"), (3, "3_SPREAD")])
@pytest.mark.parametrize("dtype", ["bf16x2", "f16x2"])
def test_codes_of_the_skinny_form_become_pairs(bits, form, dtype, rng):
    asm = getattr(skinny, f"_{NAMES[dtype]}_{form}").value
    low, high = random_words(rng), random_words(rng) & 0xFFFF
    found = run(asm, 8, [low, apart(high)])
    expected = codes(low, high, bits)
    for i in range(8):
        assert np.array_equal(pair(found[i], DTYPES[dtype]).float().numpy(), expected[:, [i, i + 8]]), i


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_the_gemv_form_become_bytes(bits, rng):
    low, high = random_words(rng), random_words(rng) & 0xFFFF
    first, second = high & 0xFF, high >> 8
    inputs = [low] if bits == 2 else [low, first | first << 8 | second << 16 | second << 24]
    found = run((gemv._LOW if bits == 2 else gemv._HIGH).value, 4, inputs)
    expected = codes(low, high, bits)
    for i in range(4):
        assert np.array_equal(signed_bytes(found[i]), expected[:, i::4] * (4 if i % 2 else 1)), i


def test_integers_of_x_become_three_digits(rng):
    value = rng.integers(-(2**21), 2**21 + 1, (4, COUNT))
    found = run(lattice_gemv._DIGITS.value, 3, [v + 0x8080 & 0xFFFFFFFF for v in value])
    high, middle, low = (signed_bytes(part) for part in found)
    assert np.array_equal(high * 2**16 + middle * 2**8 + low, value.T)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", ["bf16x2", "f16x2"])
@pytest.mark.parametrize("mode", ["none", "zero", "offset"])
def test_codes_of_the_wgmma_form_become_weights(bits, dtype, mode, rng):
    """A word has two bytes of a row, then two of another; the third bits of a row's two bytes are a nibble each."""
    low = random_words(rng)
    third = rng.integers(0, 256, (2, COUNT), dtype=np.uint32)  # of each row
    high = third[0] | third[0] << 8 | third[1] << 16 | third[1] << 24
    code = (low[:, None] >> np.arange(0, 32, 2) & 3).astype(np.float64).reshape(-1, 2, 2, 4)  # row, byte, plane
    if bits == 3:
        code += 4 * (third.T[:, :, None] >> np.arange(8) & 1).reshape(-1, 2, 2, 4)
    float16 = DTYPES[dtype]
    scale = (torch.rand(COUNT, 2) * 0.02 + 0.01).to(float16)
    inputs = [low, high, *(words(scale[:, [row, row]]) for row in (0, 1))]
    expected = code
    if mode == "zero":
        zero = torch.from_numpy(rng.integers(0, 4 * (2**bits - 1) + 1, (COUNT, 2))) / 4.0
        early = dtype == "bf16x2" and bits == 2
        minus = (-zero - (4 if early else 0)).to(float16)
        inputs += [words(minus[:, [row, row]]) for row in (0, 1)]
        expected = code - zero.numpy()[:, :, None, None]
    beyond = np.zeros((COUNT, 2, 4))
    if mode == "offset":
        shift = (torch.randn(COUNT, 2, 4) * 0.01).to(float16)
        inputs += [words(shift[:, row, i][:, None].repeat(1, 2)) for i in range(4) for row in (0, 1)]
        expected, beyond = code - (2**bits - 1) / 2, shift.double().numpy()
    found = run(getattr(wgmma, f"_{NAMES[dtype]}_{bits}_{mode.upper()}").value, 8, inputs)
    exact = torch.from_numpy(expected * scale.double().numpy()[:, :, None, None] + beyond[:, :, None, :]).to(float16)
    for i in range(4):
        for row in (0, 1):
            assert torch.equal(pair(found[2 * i + row], float16), exact[:, row, :, i]), (i, row)
