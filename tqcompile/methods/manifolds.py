"""Parameters that stay on a manifold while they are learned: rotations, orthonormal frames, invertible matrices.

    rotation   Q = H C(P),  C(P) = (I + K)^-1 (I - K),  K = P - P^T      orthogonal for every P (Cayley)
    frame      V (K, R) with V^T V = I                                   Stiefel: Riemannian Adam, QR retraction
    factor     G (R, R) invertible                                       general linear group, condition guarded

No parametrization approximates: Q and V are orthogonal up to float32 rounding after any number of steps.
"""

import torch

MAX_CONDITION = 1e3


def cayley(generator: torch.Tensor) -> torch.Tensor:
    """(b, b), any values -> (b, b) orthogonal with determinant 1; zero -> identity."""
    skew = generator - generator.t()
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    # I + skew is never singular: the eigenvalues of a skew matrix are imaginary.
    return torch.linalg.solve(eye + skew, eye - skew)


def reorthogonalise(q: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix next to ``q`` in Frobenius norm (its polar factor, in float64), in the dtype of ``q``."""
    u, _, vh = torch.linalg.svd(q.double())
    return (u @ vh).to(q)


def tangent(frame: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Project (K, R) ``gradient`` on the tangent space of the Stiefel manifold at ``frame``: g - V sym(V^T g)."""
    inner = frame.t() @ gradient
    return gradient - frame @ ((inner + inner.t()) / 2)


def retract(frame: torch.Tensor) -> torch.Tensor:
    """(K, R) of full rank -> the orthonormal factor of its QR decomposition, with columns' signs kept."""
    q, r = torch.linalg.qr(frame)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class StiefelAdam:
    """Riemannian Adam for one frame (Becigneul and Ganea, arXiv 1810.00760, with one second moment per frame).

    The first moment is projected to the new tangent space after each step, in place of a parallel transport. A step
    moves the frame by ``lr`` times sqrt(R): a rotation of every column by about ``lr`` radians.
    """

    def __init__(self, frame: torch.Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.99)):
        self.frame, self.lr, self._betas = frame, lr, betas
        self._first = torch.zeros_like(frame)
        self._second, self._count = 0.0, 0

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Move ``frame`` in place along its ``grad``; factor: of the learning rate (a schedule)."""
        gradient = tangent(self.frame, self.frame.grad)
        b1, b2 = self._betas
        self._count += 1
        self._first.mul_(b1).add_(gradient, alpha=1 - b1)
        self._second = b2 * self._second + (1 - b2) * gradient.square().mean()
        size = (self._second / (1 - b2**self._count)).sqrt().clamp_min(1e-30)
        direction = self._first / (1 - b1**self._count) / size / self.frame.shape[0] ** 0.5
        self.frame.copy_(retract(self.frame - factor * self.lr * direction))
        self._first.copy_(tangent(self.frame, self._first))


def well_conditioned(factor: torch.Tensor) -> bool:
    """Whether (R, R) ``factor`` is finite and inverting it loses at most three digits."""
    return bool(torch.isfinite(factor).all()) and bool(torch.linalg.cond(factor.double()) < MAX_CONDITION)
