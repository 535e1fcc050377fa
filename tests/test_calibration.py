"""Streaming block by block sees what the whole model sees."""

import errno
import itertools
import tempfile

import pytest
import torch
from tiny_models import SETTINGS, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import calibration, demo
from tqcompile.calibration import (
    collect_statistics,
    device_of,
    held_out_batches,
    model_kwargs,
    split_into_units,
)
from tqcompile.config import Config
from tqcompile.errors import CalibrationError
from tqcompile.passes.analyze import analyze
from tqcompile.passes.plan import Site


def batches_of(count, rows=3, length=11, limit=None):
    ids = tokens(count * rows, length) if limit is None else tokens(count * rows, length) * 7 % limit
    return [{"input_ids": chunk} for chunk in ids.split(rows)]


def sites_of(model, example):
    return analyze(model, example, Config(group_size=32, rank=8)).sites


def whole_model(model, sites, batches, keep=None):
    """site -> float64 x^T x over the training batches, by plain hooks on the whole model."""
    found = dict.fromkeys(sites, 0)
    training = batches[: len(batches) - held_out_batches(len(batches))]

    def hook_for(site):
        def hook(_module, args):
            x = args[0].double() if keep is None else args[0][keep].double()
            x = x.reshape(-1, x.shape[-1])
            found[site] = found[site] + x.t() @ x

        return hook

    handles = [model.get_submodule(s.linears[0]).register_forward_pre_hook(hook_for(s)) for s in sites]
    with torch.no_grad():
        for batch in training:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def stream(model, sites, batches):
    units, found = [], {}
    for unit in split_into_units(model, sites, batches):
        units.append(unit.name)
        found |= collect_statistics(model, unit, batches, "cpu")
    return units, found


def assert_equal_hessians(found, expected, tokens_seen):
    assert set(found) == set(expected)
    for site, h in expected.items():
        # A float32 sum of T products; |x|^T|x| is at most the largest diagonal entry.
        bound = tokens_seen * 2.0**-23 * h.diagonal().max()
        assert (found[site].hessian.double() - h).abs().max() <= bound, site.name
        pooled = "pooler" in site.name or "classifier" in site.name  # BERT's last linears read one token a sequence
        assert pooled or found[site].tokens == tokens_seen


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Bert"])
def test_block_by_block_equals_the_whole_model(name):
    model, batches = tiny(name), batches_of(5)
    sites = sites_of(model, batches[0])
    units, found = stream(model, sites, batches)
    prefix = "bert.encoder.layer" if name == "Bert" else "model.layers"
    assert units[:2] == [f"{prefix}.0", f"{prefix}.1"]
    assert_equal_hessians(found, whole_model(model, sites, batches), 4 * 3 * 11)


def test_the_trained_demo_model():
    model = demo.load_model()
    batches = batches_of(3, 2, 33, limit=model.config.vocab_size)
    sites = sites_of(model, batches[0])
    units, found = stream(model, sites, batches)
    assert units == [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    assert_equal_hessians(found, whole_model(model, sites, batches), 2 * 2 * 33)


def test_later_blocks_see_the_earlier_ones_as_they_are_then():
    model, batches = tiny("Qwen3"), batches_of(3)
    sites = sites_of(model, batches[0])
    first = [site for site in sites if site.linears[0].startswith("model.layers.0.")]
    before = whole_model(model, sites, batches)
    found = {}
    for unit in split_into_units(model, sites, batches):
        found |= collect_statistics(model, unit, batches, "cpu")
        if unit.name == "model.layers.0":
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    after = whole_model(model, sites, batches)
    expected = {site: before[site] if site in first else after[site] for site in sites}
    assert_equal_hessians(found, expected, 2 * 3 * 11)
    last = next(s for s in sites if s.linears[0].startswith("model.layers.1.self_attn.o"))
    assert (before[last] - after[last]).abs().max() > 1e-2 * before[last].abs().max()


class Stack(nn.Module):
    """Blocks in a list; ``between`` is what happens to the hidden state from one to the next."""

    def __init__(self, between=lambda x: x, count=3, keyword=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(count)
        )
        self.head = nn.Linear(32, 8)
        self.between, self.keyword = between, keyword

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x) if self.keyword else layer(self.between(x))
        return self.head(x)


def stack(seed=0, **options):
    torch.manual_seed(seed)
    return Stack(**options)


def vectors(count=4, t=13):
    g = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(t, 32, generator=g)} for _ in range(count)]


def every_linear(model):
    return tuple(Site((name,)) for name, m in model.named_modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({}, ["layers.0", "layers.1", "layers.2", "model"]),
        ({"between": lambda x: x * 2}, ["model"]),
        ({"between": lambda x: x.clone()}, ["model"]),
        ({"keyword": True}, ["model"]),
        ({"count": 1}, ["layers.0", "model"]),
    ],
)
def test_blocks_that_do_not_chain_are_calibrated_in_one_piece(options, units):
    model, batches = stack(**options), vectors()
    sites = every_linear(model)
    found_units, found = stream(model, sites, batches)
    assert found_units == units
    assert_equal_hessians(found, whole_model(model, sites, batches), 3 * 13)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_blocks_called_out_of_order_are_calibrated_in_one_piece():
    class Backwards(Stack):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            return self.head(x)

    torch.manual_seed(0)
    model, batches = Backwards(), vectors()
    units, found = stream(model, every_linear(model), batches)
    assert units == ["model"]
    assert_equal_hessians(found, whole_model(model, every_linear(model), batches), 3 * 13)


def test_masked_tokens_are_not_counted():
    model = tiny("Qwen3")
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, 1:] = 0
    batches = [{**batch, "attention_mask": mask} for batch in batches_of(4)]
    batches[1] = {**batches[1], "attention_mask": torch.ones_like(mask)}
    sites = sites_of(model, batches[0])
    _, found = stream(model, sites, batches)
    counted = dict.fromkeys(sites, 0)
    for batch in batches[:3]:
        part = whole_model(model, sites, [batch], batch["attention_mask"].bool())
        counted = {site: counted[site] + part[site] for site in sites}
    assert_equal_hessians(found, counted, 2 * (7 + 11 + 1) + 33)


def test_a_batch_that_is_masked_out_altogether():
    model, batches = tiny("Qwen3"), batches_of(3)
    batches[0]["attention_mask"] = torch.zeros(3, 11, dtype=torch.long)
    _, found = stream(model, sites_of(model, batches[1]), batches)
    assert all(statistics.tokens == 33 for statistics in found.values())


@pytest.mark.parametrize(("batches", "held"), [(1, 0), (2, 1), (7, 1), (8, 1), (16, 2), (100, 12)])
def test_one_batch_in_eight_is_held_out(batches, held):
    assert held_out_batches(batches) == held


def test_held_out_batches_never_reach_the_hessian():
    model, batches = stack(), vectors(9)
    sites = every_linear(model)
    _, expected = stream(model, sites, batches)
    changed = [*batches[:-1], {"x": batches[-1]["x"] * 1000 + 7}]
    _, found = stream(model, sites, changed)
    for site in sites:
        assert torch.equal(found[site].hessian, expected[site].hessian)
        assert torch.equal(found[site].absmax, expected[site].absmax)
        assert torch.equal(found[site].rows, expected[site].rows)
        assert not torch.equal(found[site].held_out, expected[site].held_out)
    assert torch.equal(found[sites[0]].held_out, changed[-1]["x"])


def test_damaged_activations_name_the_first_linear_and_the_batch():
    model, batches = tiny("Qwen3"), batches_of(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    batches = [{"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 5, 6)} for batch in batches]
    batches[2]["input_ids"][1, 3] = 5
    with pytest.raises(CalibrationError) as caught:
        stream(model, sites_of(model, batches[0]), batches)
    assert "model.layers.0.self_attn.q_proj: its input is NaN or infinite on calibration batch 2" in str(caught.value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_linear_that_no_batch_reaches_is_named():
    model = stack()
    model.spare = nn.Linear(32, 32)
    with pytest.raises(CalibrationError, match="spare: not reached by any calibration batch"):
        stream(model, every_linear(model), vectors())


def test_a_linear_that_only_held_out_batches_reach_is_named():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.b(x) if x.sum() > 1e6 else self.a(x)

    batches = vectors()
    batches[-1]["x"] = batches[-1]["x"].abs() * 1e6
    model = Late()
    with pytest.raises(CalibrationError, match="b: not reached"):
        stream(model, every_linear(model), batches)


def test_no_cache_where_the_model_has_one():
    batch = batches_of(1)[0]
    assert model_kwargs(tiny("Qwen3"), batch)["use_cache"] is False
    assert model_kwargs(stack(), {"x": 1}) == {"x": 1}
    assert device_of(nn.Identity()) == torch.device("cpu")


@pytest.mark.parametrize("scheme", ["twin-w4a8", "d2-w3a16"])
def test_hidden_states_in_files_give_the_same_bytes_and_leave_nothing(monkeypatch, tmp_path, scheme):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def quantized():
        return tqcompile.compile(tiny("Qwen3"), tokens(), **{**SETTINGS, "scheme": scheme, "tune": 2}).state_dict()

    expected, plain, mapped = quantized(), calibration._in_file, []
    monkeypatch.setattr(calibration, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(calibration, "_in_file", lambda tensor: mapped.append(plain(tensor)) or mapped[-1])
    found = quantized()
    assert len(mapped) >= 2
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(mapped))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_hidden_states_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"do not fit in .*Point TMPDIR"):
        calibration.HiddenStates([torch.ones(2, 3)], mapped=True)
    assert not list(tmp_path.iterdir())
