"""Journal: what it replaces, and that restoring brings back the very objects and bytes."""

import types

import torch
from tiny_models import assert_unchanged, snapshot, tiny
from torch import nn

from tqcompile.passes.replace_linear import Journal


def test_a_parameter_is_replaced_under_all_of_its_names():
    model = tiny("Qwen3", tie_word_embeddings=True)
    before, journal = snapshot(model), Journal(model)
    old = model.lm_head.weight
    journal.set_parameter("model.embed_tokens.weight", torch.zeros_like(old))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.any()
    assert old.any()
    journal.restore()
    assert model.lm_head.weight is old
    assert_unchanged(model, before)


def test_changes_are_undone_in_whatever_order_they_were_made():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "norm": nn.RMSNorm(4)})
    model["a"].weight.requires_grad_(False)
    before, journal = snapshot(model), Journal(model)
    with torch.no_grad():
        journal.remember(model["norm"])
        model["norm"].weight.mul_(2)
        journal.set_parameter("norm.weight", torch.full((4,), 7.0))
        journal.remember(model["norm"])
        model["norm"].weight.add_(1)
        journal.set_parameter("a.weight", torch.ones(3, 4))
        assert not model["a"].weight.requires_grad
        journal.replace("a", nn.Linear(4, 3))
        journal.set_parameter("a.weight", torch.zeros(3, 4))
    assert torch.equal(model["norm"].weight, torch.full((4,), 8.0))
    journal.restore()
    assert_unchanged(model, before)


def test_untying_and_settings():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    a.weight = b.weight
    model, config = nn.Sequential(a, b), types.SimpleNamespace(tied=True)
    journal = Journal(model)
    journal.assign_parameter(b, "weight", nn.Parameter(torch.zeros(4, 4)))
    journal.remember_attribute(config, "tied")
    config.tied = False
    assert a.weight is not b.weight
    assert not config.tied
    journal.restore()
    assert a.weight is b.weight
    assert config.tied is True
