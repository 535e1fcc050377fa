"""The canonical packed layouts, used on disk, in ``state_dict`` and by every op: 4 bits here, fewer in pack_codes.

A row-major matrix of signed integers in [-8, 7], shape (N, K) with K even, is stored as uint8 (N, K/2):
byte j of a row holds element 2j in its low nibble and element 2j+1 in its high nibble, two's complement.
Scales are (N, K/g) for groups of g consecutive elements of a row; value = integer * scale.

The scales of a residual are moreover integer multiples 1 to 16 of one number per row, so that integer * multiple
fits in int8 and a kernel can sum a whole row before it scales once (:func:`integer_scales`).
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


MAX_MULTIPLE = 16


def integer_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Write the group scales of every row as one number times small integers, exactly.

    The number is the greatest common divisor of a row's scales, so a row that has such a form at all is found, and
    its integers have no common factor.

    Args:
        scale: (N, G) bfloat16, or another floating dtype holding bfloat16 values.
    Returns:
        c (N,) float32 and m (N, G) uint8 in [1, 16] with c * m == scale; None when a row has no such form (or a
        scale is not positive and finite, or c is too small for a normal float32).
    """
    s = scale.float()
    if not (torch.isfinite(s).all() and (s > 0).all()):
        return None
    low, high = s.amin(1), s.amax(1)
    if (high > MAX_MULTIPLE * low).any():
        return None
    # Significands of 8 bits: in units of the smallest scale's last bit every scale is an integer below 2**13.
    unit = torch.frexp(low)[1] - 8
    integers = torch.ldexp(s.double(), -unit[:, None]).to(torch.int32)
    divisor = integers
    while divisor.shape[1] > 1:
        half = divisor.shape[1] // 2
        rest = divisor[:, 2 * half :]
        divisor = torch.cat([torch.gcd(divisor[:, :half], divisor[:, half : 2 * half]), rest], 1)
    m = integers // divisor
    c = torch.ldexp(divisor[:, 0].double(), unit).float()
    if (m > MAX_MULTIPLE).any() or (c < torch.finfo(torch.float32).tiny).any():
        return None
    return c, m.to(torch.uint8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the unsigned 2-bit or 3-bit codes of a matrix, row by row.

    2 bits: byte j of a row holds elements 4j to 4j+3, the first in the lowest two bits. 3 bits: the K/4 bytes of the
    low two bits as above, then K/8 bytes of the high bits: byte j holds those of elements 8j to 8j+7, the first lowest.

    Args:
        codes: (N, K) integers in [0, 2^bits), K a multiple of 4 (2 bits) or 8 (3 bits), any integer dtype.
    Returns:
        (N, K * bits / 8) uint8.
    Raises:
        ValueError: another number of bits, K does not fit, or a code is out of range.
    """
    unit = {2: 4, 3: 8}.get(bits)
    if unit is None or codes.shape[-1] % unit:
        raise ValueError(f"pack_codes: {bits} bits and {codes.shape[-1]} columns; known are 2 (K % 4) and 3 (K % 8)")
    if codes.numel() and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(f"pack_codes: codes must lie in [0, {(1 << bits) - 1}]")
    fields = codes.to(torch.uint8).unflatten(-1, (-1, 4))
    low = sum((fields[..., i] & 3) << 2 * i for i in range(4))
    if bits == 2:
        return low
    octets = codes.to(torch.uint8).unflatten(-1, (-1, 8)) >> 2
    return torch.cat([low, sum(octets[..., i] << i for i in range(8))], -1)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`: (N, K * bits / 8) uint8 -> (N, K) uint8. Plain ops, so it can be traced by FX."""
    low = packed if bits == 2 else packed[..., : packed.shape[-1] // 3 * 2]
    codes = torch.stack([low >> 2 * i & 3 for i in range(4)], -1).flatten(-2)
    if bits == 3:
        high = packed[..., packed.shape[-1] // 3 * 2 :]
        codes = codes | torch.stack([(high >> i & 1) << 2 for i in range(8)], -1).flatten(-2)
    return codes
