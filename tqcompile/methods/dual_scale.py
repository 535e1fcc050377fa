"""D2Quant's Dual-Scale Quantizer (arXiv 2602.02546): a group scale times a scale c_k for every column of down_proj.

    W[n, k] ~ c_k scale[n, g] (code[n, k] - zero[n, g])

Alternated: for given c, W diag(1/c) is rounded with group scales; for given codes, c is fitted by least squares. The
paper's error is that of the weights; ours may also be that of the output, tr(E H E^T) with E = W - W_q and H = X^T X,
for which c solves a linear system of K equations. c ends up in the rows of up_proj, so it costs no bits.
"""

import torch

from tqcompile.methods.lattice import encode
from tqcompile.methods.twin import SiteProblem

OBJECTIVES = ("weights", "hessian")
ROUNDS = 12
TOLERANCE = 1e-3
BOUND = 2.0  # factor by which c_k may move in one round


def dual_scale(w: torch.Tensor, problem: SiteProblem, objective: str) -> torch.Tensor:
    """The site's scale s = 1 / c: the codes are those of W diag(s), the site reads x / s.

    Args:
        w: (N, K) float32. problem: gives the Hessian, bits, group size and ties. objective: "weights" or "hessian".
    Returns:
        (K,) float32, positive: of all rounds the one with the smallest error.
    """
    hessian, tie = problem.statistics.hessian, problem.tie
    importance = hessian.diagonal() if objective == "hessian" else None
    s = torch.ones(w.shape[1], device=w.device)
    best, best_error = s, torch.inf
    for _ in range(ROUNDS):
        weight = None if importance is None else importance / s.square()
        q = encode(w * s, problem.scheme.weight_bits, problem.config.group_size, None, weight).weights() / s
        error = w - q
        loss = float(((error @ hessian) * error).sum() if objective == "hessian" else error.square().sum())
        if loss < best_error:
            best, best_error = s, loss
        factor = column_factors(w, q, hessian if objective == "hessian" else None, tie).clamp(1 / BOUND, BOUND)
        s = s / factor
        if float((factor.log() - factor.log().mean()).abs().max()) < TOLERANCE:
            break
    return best


def column_factors(
    w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor | None, tie: torch.Tensor | None = None
) -> torch.Tensor:
    """f (K,) that minimises the error of w - q diag(f): of the weights, or with a Hessian (K, K) of the output.

    tie: channels with equal numbers share one factor. A column of zeros keeps 1, as does one whose fit is not positive.
    """
    channel = torch.arange(w.shape[1], device=w.device) if tie is None else tie
    count = int(channel.max()) + 1
    if hessian is None:
        right, own = (torch.zeros(count, device=w.device).index_add_(0, channel, v.sum(0)) for v in (w * q, q * q))
        factor = right / own.clamp_min(1e-30)
    else:
        matrix = hessian * (q.t() @ q)
        matrix = torch.zeros(count, w.shape[1], device=w.device).index_add_(0, channel, matrix)
        matrix = torch.zeros(count, count, device=w.device).index_add_(1, channel, matrix)
        right = torch.zeros(count, device=w.device).index_add_(0, channel, ((w @ hessian) * q).sum(0))
        own = matrix.diagonal()
        # A little towards 1 where the data says nothing.
        ridge = 1e-3 * own.mean().clamp_min(1e-30)
        matrix = matrix + ridge * torch.eye(count, device=w.device)
        factor = torch.linalg.solve(matrix, right + ridge)
    usable = torch.isfinite(factor) & (factor > 0) & (own > 0)
    return torch.where(usable, factor, torch.ones_like(factor))[channel]
