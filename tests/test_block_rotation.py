"""Block rotations of weights against a dense float64 product."""

import pytest
import torch
from tiny_models import random_orthogonal

from tqcompile.errors import ConfigError
from tqcompile.methods.hadamard import hadamard_matrix, signed_hadamard
from tqcompile.passes.block_rotation import (
    as_blocks,
    inverse_transpose,
    nearest_orthogonal,
    rotate_columns,
    rotate_rows,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (15,)], ids=str)
def test_columns_and_rows(shape):
    rotation = torch.randn(*shape, shape[-1], generator=seeded(), dtype=torch.float64)
    blocks = as_blocks(rotation, 15, "here")
    dense = torch.block_diag(*blocks)
    assert dense.shape == (15, 15)
    w, bias = (torch.randn(*s, generator=seeded(1), dtype=torch.float64) for s in [(7, 15), (15,)])
    torch.testing.assert_close(rotate_columns(w, blocks), w @ dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_rows(w.t(), blocks), dense.t() @ w.t(), rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_rows(bias, blocks), bias @ dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_rounding_only(dtype):
    w, blocks = torch.randn(33, 48, generator=seeded(2)).to(dtype), random_orthogonal(3, 16)
    expected = (w.double() @ torch.block_diag(*blocks)).to(dtype)
    rotated = rotate_columns(w, blocks)
    assert rotated.dtype == dtype
    # Sums in another order may fall on the other side of a rounding boundary: rarely, and by one unit.
    assert (rotated != expected).float().mean() < 1e-3
    torch.testing.assert_close(rotated, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_many_rows_are_done_in_pieces(monkeypatch):
    from tqcompile.passes import block_rotation

    monkeypatch.setattr(block_rotation, "_CHUNK", 4)
    w, blocks = torch.randn(11, 6, generator=seeded(3), dtype=torch.float64), random_orthogonal(2, 3)
    torch.testing.assert_close(rotate_columns(w, blocks), w @ torch.block_diag(*blocks), rtol=0, atol=1e-13)


def test_nearly_orthogonal_becomes_orthogonal():
    exact = random_orthogonal(4, 24)
    for noise in (0.0, 1e-6, 1e-4):
        near = (exact + noise * torch.randn(4, 24, 24, generator=seeded(4), dtype=torch.float64)).float()
        found = nearest_orthogonal(as_blocks(near, 96, "here"), "here")
        torch.testing.assert_close(found.mT @ found, torch.eye(24, dtype=torch.float64).expand(4, -1, -1))
        u, _, vh = torch.linalg.svd(near.double())  # the definition of the polar factor
        torch.testing.assert_close(found, u @ vh, rtol=0, atol=1e-13)


def test_a_bfloat16_hadamard_becomes_the_exact_one():
    rotation = signed_hadamard("f" * 32)
    blocks = nearest_orthogonal(as_blocks(rotation, 384, "here"), "here")
    assert blocks.shape == (3, 128, 128)
    torch.testing.assert_close(blocks[2], hadamard_matrix(128, torch.float64), rtol=0, atol=1e-14)


def test_inverse_transpose():
    blocks = torch.randn(3, 7, 7, generator=seeded(5), dtype=torch.float64)
    expected = torch.stack([torch.linalg.solve(b, torch.eye(7, dtype=torch.float64)).t() for b in blocks])
    torch.testing.assert_close(inverse_transpose(blocks, "here"), expected)
    orthogonal = random_orthogonal(2, 9)
    torch.testing.assert_close(inverse_transpose(orthogonal, "here"), orthogonal)


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (torch.eye(4), r"10 channels cannot be rotated by a tensor of shape \(4, 4\)"),
        (torch.ones(4), "cannot be rotated by a tensor of shape"),
        (torch.ones(2, 5, 4), "cannot be rotated"),
        (torch.ones(1, 2, 5, 5), "cannot be rotated"),
        (torch.zeros(0, 0), "cannot be rotated"),
        (torch.eye(5).expand(3, 5, 5), "10 channels are 2 blocks of 5, got 3 rotations"),
        (torch.eye(5) * torch.nan, "NaN or infinity"),
    ],
)
def test_refused_shapes(rotation, reason):
    with pytest.raises(ConfigError, match=f"^here: .*{reason}"):
        as_blocks(rotation, 10, "here")


def test_refused_values():
    with pytest.raises(ConfigError, match="here: the rotation is not orthogonal"):
        nearest_orthogonal(1.1 * torch.eye(4, dtype=torch.float64)[None], "here")
    for singular in (torch.zeros(1, 3, 3), torch.ones(1, 3, 3), torch.diag(torch.tensor([1.0, 1.0, 1e-5]))[None]):
        with pytest.raises(ConfigError, match="here: the rotation is not invertible"):
            inverse_transpose(singular.double(), "here")
