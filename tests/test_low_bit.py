"""A site below four bits: candidates and their choice, the column scale of down_proj, and what is stored."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import logits, tiny, tokens
from torch import nn

import tqcompile
from tqcompile.block_tuning import TunableLattice
from tqcompile.config import Config, Scheme
from tqcompile.errors import NumericError
from tqcompile.methods import low_bit, recipe
from tqcompile.methods.dual_scale import OBJECTIVES, column_factors, dual_scale
from tqcompile.methods.low_bit import balance_columns, solve_site
from tqcompile.methods.statistics import StatisticsCollector
from tqcompile.methods.twin import SiteProblem
from tqcompile.modules import LatticeLinear

SETTINGS = {"group_size": 64, "tune": 0, "progress": False, "backend": None}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(scheme="d2-w2a16", n=(32, 64), k=128, dual=True, tie=None, seed=0):
    config = Config(scheme=scheme, group_size=64)
    gains = torch.exp(0.8 * random(k, seed=seed + 9))
    collector = StatisticsCollector(k, "cpu", 2, 1, recipe.recipe_of(Scheme.parse(scheme)).balance)
    mix = torch.eye(k) + random(k, k, seed=seed + 8) / k**0.5
    for held_out in (False, True):
        collector.add(random(500, k, seed=seed + held_out) @ mix * gains, held_out)
    weights = [random(rows, k, seed=seed + 20 + rows) / gains for rows in n]
    biases = [random(rows, seed=seed + 40 + rows) for rows in n]
    return SiteProblem(weights, biases, collector.finish(), Scheme.parse(scheme), config, tie, "site", 0, dual)


@pytest.mark.parametrize("scheme", ["d2-w2a16", "d2-w3a16", "unisvq-w2a16", "gptq-w2a16", "quarot-w3a16", "rtn-w3a16"])
def test_the_error_is_that_of_the_stored_layers(scheme):
    p = problem(scheme)
    solution = solve_site(p)
    x = p.statistics.held_out
    if p.statistics.balanced:
        from tqcompile.methods.statistics import balance_tokens

        x = balance_tokens(x)
    y = torch.cat([LatticeLinear.from_quantized(q)(x) for q in solution.quantized], 1) - torch.cat(p.biases)
    target = x @ p.stacked().t()
    measured = float((y - target).norm() / target.norm())
    assert solution.error == pytest.approx(measured, rel=0.02)  # the folded rotation is rounded to bfloat16
    assert not solution.learned


def test_the_best_candidate_is_kept():
    p, seen = problem(), []
    solution = solve_site(p, on_step=seen.append)
    assert len(seen) == 6  # with and without rotation and rescaling, and both column scales
    assert solution.error == min(seen)
    plain = solve_site(problem("gptq-w2a16"))
    assert solution.error < plain.error


def test_applied_scales_are_what_the_codes_are_for():
    p = problem("unisvq-w2a16")
    solution = solve_site(p, applied=lambda scale: torch.exp2(torch.log2(scale).round()))
    scale = solution.transform.scale
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert solution.transform.scale_name == "rescale"


def test_rescaling_balances_columns_and_keeps_ties():
    w, energy = random(40, 64).abs() + 0.1, torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    s = balance_columns(w, energy, None).double()
    ratio = (energy / s.square()) / (w.double() * s).square().sum(0)
    assert torch.allclose(ratio, ratio[:1].expand(64), rtol=1e-4)
    assert float(s.log().mean()) == pytest.approx(0, abs=1e-5)
    tie = torch.arange(64) % 16
    tied = balance_columns(w, energy, tie)
    assert torch.equal(tied, tied[:16].repeat(4))


@pytest.mark.parametrize("tied", [False, True])
def test_column_factors_are_the_least_squares_solution(tied):
    w, q = random(20, 24, seed=1).double(), random(20, 24, seed=2).double()
    q = w + 0.3 * q
    x = random(60, 24, seed=3).double()
    h = x.t() @ x
    tie = torch.arange(24) // 2 if tied else None
    spread = torch.eye(24, dtype=torch.float64) if tie is None else nn.functional.one_hot(tie).double()
    # vec(x (q diag(spread f))^T) is linear in f: solve it as one least squares problem.
    columns = torch.einsum("tk,nk,kf->tnf", x, q, spread).reshape(60 * 20, -1)
    expected = torch.linalg.lstsq(columns, (x @ w.t()).reshape(-1, 1)).solution[:, 0] @ spread.t()
    found = column_factors(w.float(), q.float(), h.float(), tie).double()
    assert (found - expected).abs().max() < 5e-3  # the ridge is 1e-3
    plain = torch.einsum("nk,kf->nkf", q, spread).reshape(20 * 24, -1)
    expected = torch.linalg.lstsq(plain, w.reshape(-1, 1)).solution[:, 0] @ spread.t()
    assert (column_factors(w.float(), q.float(), None, tie).double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_column_scale_lowers_its_own_error(objective):
    p = problem(n=(64,))
    w = p.stacked() * torch.exp(0.5 * random(128, seed=77))
    p.weights = [w]
    h = p.statistics.hessian

    def error(s):
        weight = None if objective == "weights" else h.diagonal() / s.square()
        e = (w - low_bit.encode(w * s, 2, 64, None, weight).weights() / s).double()
        return float((e @ h.double() * e).sum()) if objective == "hessian" else float(e.square().sum())

    s = dual_scale(w, p, objective)
    assert s.shape == (128,)
    assert (s > 0).all()
    assert error(s) < 0.97 * error(torch.ones(128))


def test_weights_that_are_not_finite_are_refused():
    p = problem()
    p.weights[1][3, 5] = float("nan")
    with pytest.raises(NumericError, match="site: weights: 1 of"):
        solve_site(p)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen2"])
def test_the_column_scale_goes_into_up_proj_or_stays_on_line(name, monkeypatch):
    # Only the column scale is left to choose from for down_proj.
    candidates = low_bit._candidates

    def only_dual(p, w):
        found = candidates(p, w)
        return [c for c in found if c[0].startswith("dual")] or found[:1]

    monkeypatch.setattr(low_bit, "_candidates", only_dual)
    model = tiny(name)
    tqcompile.compile(model, tokens(), scheme="d2-w3a16", **SETTINGS)
    records = {r.name: r for r in tqcompile.report(model).layers}
    down = records["model.layers.1.mlp.down_proj"]
    assert down.transform.startswith("dual scale (")
    assert down.transform.endswith("in model.layers.1.mlp.up_proj")
    assert "on-line" not in down.transform
    assert not model.model.layers[1].mlp.down_proj.spec.scaled
    assert torch.isfinite(logits(model)).all()
    # Where up_proj stays as it is, nothing absorbs, and no column scale is tried.
    model = tiny(name)
    ignore = ("lm_head", "model.layers.1.mlp.up_proj")
    tqcompile.compile(model, tokens(), scheme="d2-w3a16", ignore=ignore, **SETTINGS)
    down = next(r for r in tqcompile.report(model).layers if r.name == "model.layers.1.mlp.down_proj")
    assert "dual" not in down.transform
    assert "no column scale (model.layers.1.mlp.up_proj could absorb but is not quantized" in down.transform


def test_the_parts_that_the_accuracy_benchmark_leaves_out_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import accuracy

    recipes = dict(recipe.LOW_BIT_RECIPES)
    for method, variants in accuracy.LOW_BIT_ABLATIONS.items():
        for variant in variants:
            monkeypatch.setattr(recipe, "LOW_BIT_RECIPES", dict(recipes))
            settings = accuracy.apply_variant(variant, f"{method}-w2a16")
            Config(**settings)
            assert settings or recipe.LOW_BIT_RECIPES[method] != recipes[method]


@pytest.mark.parametrize("scheme", ["d2-w3a16", "unisvq-w2a16", "twin-w2a16", "mixed"])
def test_the_tunable_form_computes_the_stored_layer_and_stores_what_it_computes(scheme, monkeypatch):
    if scheme == "mixed":
        scheme = "unisvq-w2a16"
        mixed = dataclasses.replace(recipe.LOW_BIT_RECIPES["unisvq"], mix_outputs=True)
        monkeypatch.setitem(recipe.LOW_BIT_RECIPES, "unisvq", mixed)
    stored = solve_site(problem(scheme)).quantized
    x = random(3, 5, 128, seed=1)
    first = TunableLattice(stored[0], x.device)
    second = TunableLattice(stored[1], x.device, first)
    for tunable, quantized in ((first, stored[0]), (second, stored[1])):
        expected = LatticeLinear.from_quantized(quantized)(x)
        assert (tunable(x) - expected).norm() < 5e-3 * expected.norm()  # T and Q are rounded as one matrix
        result = tunable.result()
        assert result.spec == quantized.spec
        assert {n: t.dtype for n, t in result.tensors.items()} == {n: t.dtype for n, t in quantized.tensors.items()}
        assert all(torch.equal(result.tensors[n], t) for n, t in quantized.tensors.items())
    # After a step on everything that is free, the stored layer still computes what was tuned.
    with torch.no_grad():
        for index, parameter in enumerate([*first.parameters(), *second.parameters()]):
            if parameter.requires_grad and parameter.is_floating_point() and parameter.dim():
                parameter.add_(0.02 * random(*parameter.shape, seed=index))
    for tunable, quantized in ((first, stored[0]), (second, stored[1])):
        result = tunable.result()
        moved = {n for n, t in quantized.tensors.items() if not torch.equal(t, result.tensors[n])}
        free = {"weight_scale", "weight_zero", "weight_offset", "output_scale", "bias", "transform.basis"}
        assert free & set(quantized.tensors) <= moved
        assert not moved & {"weight_codes", "transform.input_scale", "down.weight_packed", "up.weight_packed"}
        expected = LatticeLinear.from_quantized(result)(x)
        assert (tunable(x) - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("scheme", ["d2-w2a16", "unisvq-w2a16"])
def test_tuning_brings_blocks_closer(scheme):
    model = tiny("Qwen3")
    tqcompile.compile(model, tokens(), scheme=scheme, **{**SETTINGS, "tune": 8})
    records = tqcompile.report(model).blocks
    assert len(records) == 2
    assert all(r.kept and r.after < 0.95 * r.before for r in records)


def test_same_seed_same_bytes():
    runs = [solve_site(problem("unisvq-w2a16")).quantized for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert one.spec == other.spec
        assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)
