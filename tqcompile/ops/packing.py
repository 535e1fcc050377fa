"""The canonical 4-bit layout, used on disk, in ``state_dict`` and by every op.

A row-major matrix of signed integers in [-8, 7], shape (N, K) with K even, is stored as uint8 (N, K/2):
byte j of a row holds element 2j in its low nibble and element 2j+1 in its high nibble, two's complement.
Scales are (N, K/g) for groups of g consecutive elements of a row; value = integer * scale.
"""

import torch


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack signed 4-bit integers.

    Args:
        values: (..., K) integers in [-8, 7], K even, any integer dtype.
    Returns:
        (..., K/2) uint8.
    Raises:
        ValueError: K is odd, or a value does not fit in four bits.
    """
    if values.shape[-1] % 2:
        raise ValueError(f"pack_int4: the last dimension must be even, got shape {tuple(values.shape)}")
    if values.numel() and (values.min() < -8 or values.max() > 7):
        raise ValueError("pack_int4: values must lie in [-8, 7]")
    nibbles = values.to(torch.int8).view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_int4`: (..., K/2) uint8 -> (..., K) int8. Plain ops, so it can be traced by FX."""
    signed = packed.view(torch.int8)
    low = (signed << 4) >> 4
    high = signed >> 4
    return torch.stack((low, high), -1).flatten(-2)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed (N, K/2) uint8 with scales (N, K/g) -> (N, K) float32."""
    values = unpack_int4(packed).float()
    grouped = values.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.float().unsqueeze(-1)).flatten(-2)
