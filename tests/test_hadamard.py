"""Rotations: orthogonality, the hex form of the signs, and which block a width gets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqcompile.methods.hadamard import (
    hadamard_matrix,
    mixing_matrix,
    random_signs,
    rotate_blocks,
    rotation_block,
    signed_hadamard,
)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_symmetric_and_flat(size):
    h = hadamard_matrix(size, torch.float64)
    # Sums of `size` products of entries that carry one rounding each.
    assert torch.allclose(h @ h, torch.eye(size, dtype=torch.float64), rtol=0, atol=size * 2.0**-52)
    assert torch.equal(h, h.t())
    assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5), rtol=2.0**-52, atol=0)


@pytest.mark.parametrize("size", [0, 3, 12, -4])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"power of two, got {size}"):
        hadamard_matrix(size)


@pytest.mark.parametrize(
    ("channels", "block"),
    [(4096, 128), (128, 128), (64, 64), (192, 64), (48, 16), (96, 32), (16, 16), (8, 0), (24, 0), (100, 0), (7, 0)],
)
def test_rotation_block_is_the_largest_power_of_two_up_to_128(channels, block):
    assert rotation_block(channels) == block


@given(st.sampled_from([16, 32, 64, 128]), st.integers(0, 2**31))
def test_signs_round_trip_through_hex(size, seed):
    signs = random_signs(size, torch.Generator().manual_seed(seed))
    assert len(signs) == size // 4
    assert set(signs) <= set("0123456789abcdef")
    # Column 0 of Sylvester's matrix is positive: it shows the signs.
    shown = "".join("1" if value > 0 else "0" for value in signed_hadamard(signs)[:, 0])
    assert shown == f"{int(signs, 16):0{size}b}"


def test_leading_minus_signs_are_not_lost():
    rotation = signed_hadamard("0" * 3 + "1")
    assert rotation.shape == (16, 16)
    assert (rotation[:15, 0] < 0).all()
    assert rotation[15, 0] > 0


def test_signs_are_random_and_seeded():
    a, b, c = (random_signs(128, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a == b
    assert a != c
    assert 30 < bin(int(a, 16)).count("1") < 98  # six standard deviations of a fair coin


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_stored_rotation_is_orthogonal_up_to_one_factor(size):
    q = signed_hadamard(random_signs(size, torch.Generator().manual_seed(3))).double()
    factor = q[0, 0] ** 2 * size
    # Every entry is the same bfloat16 magnitude, so the product is exactly a multiple of the identity.
    assert torch.equal(q @ q.t(), factor * torch.eye(size, dtype=torch.float64))
    assert abs(factor - 1) <= 2 * 2.0**-8


@pytest.mark.parametrize("size", [16, 10, 7, 48])
def test_mixing_matrix_is_orthogonal_and_seeded(size):
    first, second = (mixing_matrix(size, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    # A float32 QR of a (size, size) matrix is orthogonal to size * 2**-23.
    assert torch.allclose(first.double() @ first.double().t(), torch.eye(size).double(), rtol=0, atol=size * 2.0**-22)


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 32), (16,)])
def test_rotate_blocks_is_the_block_diagonal_product(shape):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    q = torch.randn(16, 16, generator=g, dtype=torch.float64)
    expected = x @ torch.block_diag(*[q] * (shape[-1] // 16))
    assert torch.allclose(rotate_blocks(x, q), expected, rtol=0, atol=1e-13)
