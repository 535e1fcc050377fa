"""Operands are allocated in whole tiles, and a descriptor counts no row that is not there."""

import pytest
import torch
from kernel_bounds import BF16

pytest.importorskip("triton")
from tqcompile.kernels import prologue
from tqcompile.kernels.spare_rows import empty_with_spare_rows, rows_in_storage


@pytest.mark.parametrize(("t", "rows"), [(1, 1), (2, 2), (5, 8), (16, 16), (17, 32), (72, 128), (160, 256), (257, 512)])
def test_whole_tiles_of_every_size_are_there(t, rows):
    x = empty_with_spare_rows(torch.empty(0), (t, 48), torch.int8)
    assert (tuple(x.shape), x.dtype) == ((t, 48), torch.int8)
    assert x.is_contiguous()
    tile = 1
    while tile < 2 * t and tile <= 256:  # what products choose from
        assert rows_in_storage(x, tile) == -(-t // tile) * tile <= rows
        tile *= 2
    assert rows_in_storage(x, 512) == min(rows, 512)


def test_no_row_is_counted_that_is_not_there():
    storage = torch.empty(10 * 6 + 5)
    assert rows_in_storage(storage[:60].view(10, 6), 16) == 10
    assert rows_in_storage(storage[12:24].view(2, 6), 16) == 8  # 53 numbers are left
    assert rows_in_storage(storage[60:].view(1, 5), 16) == 1
    assert rows_in_storage(torch.empty(32, 6, dtype=BF16)[:17], 16) == 32


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_prologue_leaves_spare_rows(bits):
    x, down = torch.randn(3, 7, 64).to(BF16), torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    ratio = 7 / 127 if bits == 4 else 0.0
    args = (x, None, None, None, None, down, torch.rand(8, 1), "none", 0.0, bits, ratio, True, 1)
    operand, _, _, _, wide = prologue.launch(*args)
    assert operand.shape == x.shape
    assert rows_in_storage(operand.view(-1, 64), 32) == 32
    assert wide.numel() == 0 or rows_in_storage(wide.view(-1, 64), 32) == 32
    assert (wide.numel() > 0) == (bits == 4)


def test_no_tokens():
    assert empty_with_spare_rows(torch.empty(0), (0, 8), BF16).shape == (0, 8)
