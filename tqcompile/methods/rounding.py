"""Symmetric integer rounding with group scales, and the search for scales that clip the right amount."""

import torch

from tqcompile.errors import NumericError

QMAX = 7
QMIN = -8


def group_scales(
    w: torch.Tensor, group_size: int, importance: torch.Tensor | None = None, search: bool = True
) -> torch.Tensor:
    """Scales for signed 4-bit rounding of each group.

    With ``search`` the scale minimises the (importance-weighted) squared error over a grid of clipping ratios;
    without, it maps the largest magnitude to 7 (round to nearest, as commonly defined).

    Args:
        w: (N, K) float32. group_size: g, divides K. importance: (K,) non-negative weights of the squared error.
    Returns:
        (N, K/g) float32, rounded to bfloat16, positive.
    """
    n, k = w.shape
    groups = w.reshape(n, k // group_size, group_size)
    absmax = groups.abs().amax(-1)
    # A group of zeros gets scale 1: its codes are zero either way.
    full = torch.where(absmax > 0, absmax / QMAX, torch.ones_like(absmax))
    best = storable(full)
    if not search:
        return best
    weight = None if importance is None else importance.reshape(1, k // group_size, group_size)
    best_error = _group_error(groups, best, weight)
    for ratio in torch.linspace(0.52, 0.98, 24).tolist():
        scale = storable(full * ratio)
        error = _group_error(groups, scale, weight)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to bfloat16, in which they are stored; codes are chosen for the rounded scale."""
    return scale.to(torch.bfloat16).float().clamp_min(torch.finfo(torch.bfloat16).tiny)


def _group_error(groups: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    s = scale.unsqueeze(-1)
    error = (groups - (groups / s).round().clamp(QMIN, QMAX) * s).square()
    return (error if weight is None else error * weight).sum(-1)


def round_to_codes(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, K) float32 and scales (N, K/g) -> codes (N, K) int8 in [-8, 7]."""
    groups = w.reshape(*scale.shape, -1)
    return (groups / scale.unsqueeze(-1)).round().clamp(QMIN, QMAX).to(torch.int8).reshape(w.shape)


def from_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`round_to_codes`: (N, K) float32."""
    return (codes.reshape(*scale.shape, -1).float() * scale.unsqueeze(-1)).reshape(codes.shape)


def require_finite(tensor: torch.Tensor, what: str, advice: str) -> None:
    """Raise NumericError naming ``what`` when a tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericError(f"{what}: {bad} of {tensor.numel()} values are NaN or infinite. {advice}")
