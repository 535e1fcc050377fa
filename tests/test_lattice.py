"""Rounding below four bits: grids and lattices against brute force, error compensation and coordinate passes."""

import dataclasses

import numpy as np
import pytest
import torch

from tqcompile.methods.gptq import inverse_factor
from tqcompile.methods.lattice import (
    Codes,
    Lattice,
    encode,
    group_grid,
    integer_lattice,
    lattice_scales,
    learn_lattice,
    nearest,
    refine,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(seed=3):
    return Lattice(random(4, 4, seed=seed) + 2 * torch.eye(4), random(4, seed=seed + 1) - 1.5)


def hessian(k=96, seed=5):
    x = random(400, k, seed=seed) @ (torch.eye(k) + random(k, k, seed=seed + 1) / k**0.5)
    h = x.t() @ x
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return h


def output_error(w, found, h):
    e = (w - found.weights()).double()
    return float(((e @ h.double()) * e).sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_weights_are_the_documented_formula(bits):
    w, g = random(7, 96), np.random.default_rng(0)
    codes = torch.from_numpy(g.integers(0, 1 << bits, (7, 96)).astype(np.uint8))
    scale, zero = torch.rand(7, 3) + 0.5, torch.from_numpy(g.integers(0, 90, (7, 3)).astype(np.uint8))
    wide = scale.double().numpy().repeat(32, axis=1)
    plain = wide * (codes.double().numpy() - zero.double().numpy().repeat(32, axis=1) / 32)
    assert np.allclose(Codes(codes, scale, zero, None, bits).weights().numpy(), plain, rtol=1e-5, atol=1e-5)
    lattice = basis()
    points = codes.double().numpy().reshape(7, 24, 4) + lattice.offset.double().numpy()
    points = np.einsum("ij,nkj->nki", lattice.basis.double().numpy(), points).reshape(7, 96)
    assert np.allclose(Codes(codes, scale, None, lattice, bits).weights().numpy(), wide * points, rtol=1e-4, atol=1e-4)
    assert w.shape == (7, 96)


@pytest.mark.parametrize("bits", [2, 3])
def test_nearest_is_nearest_of_all_points(bits):
    lattice, units, metric = basis(), 3 * random(50, 4, seed=8), random(4, 4, seed=9) + torch.eye(4)
    axes = [np.arange(1 << bits)] * 4
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
    for own, m in ((lattice, None), (lattice, metric), (integer_lattice(bits), None), (integer_lattice(bits), metric)):
        t = np.eye(4) if own.basis is None else own.basis.double().numpy()
        points = (grid + own.offset.double().numpy()) @ t.T
        a = np.eye(4) if m is None else m.double().numpy()
        distance = np.linalg.norm((units.double().numpy()[:, None] - points[None]) @ a, axis=-1)
        codes = nearest(units, bits, own, m).numpy().astype(np.int64)
        found = distance[np.arange(50), codes @ (1 << bits) ** np.arange(3, -1, -1)]
        assert (found <= distance.min(1) + 1e-4).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_a_searched_grid_is_better_and_storable(bits):
    w, importance = random(20, 128) + 0.3, torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.01
    errors = []
    for search in (False, True):
        scale, zero = group_grid(w, 64, bits, importance, search)
        assert torch.equal(scale, scale.bfloat16().float())
        steps = zero * 32
        assert torch.equal(steps, steps.round())
        assert (steps >= 0).all()
        assert (steps <= 255).all()
        found = encode(w, bits, 64, None, importance, search=search)
        assert torch.equal(found.scale, scale)
        errors.append(((found.weights() - w).square() * importance).view(20, 2, 64).sum(-1))
        assert (found.codes < 1 << bits).all()
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constant_groups_are_kept(value):
    w = torch.full((3, 64), value)
    for lattice in (None, integer_lattice(2), basis()):
        found = encode(w, 2, 32, lattice=lattice)
        assert torch.isfinite(found.weights()).all()
        if lattice is None:
            assert (found.weights() - w).abs().max() <= 0.01 * abs(value)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("kind", ["grid", "integers", "basis"])
def test_compensation_and_coordinate_passes_lower_the_output_error(bits, kind):
    w, h = random(40, 96, seed=2), hessian()
    if kind == "basis" and bits == 3:
        w = w[:6]  # 4096 points a product
    lattice = {"grid": None, "integers": integer_lattice(bits), "basis": basis()}[kind]
    plain = encode(w, bits, 32, None, h.diagonal(), lattice)
    found = encode(w, bits, 32, inverse_factor(h, "test"), h.diagonal(), lattice)
    errors = [output_error(w, c, h) for c in (plain, found)]
    assert errors[1] < 0.95 * errors[0]
    for _ in range(3):
        found = refine(w, found, h, passes=1)
        errors.append(output_error(w, found, h))
        assert errors[-1] <= errors[-2] * (1 + 1e-6)
    assert errors[-1] < 0.97 * errors[1]


def test_a_coordinate_pass_leaves_no_single_move_that_helps():
    w, h = random(5, 64, seed=4), hessian(64)
    found = refine(w, encode(w, 2, 32, inverse_factor(h, "test"), h.diagonal()), h, passes=30)
    best = output_error(w, found, h)
    for column in (0, 17, 63):
        for code in range(4):
            moved = found.codes.clone()
            moved[:, column] = code
            e = (w - dataclasses.replace(found, codes=moved).weights()).double()
            own = (w - found.weights()).double()
            assert ((((e @ h.double()) * e).sum(1) - ((own @ h.double()) * own).sum(1)) > -1e-4 * best).all()


def test_blocks_of_four_columns_are_compensated_like_single_ones():
    # With T = I as an explicit basis and H = I there is nothing to compensate: both are plain rounding.
    w, eye = random(9, 64, seed=6), torch.eye(64)
    lattice = integer_lattice(2)
    explicit = Lattice(torch.eye(4), lattice.offset)
    factor = inverse_factor(eye, "test")
    single = encode(w, 2, 32, factor, eye.diagonal(), lattice)
    four = encode(w, 2, 32, factor, eye.diagonal(), explicit)
    assert torch.equal(single.scale, four.scale)
    assert torch.equal(single.codes, four.codes)


def test_a_learned_lattice_fits_what_has_a_shape():
    g = torch.Generator().manual_seed(7)
    mix = torch.tensor([[1.0, 0.9, 0, 0], [0, 0.3, 0, 0], [0, 0, 1, 0.8], [0, 0, 0, 0.4]])
    w = (torch.rand(200, 32, 4, generator=g) @ mix - 0.5).reshape(200, 128)
    learned = learn_lattice(w, 128, 2)
    errors = []
    for lattice in (integer_lattice(2), learned):
        scale = lattice_scales(w, 128, 2, lattice)
        assert torch.equal(scale, scale.bfloat16().float())
        errors.append(float((encode(w, 2, 128, lattice=lattice).weights() - w).square().mean()))
    assert errors[1] < 0.8 * errors[0]
