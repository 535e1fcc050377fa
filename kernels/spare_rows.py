"""Rows in memory behind the last token of a product's operand.

TMA fills rows that its descriptor does not have with zeros, and takes longer over it than over rows that are there: on
an H200 28672 x 4096 took 137 us at 264 tokens in tiles of 256, and 92 with 248 spare rows. So what makes operands
allocates whole tiles, and a descriptor counts the rows that the storage has. They are not initialized; what a kernel
makes of them reaches no result.
"""

import math

import torch
import triton

_LARGEST_TILE = 256


def empty_with_spare_rows(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized (..., K) tensor on the device of ``like``, at the beginning of whole tiles of any size that the
    products choose: powers of two up to 256, below twice the tokens."""
    *lead, k = shape
    tokens = math.prod(lead)
    tile = min(_LARGEST_TILE, triton.next_power_of_2(max(tokens, 1)))
    return like.new_empty(-(-tokens // tile) * tile * k, dtype=dtype)[: tokens * k].view(shape)


def rows_in_storage(x: torch.Tensor, tile: int) -> int:
    """How many rows a descriptor of contiguous x (T, K) may have: whole tiles, or as many as there are."""
    tokens, k = x.shape
    there = (x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()) // k
    return min(there, -(-tokens // tile) * tile)
