"""Group scales and 4-bit rounding, against plain float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqcompile.errors import NumericError
from tqcompile.methods.rounding import (
    from_codes,
    grid_scales,
    group_scales,
    require_finite,
    round_to_codes,
    row_units,
    storable,
)

SHAPES = [(1, 2, 2), (3, 35, 7), (5, 64, 32), (17, 96, 96)]


def matrix(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * torch.exp(torch.randn(n, 1, generator=g) * 3)


def squared_error(w, scale, importance):
    """(N, G) float64, independent of the code under test."""
    groups = w.double().numpy().reshape(*scale.shape, -1)
    s = scale.double().numpy()[..., None]
    weight = importance.double().numpy().reshape(1, scale.shape[1], -1)
    return (weight * (groups - np.clip(np.rint(groups / s), -8, 7) * s) ** 2).sum(-1)


@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_never_worse_than_the_full_range(n, k, g, weighted):
    w = matrix(n, k)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else torch.ones(k)
    full = group_scales(w, g, search=False)
    best = group_scales(w, g, importance if weighted else None)
    # The search compares sums of g float32 terms, so it may prefer an error that is larger by g roundings.
    slack = 1 + g * 2.0**-22
    assert (squared_error(w, best, importance) <= squared_error(w, full, importance) * slack).all()
    if g >= 32:
        assert squared_error(w, best, importance).sum() < 0.95 * squared_error(w, full, importance).sum()


@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
@pytest.mark.parametrize("search", [False, True])
def test_scales_are_positive_bfloat16_values(n, k, g, search):
    scale = group_scales(matrix(n, k, 2), g, search=search)
    assert scale.shape == (n, k // g)
    assert (scale > 0).all()
    assert torch.equal(scale, scale.bfloat16().float())


def test_the_full_range_maps_the_largest_magnitude_to_seven():
    w = matrix(4, 64, 3)
    scale = group_scales(w, 32, search=False)
    top = w.reshape(4, 2, 32).abs().amax(-1)
    # bfloat16 keeps 8 significant bits: relative rounding at most 2**-9.
    assert ((scale * 7 / top - 1).abs() <= 2.0**-8).all()
    assert round_to_codes(w, scale).abs().reshape(4, 2, 32).amax(-1).eq(7).all()


def test_the_importance_decides_what_is_clipped():
    w = torch.full((1, 32), 0.1)
    w[0, 0] = 1.0
    spread = torch.ones(32)
    outlier = torch.full((32,), 1e-4)
    outlier[0] = 1.0
    w += torch.linspace(0, 0.03, 32)
    assert group_scales(w, 32, spread) < group_scales(w, 32, outlier)


def test_a_group_of_zeros_is_exact():
    w = torch.zeros(2, 64)
    w[0, 40] = 3.0
    scale = group_scales(w, 32)
    assert torch.equal(from_codes(round_to_codes(w, scale), scale)[:, :32], w[:, :32])
    assert torch.isfinite(scale).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=8, max_size=8),
    st.booleans(),
)
def test_any_finite_weights_have_codes_in_range_and_a_bounded_error(values, search):
    w = torch.tensor([values], dtype=torch.float32)
    scale = group_scales(w, 4, search=search)
    codes = round_to_codes(w, scale)
    assert codes.dtype == torch.int8
    assert codes.min() >= -8
    assert codes.max() <= 7
    if not search:
        error = (from_codes(codes, scale).double() - w.double()).abs().reshape(1, 2, 4)
        # Half a step, plus 7 * 2**-8 of one because the scale was rounded to bfloat16, plus float32 rounding of w.
        step = scale.double().unsqueeze(-1)
        assert (error <= step * (0.5 + 7 / 256) + w.abs().max().double() * 2.0**-22).all()


@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_grid_scales_are_the_best_of_sixteen_multiples(n, k, g, weighted):
    w = matrix(n, k, 7)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else torch.ones(k)
    unit = row_units(w, g, importance if weighted else None)
    scale = grid_scales(w, unit, g, importance if weighted else None)
    best = np.full(scale.shape, np.inf)
    for multiple in range(1, 17):
        candidate = (unit * multiple)[:, None].expand(scale.shape)
        assert torch.equal(candidate, candidate.bfloat16().float())
        best = np.minimum(best, squared_error(w, candidate, importance))
    slack = 1 + g * 2.0**-22
    assert (squared_error(w, scale, importance) <= best * slack).all()
    ratio = scale.double() / unit.double()[:, None]
    assert torch.equal(ratio, ratio.round().clamp(1, 16))


@pytest.mark.parametrize("headroom", [1.0, 1.05, 1.5])
def test_row_units_have_four_bits_and_reach_the_largest_scale_with_little_to_spare(headroom):
    w = matrix(40, 96, 8)
    unit, largest = row_units(w, 32, headroom=headroom), group_scales(w, 32).amax(1) * headroom
    mantissa = torch.frexp(unit)[0] * 16
    assert torch.equal(mantissa, mantissa.round())
    # float32 rounding of the product may let an exact fit be missed by one part in 2**23.
    assert (unit * 16 >= largest * (1 - 2.0**-22)).all()
    assert (unit * 16 <= largest * (1 + 2.0**-3)).all()


def test_groups_of_zeros_do_not_coarsen_the_grid_of_their_row():
    w = matrix(3, 96, 9) * 1e-3
    w[0, 32:64], w[1] = 0, 0
    unit = row_units(w, 32)
    assert unit[0] <= w[0].abs().amax() / 7 / 16 * 1.13
    scale = grid_scales(w, unit, 32)
    dense = from_codes(round_to_codes(w, scale), scale)
    assert (dense[w == 0] == 0).all()
    assert ((dense - w)[0].norm() / w[0].norm()) < 0.15
    assert (scale > 0).all()


@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
def test_codes_round_trip(n, k, g):
    gen = torch.Generator().manual_seed(4)
    codes = torch.randint(-8, 8, (n, k), generator=gen, dtype=torch.int8)
    scale = storable(torch.rand(n, k // g, generator=gen) + 0.01)
    dense = from_codes(codes, scale)
    expected = codes.double() * scale.double().repeat_interleave(g, 1)
    assert torch.equal(dense.double(), expected)  # 4 + 8 significant bits are exact in float32
    assert torch.equal(round_to_codes(dense, scale), codes)


def test_require_finite_counts_what_is_wrong():
    tensor = torch.ones(3, 4)
    require_finite(tensor, "x", "advice")
    tensor[0, 1], tensor[2, 2] = float("nan"), float("-inf")
    with pytest.raises(NumericError, match=r"layer: weights: 2 of 12 values are NaN or infinite\. Look\."):
        require_finite(tensor, "layer: weights", "Look.")
