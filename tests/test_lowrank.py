"""The low-rank component: against the exact SVD, balance of the factors, and their 4-bit form."""

import numpy as np
import pytest
import torch

from tqcompile.methods.lowrank import OVERSAMPLING, quantize_factors, svd_factors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decaying(n, k, seed=0, power=1.0):
    g = seeded(seed)
    u = torch.linalg.qr(torch.randn(n, min(n, k), generator=g))[0]
    v = torch.linalg.qr(torch.randn(k, min(n, k), generator=g))[0]
    return (u * torch.arange(1, min(n, k) + 1).float().pow(-power)) @ v.t()


def optimal_error(w, rank):
    return np.sqrt((np.linalg.svd(w.double().numpy(), compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize(("n", "k", "rank"), [(20, 33, 8), (33, 20, 10), (150, 130, 16), (70, 200, 12)])
def test_the_product_is_the_best_of_its_rank(n, k, rank):
    w = decaying(n, k)
    factors = svd_factors(w, rank, seeded())
    assert factors.up.shape == (n, rank)
    assert factors.down.shape == (rank, k)
    error = (w.double() - factors.up.double() @ factors.down.double()).norm().item()
    best = optimal_error(w, rank)
    # Halko et al. 2011, theorem 10.6 and 10.7: with q power steps and p = 16 extra directions the excess is
    # (sigma_{R+17} / sigma_{R+1})^{4q}-small; float32 adds 2**-20 of the norm.
    assert best - 1e-6 <= error <= best * 1.01 + w.norm().item() * 2.0**-20


def test_a_matrix_of_low_rank_is_reproduced():
    g = seeded(1)
    w = torch.randn(90, 8, generator=g) @ torch.randn(8, 120, generator=g)
    for rank in (8, 10):
        assert (svd_factors(w, rank, seeded()).product() - w).norm() < 1e-5 * w.norm()


def test_zeros_stay_zero():
    factors = quantize_factors(svd_factors(torch.zeros(20, 64), 8, seeded()), 32)
    assert factors.product().abs().max() == 0


@pytest.mark.parametrize("rank", [8, 10, 16])
def test_factors_are_balanced(rank):
    w = decaying(64, 96, power=0.7)
    factors = svd_factors(w, rank, seeded())
    # The square roots of the singular values go to both sides; mixing is orthogonal and keeps the norms.
    assert abs(factors.up.norm() / factors.down.norm() - 1) < 1e-4
    columns = factors.up.norm(dim=0)
    if rank in (8, 16):  # a Hadamard mixing spreads the energy exactly evenly
        assert columns.max() / columns.min() < 1.001
    singular = torch.linalg.svdvals(w)[:rank].sqrt()
    assert columns.max() / columns.min() < 0.8 * singular.max() / singular.min()


def test_the_sketch_depends_on_the_seed_only():
    w = decaying(120, 130, seed=2, power=0.3)
    assert min(w.shape) > 2 * (8 + OVERSAMPLING)
    torch.manual_seed(0)
    first = svd_factors(w, 8, seeded(3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second, other = svd_factors(w, 8, seeded(3)), svd_factors(w, 8, seeded(4))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert not torch.equal(first.up, other.up)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "k", "rank", "group"), [(30, 96, 10, 32), (21, 64, 8, 64)])
def test_quantized_factors_are_their_codes_times_their_scales(n, k, rank, group):
    exact = svd_factors(decaying(n, k, 5), rank, seeded())
    rounded = quantize_factors(exact, group)
    assert rounded.down_scale.shape == (rank, k // group)
    assert rounded.up_scale.shape == (n, 1)
    for name, g in (("up", rank), ("down", group)):
        codes, scale = getattr(rounded, f"{name}_codes"), getattr(rounded, f"{name}_scale")
        assert codes.dtype == torch.int8
        assert codes.min() >= -8
        assert codes.max() <= 7
        assert torch.equal(scale, scale.bfloat16().float())
        dense = codes.double() * scale.double().repeat_interleave(g, 1)
        assert torch.equal(getattr(rounded, name).double(), dense)
        # 15 levels over a range clipped for the least error: for Gaussian-like rows about 0.1 of the norm.
        assert (dense - getattr(exact, name).double()).norm() < 0.2 * dense.norm()
    assert torch.equal(rounded.product(), rounded.up @ rounded.down)
