"""bits_budget: the knapsack against every combination, the budget kept, and what the choice is made of."""

import itertools

import pytest
import torch
from tiny_models import SETTINGS, assert_unchanged, logits, snapshot, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import allocation
from tqcompile.allocation import Option, Setting, spend
from tqcompile.config import Config
from tqcompile.errors import ConfigError
from tqcompile.reporting import Report

CLOSED = SETTINGS | {"steps": 0, "rank": 16}
ANY = Setting("s", 0, 64)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_trying_every_combination(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.rand(6, 4, generator=generator) * 100 + 10).tolist()
    losses = torch.rand(6, 4, generator=generator).tolist()
    options = [[Option(ANY, b, e) for b, e in zip(*site, strict=True)] for site in zip(sizes, losses, strict=True)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for share in (0.0, 0.05, 0.3, 0.7, 1.0):
        budget = least + share * (most - least)
        picked = spend(options, budget, 1000)
        spent = sum(site[i].size for site, i in zip(options, picked, strict=True))
        loss = sum(site[i].loss for site, i in zip(options, picked, strict=True))
        assert spent <= budget + 1e-6
        # Costs are rounded up to a twenty-thousandth of the room, six times.
        tight = budget - 6 * max(budget - least, 1) / 20_000
        combinations = list(itertools.product(*options))
        within = [sum(o.loss for o in c) for c in combinations if sum(o.size for o in c) <= max(tight, least + 1e-9)]
        best = min(sum(o.loss for o in c) for c in combinations if sum(o.size for o in c) <= budget + 1e-9)
        assert best - 1e-9 <= loss <= min(within) + 1e-9


def test_a_budget_below_the_cheapest_names_the_range():
    options = [[Option(ANY, 200.0, 1.0), Option(ANY, 400.0, 0.1)]] * 2
    with pytest.raises(ConfigError, match=r"bits_budget 1.9 is out of reach: .* from 2.0000 .* to 4.0000 bits"):
        spend(options, 380.0, 200)
    assert spend(options, 400.0, 200) == [0, 0]
    assert spend(options, 1e9, 200) == [1, 1]


@pytest.fixture(scope="module")
def chosen():
    return tqcompile.compile(tiny("Qwen3"), tokens(), scheme="gptq-w3a16", bits_budget=3.4, **CLOSED)


def test_the_budget_is_kept_and_the_report_says_what_and_why(chosen, tmp_path):
    report = tqcompile.report(chosen)
    assert 3.1 < report.bits_per_weight <= 3.4
    assert len(report.choices) == 8
    layers = {layer.name: layer for layer in report.layers}
    for choice in report.choices:
        layer = layers[choice.name.split(" ")[0]]
        assert (layer.scheme, layer.rank) == (choice.scheme, choice.rank)
        assert chosen.get_submodule(layer.name).spec.group_size == choice.group_size
        assert layer.bits == pytest.approx(choice.bits)
        assert list(choice.measured) == ["gptq-w2a16", "gptq-w3a16", "gptq-w4a16"]
    two, three, four = (sum(c.measured[f"gptq-w{bits}a16"] for c in report.choices) for bits in (2, 3, 4))
    assert two > three > four > 0
    assert len({(choice.scheme, choice.group_size) for choice in report.choices}) > 1
    assert report.config["bits_budget"] == 3.4
    (note,) = [note for note in report.notes if note.startswith("bits_budget")]
    assert "with gptq-w3a16 in groups of 64 everywhere" in note
    tqcompile.save(chosen, tmp_path / "out")
    again = tqcompile.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(chosen))
    assert tqcompile.report(again).to_dict() == report.to_dict()
    assert f"chose {report.choices[0].name}: " in str(report)


def test_the_same_seed_gives_the_same_choice_and_an_override_keeps_its_settings(chosen):
    again = tqcompile.compile(tiny("Qwen3"), tokens(), scheme="gptq-w3a16", bits_budget=3.4, **CLOSED)
    assert tqcompile.report(again).choices == tqcompile.report(chosen).choices
    fixed = {"o_proj": {"scheme": "twin-w3a16", "rank": 10}}
    other = tqcompile.compile(tiny("Qwen3"), tokens(), scheme="gptq-w3a16", bits_budget=3.6, overrides=fixed, **CLOSED)
    layers = [layer for layer in tqcompile.report(other).layers if layer.name.endswith("o_proj")]
    assert {(layer.scheme, layer.rank) for layer in layers} == {("twin-w3a16", 10)}
    assert tqcompile.report(other).bits_per_weight <= 3.6


class Sum(nn.Module):
    """Linears that read a part of x each; ``loud`` is much of the output. One name is a part of another on purpose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.loud, self.quiet = nn.Linear(128, 96), nn.ModuleDict({"loud": nn.Linear(128, 96)})
        self.other = nn.Linear(128, 96)

    def forward(self, x):
        a, b, c = x.split(128, -1)
        return 6 * self.loud(a) + self.quiet["loud"](b) + self.other(c)


def test_a_layer_that_matters_more_gets_more_and_the_output_is_closer_than_with_uniform_bits():
    generator = torch.Generator().manual_seed(5)
    data = [{"x": torch.randn(32, 384, generator=generator)} for _ in range(16)]
    x = torch.randn(500, 384, generator=generator)
    exact, errors = Sum()(x).detach(), []
    for settings in ({}, {"bits_budget": 3.375}):
        model = tqcompile.compile(Sum(), data, scheme="gptq-w3a16", **(CLOSED | settings))
        report = tqcompile.report(model)
        assert report.bits_per_weight <= 3.375
        errors.append(float((model(x) - exact).norm() / exact.norm()))
    assert errors[1] < 0.75 * errors[0]
    bits = {choice.name: int(choice.scheme.split("-w")[1][0]) for choice in report.choices}
    assert bits["loud"] == 4 > max(bits["quiet.loud"], bits["other"])
    # The linear whose name is a part of another's has settings of its own.
    assert {layer.name: layer.scheme for layer in report.layers} == {c.name: c.scheme for c in report.choices}


def test_uniform_bits_are_kept_where_the_choice_is_worse(monkeypatch):
    monkeypatch.setattr(allocation, "spend", lambda options, *_: [0] * len(options))  # 2 bits everywhere
    data = [{"x": torch.randn(32, 384, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    model = tqcompile.compile(Sum(), data, scheme="gptq-w3a16", bits_budget=3.4, **CLOSED)
    report = tqcompile.report(model)
    assert {(c.scheme, c.group_size) for c in report.choices} == {("gptq-w3a16", 64)}
    (note,) = [note for note in report.notes if note.startswith("bits_budget")]
    assert note.endswith("with gptq-w3a16 in groups of 64 everywhere: that is kept")


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(monkeypatch):
    def measured(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(allocation, "Divergence", measured)
    monkeypatch.setattr(allocation, "collect_statistics", measured)
    with pytest.raises(ConfigError, match="out of reach"):
        tqcompile.compile(tiny("Llama"), tokens(), scheme="gptq-w3a16", bits_budget=2.1, **CLOSED)
    with pytest.raises(AssertionError, match="measured"):
        tqcompile.compile(tiny("Llama"), tokens(), scheme="gptq-w3a16", bits_budget=2.9, **CLOSED)


def test_a_learned_rotation_that_is_stored_is_within_the_budget():
    settings = CLOSED | {"steps": 2}
    model = tiny("Llama", hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    tqcompile.compile(model, tokens(), scheme="twin-w4a8", bits_budget=8.0, **settings)
    report = tqcompile.report(model)
    assert report.bits_per_weight <= 8.0
    assert any("learned rotation 128 on-line" in layer.transform for layer in report.layers)
    planned = {choice.name.split(" ")[0]: choice.bits for choice in report.choices}
    for layer in report.layers:
        if layer.name.endswith(("o_proj", "down_proj")):
            assert layer.bits <= planned[layer.name] + 1e-9


def test_a_method_without_a_choice_is_refused():
    model, data = nn.Sequential(nn.Linear(96, 64)), [{"input": torch.randn(8, 96)} for _ in range(4)]
    for group_size in (32, 96):
        settings = CLOSED | {"scheme": "gptq-w4a8", "group_size": group_size, "bits_budget": 5.0}
        with pytest.raises(ConfigError, match="there is nothing to choose; use twin, 16-bit activations, or a group"):
            tqcompile.compile(model, data, **settings)


def test_more_bits_are_no_worse():
    model, errors = tiny("Llama"), []
    exact = logits(model)
    for budget in (2.6, 3.5, 4.2):
        settings = CLOSED | {"scheme": "gptq-w3a16"}
        found = tqcompile.compile(tiny("Llama"), tokens(), bits_budget=budget, **settings)
        assert tqcompile.report(found).bits_per_weight <= budget
        errors.append(float((logits(found) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]


def test_an_encoder_is_measured_too():
    model = tqcompile.compile(tiny("Bert"), tokens(), bits_budget=3.4, **(CLOSED | {"scheme": "gptq-w3a16"}))
    assert tqcompile.report(model).bits_per_weight <= 3.4


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (None, {"bits_budget": 4.5}, "bits_budget needs calibration data"),
        (tokens(), {"bits_budget": 1.5}, "bits_budget 1.5 is out of reach"),
        (tokens(), {"bits_budget": -1.0}, "must be a positive number of bits"),
        (tokens(), {"bits_budget": True}, "must be a positive number of bits"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(data, settings, message):
    model = tiny("Llama")
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        tqcompile.compile(model, data, **(CLOSED | settings))
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_an_altered_choice_in_a_checkpoint_is_no_report(chosen):
    data = tqcompile.report(chosen).to_dict()
    assert Report.from_dict(data).choices == tqcompile.report(chosen).choices
    for change in ({"bits": "4"}, {"measured": {"a": "b"}}, {"measured": 3}, {"name": 1}):
        altered = {**data, "choices": [{**data["choices"][0], **change}]}
        with pytest.raises((TypeError, AttributeError)):
            Report.from_dict(altered)


def test_the_budget_is_a_setting_of_the_configuration():
    config = Config(bits_budget=4)
    assert Config.from_dict(config.to_dict()) == config
    assert config.for_layer("x").bits_budget is None
