"""GPTQ (arXiv 2210.17323): round column by column, each column's error compensated by the columns after it."""

from collections.abc import Callable

import torch

from tqcompile.cuda_graph import capture
from tqcompile.errors import NumericError
from tqcompile.methods.rounding import HEADROOM, QMAX, QMIN, grid_scales, group_scales, row_units

DAMPING = 0.01


def inverse_factor(hessian: torch.Tensor, what: str) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Args:
        hessian: (K, K) float32, X^T X of the layer's input. what: named in the error.
    Returns:
        (K, K) float32 upper triangular U with U^T U = (H + damping)^-1.
    Raises:
        NumericError: not positive definite even with 100 % damping.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise NumericError(
            f"{what}: the calibration Hessian has mean diagonal {float(mean)}; the layer's input is all zero or not "
            f"finite. Check the calibration data, or put the layer in `ignore`."
        )
    damping = DAMPING
    while damping <= 1.0:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise NumericError(
        f"{what}: the calibration Hessian is not positive definite even with 100% damping. "
        f"Use more or more varied calibration data, or put the layer in `ignore`."
    )


def gptq(
    w: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor, group_size: int, grid: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to signed 4 bits with group scales, minimising the error of its output.

    Scales of a group are searched when its first column is reached, on the already compensated weights.

    Args:
        w: (N, K) float32. factor: (K, K) from :func:`inverse_factor`. importance: (K,) diagonal of the Hessian.
        group_size: g, divides K. grid: scales of a row are integer multiples 1 to 16 of one number; that number is
        fixed before the first column, from the whole row.
    Returns:
        codes (N, K) int8 in [-8, 7] and scales (N, K/g) float32 (bfloat16 values).
    """
    w = w.clone()
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=w.device)
    scales = torch.empty(n, k // group_size, device=w.device)
    unit = row_units(w, group_size, importance, HEADROOM) if grid else None
    round_group = _captured(group_size, n, w.device) if w.is_cuda else _round_group
    for start in range(0, k, group_size):
        end = start + group_size
        block = w[:, start:end]
        if grid:
            scale = grid_scales(block, unit, group_size, importance[start:end])
        else:
            scale = group_scales(block, group_size, importance[start:end])
        scales[:, start // group_size] = scale[:, 0]
        rounded, errors = round_group(block.t().contiguous(), scale[:, 0], factor[start:end, start:end])
        codes[:, start:end] = rounded.t()
        w[:, end:] -= errors.t() @ factor[start:end, end:]
    return codes, scales


def _round_group(block: torch.Tensor, scale: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a group in order. block (g, N), columns first, is used up; scale (N,); u (g, g).

    Returns codes (g, N) int8 and what each column leaves to the columns after the group (g, N).
    """
    codes, errors = torch.empty_like(block, dtype=torch.int8), torch.empty_like(block)
    for j, column in enumerate(block):
        code = (column / scale).round_().clamp_(QMIN, QMAX)
        codes[j] = code
        errors[j] = (column - code * scale) / u[j, j]
        block[j + 1 :] -= u[j, j + 1 :, None] * errors[j]
    return codes, errors


def _captured(group_size: int, n: int, device: torch.device) -> Callable:
    """:func:`_round_group` as one CUDA graph: a thousand small kernels, which Python would launch slower than they run.

    A call's results are valid until the next one.
    """
    with torch.cuda.device(device):
        block, scale = torch.zeros(group_size, n, device=device), torch.ones(n, device=device)
        u = torch.eye(group_size, device=device)
        replay, results = capture(lambda: _round_group(block, scale, u))

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for static, value in zip((block, scale, u), values, strict=True):
            static.copy_(value)
        replay()
        return results

    return call
