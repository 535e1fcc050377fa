"""Symmetric integer rounding with group scales, and the search for scales that clip the right amount."""

import torch

from tqcompile.errors import NumericError
from tqcompile.ops.packing import MAX_MULTIPLE

QMAX = 7
QMIN = -8
# Room above the largest scale of a row, which error compensation may enlarge.
HEADROOM = 1.05
# Elements searched at a time on a CPU.
CACHED = 2**17


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
    weight = None if importance is None else importance.reshape(1, k // group_size, group_size)
    return torch.cat([_searched_scales(part, weight, search) for part in _slices(groups)])


def _searched_scales(groups: torch.Tensor, weight: torch.Tensor | None, search: bool) -> torch.Tensor:
    absmax = groups.abs().amax(-1)
    # A group of zeros gets scale 1: its codes are zero either way.
    full = torch.where(absmax > 0, absmax / QMAX, torch.ones_like(absmax))
    best = storable(full)
    if not search:
        return best
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


def row_units(
    w: torch.Tensor, group_size: int, importance: torch.Tensor | None = None, headroom: float = 1.0
) -> torch.Tensor:
    """The unit c of each row's scale grid {c, 2c, ..., 16c}: just large enough for the row's largest group scale.

    c has four significant bits, so that its multiples by 1 to 16 have eight and are bfloat16 values.

    Args:
        w, group_size, importance: as in :func:`group_scales`. headroom: factor on the largest scale.
    Returns:
        (N,) float32, positive, at least 2**-120.
    """
    scale = group_scales(w, group_size, importance)
    # The scale 1 of a group of zeros says nothing about the row.
    scale = scale.masked_fill(w.reshape(*scale.shape, group_size).abs().amax(-1) == 0, 0.0).amax(1)
    return four_bits_above(scale * (headroom / MAX_MULTIPLE))


def four_bits_above(value: torch.Tensor) -> torch.Tensor:
    """Positive float32 values rounded up to four significant bits, at least 2**-120."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp((mantissa * 16).ceil(), exponent - 4).clamp_min(2.0**-120)


def grid_scales(
    w: torch.Tensor, unit: torch.Tensor, group_size: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales for signed 4-bit rounding of each group, on the row's grid; the best of its 16 points.

    Args:
        w: (N, K) float32. unit: (N,) from :func:`row_units`. group_size: g, divides K.
        importance: (K,) non-negative weights of the squared error.
    Returns:
        (N, K/g) float32: ``unit`` times an integer in [1, 16], all of them bfloat16 values.
    """
    n, k = w.shape
    groups = w.reshape(n, k // group_size, group_size)
    weight = None if importance is None else importance.reshape(1, k // group_size, group_size)
    return torch.cat([_grid_scales(*part, weight) for part in zip(_slices(groups), _slices(unit, groups), strict=True)])


def _grid_scales(groups: torch.Tensor, unit: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    best = best_error = None
    # Downwards, so that a group of zeros, for which all are equal, does not shrink the row's common divisor.
    for multiple in range(MAX_MULTIPLE, 0, -1):
        scale = (unit * multiple)[:, None].expand(groups.shape[:2])
        error = _group_error(groups, scale, weight)
        if best is None:
            best, best_error = scale, error
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def _group_error(groups: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    s = scale.unsqueeze(-1)
    error = (groups / s).round_().clamp_(QMIN, QMAX).mul_(s).sub_(groups).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)


def _slices(rows: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Rows, on a CPU in slices which a core's cache holds through the search; cut as ``like`` where that is given."""
    like = rows if like is None else like
    count = len(like) if like.is_cuda else max(1, CACHED // like[0].numel())
    return rows.split(max(1, count))


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
