"""Rotations of blocks of channels, folded into weights: blockdiag(Q_1 .. Q_n) applied to columns or to rows.

Everything is computed in float64 and rounded once, to the dtype of what was given.
"""

import torch

from tqcompile.errors import ConfigError

MAX_DEVIATION = 1e-2
MAX_CONDITION = 1e4
_CHUNK = 1 << 14


def as_blocks(rotation: torch.Tensor, channels: int, what: str) -> torch.Tensor:
    """``rotation``, (b, b) for one shared block or (channels / b, b, b), as (channels / b, b, b) float64.

    Raises:
        ConfigError: other shapes, or values that are not finite; ``what`` names the place.
    """
    blocks = rotation.detach().double()
    blocks = blocks[None] if blocks.ndim == 2 else blocks
    size = blocks.shape[-1]
    if blocks.ndim != 3 or not size or blocks.shape[1] != size or channels % size:
        raise ConfigError(
            f"{what}: {channels} channels cannot be rotated by a tensor of shape {tuple(rotation.shape)}; pass (b, b) "
            f"or (n, b, b) with n * b = {channels}"
        )
    count = channels // size
    if blocks.shape[0] not in (1, count):
        raise ConfigError(f"{what}: {channels} channels are {count} blocks of {size}, got {blocks.shape[0]} rotations")
    if not torch.isfinite(blocks).all():
        raise ConfigError(f"{what}: the rotation holds NaN or infinity")
    return blocks.expand(count, size, size)


def nearest_orthogonal(blocks: torch.Tensor, what: str) -> torch.Tensor:
    """The orthogonal factor of the polar decomposition of every block: (n, b, b) float64.

    A rotation learned in float32, or a Hadamard matrix stored in bfloat16, is orthogonal only nearly; an RMSNorm
    needs it exact. Newton-Schulz iteration: each step squares the deviation.

    Raises:
        ConfigError: a block is further than MAX_DEVIATION from orthogonal.
    """
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    shared = blocks.stride(0) == 0  # as_blocks expands one block
    x = blocks[:1] if shared else blocks
    deviation = float((x.mT @ x - eye).abs().max())
    if deviation > MAX_DEVIATION:
        raise ConfigError(
            f"{what}: the rotation is not orthogonal: an element of Q^T Q - I is {deviation:.2g}. Pass an orthogonal Q."
        )
    for _ in range(8):
        gram = x.mT @ x
        x = 1.5 * x - 0.5 * x @ gram
        if (gram - eye).abs().max() < 1e-7:  # the step above has squared this
            break
    return x.expand_as(blocks)


def inverse_transpose(blocks: torch.Tensor, what: str) -> torch.Tensor:
    """Q^-T of every block, (n, b, b): equal to Q where Q is orthogonal.

    Raises:
        ConfigError: a block is singular, or so close to it that rounding errors would be multiplied.
    """
    singular_values = torch.linalg.svdvals(blocks)
    condition = float((singular_values[..., 0] / singular_values[..., -1]).max())
    if not condition < MAX_CONDITION:
        raise ConfigError(f"{what}: the rotation is not invertible (condition number {condition:.2g})")
    return torch.linalg.inv(blocks).mT


def rotate_columns(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """W (N, K) -> W blockdiag(blocks), in the dtype of W. blocks: (n, b, b) float64 with n * b = K."""
    blocks = blocks.to(weight.device)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, into in zip(weight.split(_CHUNK), out.split(_CHUNK), strict=True):  # an embedding has many rows
        parts = rows.double().unflatten(-1, (blocks.shape[0], -1)).transpose(0, 1)
        into.copy_((parts @ blocks).transpose(0, 1).flatten(1))
    return out


def rotate_rows(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """W (N, K), or a bias (N,), -> blockdiag(blocks)^T W, in the dtype of W. blocks: (n, b, b) with n * b = N."""
    columns = weight[None] if weight.ndim == 1 else weight.t()
    rotated = rotate_columns(columns, blocks)
    return rotated[0] if weight.ndim == 1 else rotated.t().contiguous()
