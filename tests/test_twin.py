"""One site, all methods: transforms keep the function, the residual corrects the rounded factors, seeds decide."""

import numpy as np
import pytest
import torch

from tqcompile.config import FOUR_BIT_SCHEMES, Config, Scheme
from tqcompile.errors import NumericError
from tqcompile.methods import twin
from tqcompile.methods.hadamard import random_signs, signed_hadamard
from tqcompile.methods.lowrank import quantize_factors, svd_factors
from tqcompile.methods.recipe import quantize_data_free
from tqcompile.methods.rounding import grid_scales, group_scales, round_to_codes, row_units
from tqcompile.methods.statistics import StatisticsCollector
from tqcompile.modules import TwinLinear
from tqcompile.ops.packing import dequantize_int4, integer_scales, unpack_int4

K, SIZES = 192, (34, 10)
CONFIG = Config(rank=8, group_size=64)
FLOAT64 = torch.float64


def inputs(t=160, seed=0):
    """(T, K) with a few channels that are 30 times as large as the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, K // 8, generator=g) @ torch.randn(K // 8, K, generator=g) / 5
    x = x + 0.5 * torch.randn(t, K, generator=g)
    x[:, [3, 70, 131]] *= 30
    return x


def statistics(x):
    collector = StatisticsCollector(K, "cpu", 2, 1)
    collector.add(x[: len(x) // 2], held_out=False)
    collector.add(x[len(x) // 2 :], held_out=True)
    return collector.finish()


def problem(scheme, data=True, seed=0, bias=True, config=CONFIG, tie=None):
    g = torch.Generator().manual_seed(100)
    weights = [torch.randn(n, K, generator=g) / K**0.5 for n in SIZES]
    biases = [torch.randn(n, generator=g) if bias else None for n in SIZES]
    stats = statistics(inputs()) if data else None
    config = config.replace(scheme=scheme, seed=seed)
    return twin.SiteProblem(weights, biases, stats, Scheme.parse(scheme), config, tie, "the.site")


def solve(p):
    transform = twin.closed_form_transform(p, twin.choose_scale(p))
    return transform, twin.quantize_site(p, transform)


def integers(packed):
    """Unpack without the code under test."""
    bytes_ = packed.numpy()
    nibbles = np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(len(bytes_), -1).astype(np.int64)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float64)


def dense(tensors, name):
    q, scale = integers(tensors[f"{name}.weight_packed"]), tensors[f"{name}.weight_scale"].double().numpy()
    return q * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)


def exact_forward(quantized, x):
    """float64 output of a quantized linear on x (T, K), and a bound on what float32 arithmetic may change."""
    spec, t = quantized.spec, quantized.tensors
    h = x.double().numpy()
    blur = np.zeros_like(h)  # rounding errors of the transformed input
    eps, tiny = 2.0**-23, 2.0**-24
    if spec.scaled:
        h = h * t["transform.input_scale"].double().numpy()
        blur += eps * np.abs(h)
    if spec.rotation_block:
        q = t["transform.rotation"].double().numpy()
        q = np.kron(np.eye(K // len(q)), q)
        blur = (blur + spec.rotation_block * eps * np.abs(h)) @ np.abs(q)
        h = h @ q
    residual = dense(t, "residual")
    low = np.zeros((spec.out_features, K))
    if spec.rank and spec.low_rank_bits == 4:
        low = dense(t, "up") @ dense(t, "down")
        low_abs = np.abs(dense(t, "up")) @ np.abs(dense(t, "down"))
    elif spec.rank:
        low = t["up"].double().numpy() @ t["down"].double().numpy()
        low_abs = np.abs(t["up"].double().numpy()) @ np.abs(t["down"].double().numpy())
    else:
        low_abs = np.abs(low)
    coarse = fine = h
    if spec.act_bits != 16:
        scale = np.abs(h).max(1, keepdims=True) / 127
        exact = h / scale
        codes = np.rint(exact)
        fine = coarse = codes * scale
        # Where float32 may round to the other side of a tie, the 8-bit code may differ by one.
        doubtful = np.abs(np.abs(exact - np.floor(exact)) - 0.5) <= 127 * 4 * eps + 2 * blur / scale
        step = np.where(doubtful, scale, 0)
        if spec.act_bits == 4:
            coarse = np.clip(np.rint(codes * spec.act_ratio), -8, 7) * scale / spec.act_ratio
            flip = np.where(doubtful, scale / spec.act_ratio, 0)
        else:
            flip = step
        blur = blur.max(1, keepdims=True) / 127 / scale * np.abs(fine)  # through the scale only
        bound = flip @ np.abs(residual).T + step @ low_abs.T
    else:
        bound = np.zeros((len(h), spec.out_features))
    wide = fine if spec.low_rank_bits == 4 else h
    y = coarse @ residual.T + wide @ low.T
    weight = np.abs(residual) + low_abs
    terms = K + spec.rank + 8
    bound = bound + 2 * blur @ weight.T + terms * tiny * 2 * (np.abs(coarse) + np.abs(wide)) @ weight.T
    if "bias" in t:
        y = y + t["bias"].double().numpy()
    return y, bound + eps * np.abs(y)


@pytest.mark.parametrize("scheme", FOUR_BIT_SCHEMES)
@pytest.mark.parametrize("data", [True, False])
def test_the_layer_computes_its_dequantized_product(scheme, data):
    p = problem(scheme, data)
    _, results = solve(p)
    x = inputs(7, seed=5)
    for quantized, weight, bias in zip(results, p.weights, p.biases, strict=True):
        layer = TwinLinear.from_quantized(quantized)
        y, bound = exact_forward(quantized, x)
        assert (np.abs(layer(x).double().numpy() - y) <= bound).all()
        wanted = x.double() @ weight.double().t() + bias.double()
        error = np.linalg.norm(y - wanted.numpy()) / wanted.norm().item()
        assert error < {16: 0.2, 8: 0.25, 4: 0.8}[p.scheme.act_bits]
        # The bound is far below the quantization error, so it would not hide a wrong component.
        assert np.linalg.norm(bound) < 0.05 * np.linalg.norm(wanted.numpy())


@pytest.mark.parametrize("scheme", FOUR_BIT_SCHEMES)
def test_the_description_fits_the_tensors(scheme):
    p = problem(scheme)
    transform, results = solve(p)
    method, bits = p.scheme.method, p.scheme.act_bits
    for quantized, weight, bias in zip(results, p.weights, p.biases, strict=True):
        spec, tensors = quantized.spec, quantized.tensors
        assert (spec.out_features, spec.in_features) == tuple(weight.shape)
        assert spec.rank == (8 if method in ("twin", "svdquant") else 0)
        assert spec.low_rank_bits == (16 if method == "svdquant" else 4)
        assert (spec.act_bits, spec.group_size) == (bits, 64)
        assert spec.rotation_block == (64 if method in ("twin", "quarot", "spinquant") else 0)
        assert (spec.act_ratio > 0) == (bits == 4)
        assert spec.scaled == ("transform.input_scale" in tensors) == (transform.scale is not None)
        assert torch.equal(tensors["bias"], bias)
        assert tensors["bias"].data_ptr() != bias.data_ptr()
        codes = unpack_int4(tensors["residual.weight_packed"])
        assert codes.shape == weight.shape
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                assert tensor.dtype == torch.bfloat16
                assert (tensor > 0).all()
            assert tensor.is_contiguous(), name
        if spec.rotation_block:
            assert torch.equal(tensors["transform.rotation"], signed_hadamard(spec.rotation_signs))
        if method == "svdquant":
            assert tensors["up"].dtype == tensors["down"].dtype == torch.bfloat16


def test_every_scheme_orders_as_it_should():
    x = inputs(200, seed=9)
    error = {}
    for scheme in FOUR_BIT_SCHEMES:
        p = problem(scheme, bias=False)
        _, results = solve(p)
        y = torch.cat([TwinLinear.from_quantized(q)(x) for q in results], 1)
        wanted = x.double() @ p.stacked().double().t()
        error[scheme] = ((y - wanted).norm() / wanted.norm()).item()
    for bits in ("w4a4", "w4a8"):
        assert error[f"twin-{bits}"] < error[f"svdquant-{bits}"] < error[f"rtn-{bits}"]
    for method in ("twin", "svdquant", "gptq", "rtn"):
        assert error[f"{method}-w4a16"] <= error[f"{method}-w4a8"] * 1.02 < error[f"{method}-w4a4"]


def random_transform(seed=0, dtype=FLOAT64):
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(K, generator=g, dtype=FLOAT64)).to(dtype)
    rotation = signed_hadamard(random_signs(64, g)).to(dtype)
    return twin.SiteTransform(scale, rotation, 0.0, None)


def general_rotation():
    g = torch.Generator().manual_seed(6)
    return torch.eye(32, dtype=FLOAT64) + 0.1 * torch.randn(32, 32, generator=g, dtype=FLOAT64)


@pytest.mark.parametrize(
    "transform",
    [
        random_transform(),
        twin.SiteTransform(random_transform().scale, None, 0.0, None),
        twin.SiteTransform(None, random_transform().rotation, 0.0, None),
        twin.SiteTransform(None, None, 0.0, None),
        twin.SiteTransform(random_transform(1).scale, general_rotation(), 0.0, None),
    ],
)
def test_a_transform_keeps_the_function(transform):
    x, w = inputs(9).double(), problem("twin-w4a8").stacked().double()
    before, after = x @ w.t(), transform.activations(x) @ transform.weights(w).t()
    # K = 192 products in float64 and condition numbers below 1e3: about 1e-11; 1e-9 leaves room.
    assert (before - after).abs().max() < 1e-9 * before.abs().max()
    moved = transform.activations(x)
    h = transform.hessian(x.t() @ x)
    assert (h - moved.t() @ moved).abs().max() < 1e-9 * h.abs().max()


def test_the_smoothing_scale_is_smoothquants_formula():
    w, absmax = problem("twin-w4a8").stacked(), inputs().abs().amax(0)
    for exponent in (0.3, 0.75):
        scale = twin.smoothing_scale(absmax, w, exponent, None).double().numpy()
        expected = absmax.double().numpy() ** exponent / w.abs().amax(0).double().numpy() ** (1 - exponent)
        expected /= np.exp(np.log(expected).mean())
        # log and exp of numbers up to about 10: 10 * 2**-23 relative.
        assert np.allclose(scale, expected, rtol=2e-6, atol=0)
    assert torch.equal(twin.smoothing_scale(absmax, w, 0.0, None), torch.ones(K))


def test_channels_that_are_never_used_get_a_finite_scale():
    w, absmax = problem("twin-w4a8").stacked(), inputs().abs().amax(0)
    absmax[:5] = 0
    w[:, 3:8] = 0
    for a, b in ((absmax, w), (absmax * 0, w), (absmax, w * 0)):
        scale = twin.smoothing_scale(a, b, 0.6, None)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


def test_tied_channels_share_the_scale_of_the_group():
    w, absmax = problem("twin-w4a8").stacked(), inputs().abs().amax(0)
    tie = torch.arange(K) % 96 // 2 * 2 + torch.arange(K) % 2
    scale = twin.smoothing_scale(absmax, w, 0.6, tie)
    assert torch.equal(scale[:96], scale[96:])
    merged = twin.smoothing_scale(
        torch.maximum(absmax[:96], absmax[96:]), torch.maximum(w[:, :96].abs(), w[:, 96:].abs()), 0.6, None
    )
    assert torch.allclose(scale[:96], merged, rtol=1e-5, atol=0)
    p = problem("twin-w4a4", tie=tie)
    chosen = twin.choose_scale(p)
    assert torch.equal(chosen[:96], chosen[96:])


@pytest.mark.parametrize(("method", "smooths"), [("rtn", False), ("gptq", False), ("svdquant", True), ("twin", True)])
def test_only_methods_that_smooth_choose_a_scale(method, smooths):
    chosen = twin.choose_scale(problem(f"{method}-w4a4"))
    assert (chosen is not None) == smooths  # three channels are 30 times as large: a scale always pays
    assert twin.choose_scale(problem(f"{method}-w4a4", data=False)) is None


def reconstruct(quantized):
    t = quantized.tensors
    return dense(t, "residual"), dense(t, "up") @ dense(t, "down")


def test_the_residual_is_what_the_rounded_factors_leave():
    p = problem("twin-w4a16", data=False)
    transform, results = solve(p)
    target = transform.weights(p.stacked())
    rounded = transform.factors
    start = 0
    for quantized in results:
        rows = slice(start, start := start + quantized.spec.out_features)
        _, product = reconstruct(quantized)
        assert np.allclose(product, rounded.product()[rows].double().numpy(), rtol=0, atol=1e-6 * np.abs(product).max())
        left = target[rows] - rounded.product()[rows]
        scale = grid_scales(left, row_units(left, 64), 64)
        assert torch.equal(quantized.tensors["residual.weight_scale"].float(), scale)
        assert torch.equal(unpack_int4(quantized.tensors["residual.weight_packed"]), round_to_codes(left, scale))
    # Without the feedback the rounding error of the factors stays in the result.
    exact = svd_factors(target, 8, torch.Generator().manual_seed(0))
    naive = quantize_factors(exact, 64)
    left = target - exact.product()
    scale = group_scales(left, 64)
    codes = round_to_codes(left, scale).double() * scale.double().repeat_interleave(64, 1)
    without = (codes + naive.product().double() - target.double()).norm().item()
    parts = [reconstruct(q) for q in results]
    with_feedback = np.linalg.norm(np.concatenate([rest + low for rest, low in parts]) - target.double().numpy())
    assert with_feedback < 0.9 * without


def same(a, b):
    return a.spec == b.spec and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


@pytest.mark.parametrize("data", [True, False])
def test_the_seed_decides_every_byte(data):
    first, again, other = (solve(problem("twin-w4a4", data, seed))[1] for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].spec.rotation_signs != other[0].spec.rotation_signs


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    solve(problem("twin-w4a8"))
    solve(problem("svdquant-w4a8"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scheme", FOUR_BIT_SCHEMES)
def test_data_free_is_the_identity_hessian(scheme):
    p = problem(scheme, data=False)
    expected = twin.quantize_site(
        twin.SiteProblem(p.weights[:1], p.biases[:1], None, p.scheme, p.config),
        twin.closed_form_transform(twin.SiteProblem(p.weights[:1], [None], None, p.scheme, p.config), None),
    )[0]
    found = quantize_data_free(p.weights[0], p.biases[0], p.config)
    assert same(found, expected)
    assert not found.spec.scaled
    assert same(quantize_data_free(p.weights[0].double(), p.biases[0], p.config), expected)


def test_the_activation_clip_is_chosen_on_the_data():
    p = problem("gptq-w4a4")
    transform, _ = solve(p)
    allowed = [twin.act_ratio_for(p.scheme, clip) for clip in twin.ACTIVATION_CLIPS]
    assert transform.act_ratio in allowed
    rows, w = p.statistics.rows, p.stacked()
    errors = [((twin.quantized_operands(rows, 4, ratio)[0] - rows) @ w.t()).norm().item() for ratio in allowed]
    assert transform.act_ratio == allowed[int(np.argmin(errors))]
    assert solve(problem("rtn-w4a4"))[0].act_ratio == 7 / 127
    assert solve(problem("gptq-w4a8"))[0].act_ratio == 0


def test_quantized_operands_follow_the_op():
    x = inputs(6)
    assert all(torch.equal(a, x) for a in twin.quantized_operands(x, 16, 0.0))
    coarse, fine = twin.quantized_operands(x, 4, 7 / (127 * 0.9))
    scale = x.abs().amax(1, keepdim=True) / 127
    assert ((fine - x).abs() <= scale * 0.5001).all()
    steps = coarse / (scale * 127 * 0.9 / 7)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.min() >= -8.001
    assert steps.max() <= 7.001


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_name_the_site(bad):
    p = problem("twin-w4a8", data=False)
    p.weights[1][3, 4] = bad
    with pytest.raises(NumericError, match=r"the\.site: weights: 1 of"):
        solve(p)


def test_a_hessian_of_zeros_names_the_site():
    p = problem("gptq-w4a8")
    p.statistics.hessian.zero_()
    with pytest.raises(NumericError, match=r"the\.site: the calibration Hessian"):
        solve(p)


def test_absorbed_drops_the_scale_and_nothing_else():
    _, (quantized, _) = solve(problem("twin-w4a8"))
    assert quantized.spec.scaled
    left = twin.absorbed(quantized)
    assert set(quantized.tensors) - set(left.tensors) == {"transform.input_scale"}
    assert not left.spec.scaled
    assert "transform.input_scale" in quantized.tensors
    x = inputs(5, seed=8)
    scale = 1 / quantized.tensors["transform.input_scale"]
    with_scale, without = TwinLinear.from_quantized(quantized)(x), TwinLinear.from_quantized(left)(x / scale)
    # x * (1/s) and x / s differ by one rounding, which can flip a few 8-bit codes.
    assert (with_scale - without).norm() < 2e-3 * with_scale.norm()


@pytest.mark.parametrize("width", [8 * 4, 96, 100 * 8])
def test_odd_widths_have_no_or_a_smaller_rotation(width):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(12, width, generator=g)
    found = quantize_data_free(weight, None, Config(rank=8, group_size=32))
    assert found.spec.rotation_block == 32
    x = torch.randn(3, width, generator=g)
    y = TwinLinear.from_quantized(found)(x)
    assert (y - x @ weight.t()).norm() < 0.15 * (x @ weight.t()).norm()
    restored = dequantize_int4(found.tensors["residual.weight_packed"], found.tensors["residual.weight_scale"])
    assert restored.shape == weight.shape


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("scheme", ["twin-w4a16", "twin-w4a8", "twin-w4a4"])
def test_residual_scales_of_twin_are_integers_times_one_number_per_row(scheme, data):
    for quantized in solve(problem(scheme, data))[1]:
        scale = quantized.tensors["residual.weight_scale"]
        c, m = integer_scales(scale)
        assert torch.equal(c[:, None] * m, scale.float())
