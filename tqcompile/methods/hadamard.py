"""Signed Hadamard rotations of blocks of channels (QuaRot, arXiv 2404.00456; the start of every learned rotation)."""

import torch

MAX_BLOCK = 128
MIN_BLOCK = 16


def rotation_block(channels: int) -> int:
    """The largest power of two up to 128 that divides ``channels``, or 0 when that is below 16."""
    block = channels & -channels
    return min(block, MAX_BLOCK) if block >= MIN_BLOCK else 0


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sylvester's (size, size) Hadamard matrix over sqrt(size): orthogonal and symmetric; size a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard_matrix: size must be a power of two, got {size}")
    h = torch.ones(1, 1, dtype=dtype)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / size**0.5


def random_signs(size: int, generator: torch.Generator) -> str:
    """``size`` random signs as hex digits, one bit a sign; size a multiple of 4."""
    bits = torch.randint(0, 2, (size,), generator=generator).tolist()
    return f"{int(''.join(map(str, bits)), 2):0{size // 4}x}"


def signed_hadamard(signs: str) -> torch.Tensor:
    """diag(signs) @ Hadamard in bfloat16, as it is applied on-line: (size, size), orthogonal up to one factor."""
    bits = torch.tensor([int(bit) for digit in signs for bit in f"{int(digit, 16):04b}"])
    return ((2.0 * bits - 1.0)[:, None] * hadamard_matrix(len(bits))).to(torch.bfloat16)


def random_hadamard(channels: int, generator: torch.Generator) -> torch.Tensor:
    """Hadamard blocks with random signs in front, as large as divides ``channels``: (channels / b, b, b) float64."""
    size = channels & -channels
    signs = 1.0 - 2.0 * torch.randint(0, 2, (channels // size, size, 1), generator=generator)
    return signs.double() * hadamard_matrix(size, torch.float64)


def mixing_matrix(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal (size, size) matrix that spreads energy evenly: Hadamard, or random if size is no power of 2."""
    if size & (size - 1) == 0:
        return hadamard_matrix(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def rotate_blocks(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply each block of b consecutive channels by ``rotation``: (..., K) @ blockdiag(rotation)."""
    return torch.matmul(x.unflatten(-1, (-1, rotation.shape[0])), rotation).flatten(-2)
