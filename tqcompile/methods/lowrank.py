"""The low-rank component: truncated SVD, balanced factors, and their 4-bit form."""

import dataclasses

import torch

from tqcompile.methods.hadamard import mixing_matrix
from tqcompile.methods.rounding import from_codes, group_scales, round_to_codes

OVERSAMPLING = 16
POWER_ITERATIONS = 4


@dataclasses.dataclass
class LowRank:
    """up (N, R) @ down (R, K), float32; with codes and scales when the factors are 4-bit."""

    up: torch.Tensor
    down: torch.Tensor
    up_codes: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_codes: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    def product(self) -> torch.Tensor:
        return self.up @ self.down


def svd_factors(w: torch.Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """Best rank-R approximation of (N, K) ``w`` with balanced factors.

    Both factors carry the square root of the singular values and are mixed by an orthogonal (R, R) matrix, so
    that no row or column dominates a 4-bit scale. All but small matrices use a randomised SVD seeded by ``generator``.
    """
    u, s, v = truncated_svd(w, rank, generator)
    root = s.clamp_min(0).sqrt()
    mix = mixing_matrix(rank, generator).to(w)
    return LowRank(up=(u * root) @ mix, down=mix.t() @ (v * root).t())


def truncated_svd(
    w: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The R largest singular values of (N, K) ``w`` and their vectors: (N, R), (R,), (K, R)."""
    if min(w.shape) <= 2 * (rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].t()
    return _randomised_svd(w, rank, generator)


def _randomised_svd(w: torch.Tensor, rank: int, generator: torch.Generator):
    # torch.svd_lowrank draws from the global generator; this is the same algorithm (Halko et al. 2011) on ours.
    sketch = torch.randn(w.shape[1], rank + OVERSAMPLING, generator=generator).to(w)
    basis = torch.linalg.qr(w @ sketch)[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.t() @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.t() @ w, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank].t()


def quantize_factors(factors: LowRank, group_size: int) -> LowRank:
    """Round both factors to 4 bits: down with group scales along K, up with one scale a row."""
    down_scale = group_scales(factors.down, group_size)
    down_codes = round_to_codes(factors.down, down_scale)
    up_scale = group_scales(factors.up, factors.up.shape[1])
    up_codes = round_to_codes(factors.up, up_scale)
    return LowRank(
        up=from_codes(up_codes, up_scale),
        down=from_codes(down_codes, down_scale),
        up_codes=up_codes,
        up_scale=up_scale,
        down_codes=down_codes,
        down_scale=down_scale,
    )
