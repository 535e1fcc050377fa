"""D2Quant's mean correction: where it goes, what it adds, and that it undoes the shift of the quantized model."""

import pytest
import torch
from tiny_models import assert_unchanged, logits, snapshot, tiny, tokens
from torch import nn

import tqcompile
from tqcompile.methods import recipe
from tqcompile.passes.correct_norm_mean import ShiftedNorm, correct_norm_mean, shifted_norms
from tqcompile.passes.replace_linear import Journal

SETTINGS = {"scheme": "d2-w2a16", "group_size": 64, "tune": 0, "progress": False, "backend": None}


def test_a_norm_without_bias_gets_one_and_the_journal_takes_it_back():
    model = nn.ModuleDict({"norm": nn.RMSNorm(16)})
    before, journal = snapshot(model), Journal(model)
    shift, x = torch.randn(16), torch.randn(3, 5, 16)
    expected = model["norm"](x) + shift
    assert correct_norm_mean(model, "norm", shift, journal) == "norm.shift"
    assert torch.equal(model["norm"](x), expected)
    assert shifted_norms(model) == ["norm"]
    journal.restore()
    assert_unchanged(model, before)


def test_a_norm_with_a_bias_keeps_its_structure():
    model = nn.ModuleDict({"norm": nn.LayerNorm(16)})
    before, journal = snapshot(model), Journal(model)
    shift, x = torch.randn(16), torch.randn(7, 16)
    expected = model["norm"](x) + shift
    assert correct_norm_mean(model, "norm", shift, journal) == "norm.bias"
    assert torch.allclose(model["norm"](x), expected, atol=1e-6)
    assert not shifted_norms(model)
    journal.restore()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen2"])
def test_the_mean_in_front_of_the_mlp_is_that_of_the_full_model(name, monkeypatch):
    # Without rescaling nothing else changes the norms, so both means are directly comparable.
    import dataclasses

    own = dataclasses.replace(recipe.LOW_BIT_RECIPES["d2"], smooth=False)
    monkeypatch.setitem(recipe.LOW_BIT_RECIPES, "d2", own)
    model, ids = tiny(name), tokens()
    norms = [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]

    def means():
        found, handles = {}, []
        for n in norms:
            hook = lambda _m, _a, out, n=n: found.__setitem__(n, out.double().flatten(0, 1).mean(0))  # noqa: E731
            handles.append(model.get_submodule(n).register_forward_hook(hook))
        logits(model, ids)
        for handle in handles:
            handle.remove()
        return found

    exact = means()
    tqcompile.compile(model, ids, **SETTINGS)
    assert shifted_norms(model) == norms
    corrected = means()
    for n in norms:
        shift = model.get_submodule(n).shift.double()
        # Before the correction the mean was off by the whole shift.
        assert (corrected[n] - exact[n]).norm() < 1e-4 * shift.norm()
        assert shift.norm() > 1e-3 * exact[n].norm()
    note = next(n for n in tqcompile.report(model).notes if "mean corrected" in n)
    assert "2 biases of norms" in note


def test_a_scale_that_the_norm_absorbed_divides_the_mean_too(monkeypatch):
    model, ids = tiny("Qwen3"), tokens()
    norm = "model.layers.0.post_attention_layernorm"
    seen = {}
    old = model.get_submodule(norm).weight.detach().clone()
    hook = model.get_submodule(norm).register_forward_hook(lambda _m, _a, out: seen.update(a=out.flatten(0, 1).mean(0)))
    logits(model, ids)
    hook.remove()
    # Everything is rescaled: only candidates with a scale are left where there are any.
    from tqcompile.methods import low_bit

    every = low_bit._candidates

    def rescaled(p, w):
        found = every(p, w)
        return [c for c in found if c[1] is not None] or found

    monkeypatch.setattr(low_bit, "_candidates", rescaled)
    tqcompile.compile(model, ids, **SETTINGS)
    shifted = model.get_submodule(norm)
    assert isinstance(shifted, ShiftedNorm)
    scale = old / shifted.norm.weight
    assert (scale - 1).abs().max() > 0.05
    shifted.register_forward_hook(lambda _m, _a, out: seen.update(b=out.flatten(0, 1).mean(0)))
    logits(model, ids)
    assert torch.allclose(seen["b"] * scale, seen["a"], atol=1e-4 * float(seen["a"].abs().max()))


def test_padding_does_not_count():
    model, ids = tiny("Qwen3"), tokens()
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = torch.where(mask.bool(), ids, tokens(seed=5))
    assert not torch.equal(ids, other)
    shifts = []
    for batch in (ids, other):
        model = tiny("Qwen3")
        tqcompile.compile(model, [{"input_ids": batch, "attention_mask": mask}], **SETTINGS)
        shifts.append(model.model.layers[1].post_attention_layernorm.shift.detach())
    assert torch.allclose(*shifts, atol=1e-5 * float(shifts[0].abs().max()))
    assert shifts[0].abs().max() > 0


def test_a_failure_takes_the_correction_back(monkeypatch):
    model = tiny("Qwen3")
    before, calls = snapshot(model), []
    real = tqcompile.api.correct_unit

    def fails(*args):
        calls.append(1)
        real(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("tqcompile.api.correct_unit", fails)
    with pytest.raises(KeyboardInterrupt):
        tqcompile.compile(model, tokens(), **SETTINGS)
    assert_unchanged(model, before)


def test_without_data_or_with_a_shared_norm_it_says_why_not():
    model = tiny("Qwen3")
    tqcompile.compile(model, **SETTINGS)
    assert any("the mean of no norm was corrected" in note for note in tqcompile.report(model).notes)
    bert = tiny("Bert")  # its norms feed the residual stream too
    tqcompile.compile(bert, tokens(), **SETTINGS)
    assert not shifted_norms(bert)
    assert any("the mean of no norm was corrected" in note for note in tqcompile.report(bert).notes)
