"""Parametrizations: gradients in float64, and staying on the manifold in float32."""

import pytest
import torch

from tqcompile.methods.hadamard import hadamard_matrix
from tqcompile.methods.manifolds import (
    StiefelAdam,
    cayley,
    reorthogonalise,
    retract,
    tangent,
    well_conditioned,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance_from_orthonormal(q):
    return (q.double().t() @ q.double() - torch.eye(q.shape[1], dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_cayley_is_a_rotation_and_has_the_right_gradient(size):
    generator = normal(size, size, seed=size).requires_grad_(True)
    q = cayley(generator)
    assert distance_from_orthonormal(q.detach()) < 1e-13 * size
    assert torch.linalg.det(q).item() == pytest.approx(1.0, abs=1e-12)
    assert torch.autograd.gradcheck(cayley, (generator,))
    assert torch.equal(cayley(torch.zeros(size, size)), torch.eye(size))


def test_cayley_equals_the_formula_of_its_inverse():
    generator = normal(5, 5)
    skew = generator - generator.t()
    q = cayley(generator)
    # (I - Q)(I + Q)^-1 recovers the skew matrix.
    back = (torch.eye(5) - q) @ torch.linalg.inv(torch.eye(5) + q)
    assert (back - skew).abs().max() < 1e-12


def test_rotations_stay_orthogonal_after_learning_in_float32():
    target, start = reorthogonalise(normal(128, 128, dtype=torch.float32)), hadamard_matrix(128)
    generator = torch.zeros(128, 128, requires_grad=True)
    adam = torch.optim.Adam([generator], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (start @ cayley(generator) - target).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    learned = (start @ cayley(generator)).detach()
    assert losses[-1] < 0.7 * losses[0]
    assert distance_from_orthonormal(learned) < 1e-5
    assert distance_from_orthonormal(reorthogonalise(learned)) < 1e-6


def test_reorthogonalise_gives_the_nearest_orthogonal_matrix():
    q = torch.linalg.qr(normal(9, 9))[0]
    damaged = q + 1e-3 * normal(9, 9, seed=1)
    nearest = reorthogonalise(damaged)
    assert distance_from_orthonormal(nearest) < 1e-12
    for seed in range(20):
        other = nearest @ cayley(1e-2 * normal(9, 9, seed=seed + 2))
        assert (damaged - nearest).norm() < (damaged - other).norm()


@pytest.mark.parametrize("shape", [(7, 3), (33, 8), (5, 5), (4, 1)])
def test_tangents_are_tangent_and_the_projection_keeps_derivatives_along_the_manifold(shape):
    frame, gradient = retract(normal(*shape)), normal(*shape, seed=1)
    projected = tangent(frame, gradient)
    inner = frame.t() @ projected
    assert (inner + inner.t()).abs().max() < 1e-13
    assert (tangent(frame, projected) - projected).abs().max() < 1e-13
    direction = tangent(frame, normal(*shape, seed=2))
    assert (direction * gradient).sum().item() == pytest.approx((direction * projected).sum().item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(7, 3), (33, 8), (4, 1)])
def test_the_retraction_is_orthonormal_and_first_order(shape):
    frame = retract(normal(*shape))
    direction = tangent(frame, normal(*shape, seed=1))
    assert distance_from_orthonormal(frame) < 1e-14 * shape[0]
    errors = []
    for step in (1e-3, 1e-4):
        moved = retract(frame + step * direction)
        assert distance_from_orthonormal(moved) < 1e-14 * shape[0]
        errors.append((moved - frame - step * direction).norm().item())
    assert errors[1] < 0.02 * errors[0]  # quadratic in the step
    # The retraction's derivative, needed nowhere but a check that no sign flips: away from zero diagonals it is smooth.
    assert torch.autograd.gradcheck(retract, (frame.clone().requires_grad_(True),))


def test_stiefel_adam_finds_the_dominant_subspace_and_stays_orthonormal():
    scales = torch.linspace(3, 0.1, 24)
    basis = torch.linalg.qr(normal(24, 24, dtype=torch.float32))[0]
    matrix = (basis * scales**2) @ basis.t()
    frame = retract(normal(24, 4, seed=1, dtype=torch.float32)).requires_grad_(True)
    optimiser = StiefelAdam(frame, lr=0.1)
    for step in range(200):
        loss = -(frame.t() @ matrix @ frame).trace()
        loss.backward()
        optimiser.step(1 - step / 200)
        frame.grad = None
        assert distance_from_orthonormal(frame.detach()) < 1e-5
    best = (scales**2)[:4].sum().item()
    assert -loss.item() > 0.99 * best


def test_a_step_turns_columns_by_about_the_learning_rate():
    frame = retract(normal(64, 8, dtype=torch.float32)).requires_grad_(True)
    before = frame.detach().clone()
    optimiser = StiefelAdam(frame, lr=0.05)
    frame.grad = normal(64, 8, seed=1, dtype=torch.float32) * 1e4
    optimiser.step()
    angles = torch.linalg.vector_norm(frame.detach() - before, dim=0)
    assert (angles > 0.02).all()
    assert (angles < 0.1).all()


def test_the_condition_guard():
    q = torch.linalg.qr(normal(6, 6))[0]
    assert well_conditioned((q * torch.logspace(0, -2.9, 6)).float())
    assert not well_conditioned((q * torch.logspace(0, -3.1, 6)).float())
    assert not well_conditioned(torch.full((3, 3), float("nan")))
    assert not well_conditioned(torch.zeros(3, 3))


def test_the_inverse_factor_has_the_right_gradient():
    frame = retract(normal(9, 4))
    factor = (torch.eye(4, dtype=torch.float64) + 0.3 * normal(4, 4, seed=3)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda g: torch.linalg.solve(g, frame.t()), (factor,))
