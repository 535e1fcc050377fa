"""Block tuning: the differentiable block computes what the stored one does, and tuning brings it closer."""

import copy

import pytest
import torch
from tiny_models import SETTINGS, as_bfloat16, assert_unchanged, logits, snapshot, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import block_tuning
from tqcompile.block_tuning import TunableLinear, tune_block
from tqcompile.calibration import BlockCall
from tqcompile.config import Config, Scheme
from tqcompile.methods.select import solve_site
from tqcompile.methods.twin import SiteProblem
from tqcompile.modules import TwinLinear


def quantized(n=48, k=64, scheme="twin-w4a8", bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) / k**0.5
    config = Config(scheme=scheme, rank=8, group_size=32)
    bias = torch.randn(n, generator=g) if bias else None
    return solve_site(SiteProblem([weight], [bias], None, Scheme.parse(scheme), config)).quantized[0], weight


class Block(nn.Module):
    """norm -> linear -> SiLU -> linear, with a residual; returns a tuple, as transformers blocks may."""

    def __init__(self, up, down):
        super().__init__()
        self.norm, self.inner = nn.RMSNorm(64), nn.ModuleDict({"up": up, "down": down})
        self.register_buffer("factor", torch.tensor(1.5))

    def forward(self, hidden, shift, scale=1.0):
        y = self.inner["down"](nn.functional.silu(self.inner["up"](self.norm(hidden) + shift)))
        return hidden + self.factor * scale * y, None


def case(scheme, tokens_per_row=12, batches=4):
    (up, w_up), (down, w_down) = quantized(96, 64, scheme, seed=1), quantized(64, 96, scheme, bias=False, seed=2)
    exact = Block(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    with torch.no_grad():
        exact.inner["up"].weight.copy_(w_up)
        exact.inner["up"].bias.copy_(up.tensors["bias"])
        exact.inner["down"].weight.copy_(w_down)
        exact.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    block = Block(TwinLinear.from_quantized(up), TwinLinear.from_quantized(down))
    block.norm.load_state_dict(exact.norm.state_dict())
    g = torch.Generator().manual_seed(4)
    calls = []
    for _ in range(batches):
        hidden, shift = (torch.randn(5, tokens_per_row, 64, generator=g) for _ in range(2))
        kwargs = {"scale": torch.rand(5, 1, 1, generator=g) + 0.5}
        with torch.no_grad():
            calls.append(BlockCall(hidden, (shift,), kwargs, exact(hidden, shift, **kwargs)[0]))
    return block, {"inner.up": up, "inner.down": down}, calls


def in_sites(linears):
    return [{name: result} for name, result in linears.items()]


def error(block, calls):
    """Independent of the code under test."""
    found = []
    with torch.no_grad():
        for call in calls:
            y = block(call.hidden, *call.args, **call.kwargs)[0].double()
            found.append(((y - call.target).square().sum(-1) / call.target.double().square().sum(-1)).mean())
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("scheme", ["twin-w4a16", "twin-w4a8", "twin-w4a4"])
def test_the_tunable_linear_computes_the_stored_layer(scheme):
    stored, _ = quantized(scheme=scheme)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    y, expected = TunableLinear(stored, x.device)(x), TwinLinear.from_quantized(stored)(x)
    # The layer rounds to 8 bits first: one 4-bit code in 18 (7 / 127) lies so close to a tie that it falls otherwise.
    assert (y - expected).norm() < (0.05 if scheme == "twin-w4a4" else 1e-5) * expected.norm()
    assert y.requires_grad
    result = TunableLinear(stored, x.device).result()
    assert result.spec.act_ratio == pytest.approx(stored.spec.act_ratio)
    assert set(result.tensors) == set(stored.tensors)
    assert all(torch.equal(result.tensors[n], stored.tensors[n]) for n in stored.tensors)


@pytest.mark.parametrize("scheme", ["twin-w4a16", "twin-w4a8", "twin-w4a4"])
def test_tuning_brings_the_block_closer_and_reports_what_is_stored(scheme):
    block, linears, calls = case(scheme)
    before = copy.deepcopy(block.state_dict())
    losses = []
    tuned = tune_block(
        block,
        in_sites(linears),
        ["norm.weight"],
        calls[:3],
        calls[3:],
        60,
        torch.Generator().manual_seed(0),
        losses.append,
    )
    assert len(losses) == 60
    assert all(torch.equal(before[n], t) for n, t in block.state_dict().items())
    slack = {"twin-w4a4": 0.1}.get(scheme, 1e-3)
    assert tuned.before == pytest.approx(error(block, calls[3:]), rel=slack)
    for name, result in tuned.linears.items():
        block.inner[name.partition(".")[2]] = TwinLinear.from_quantized(result)
        old, new = linears[name].tensors, result.tensors
        assert torch.equal(old["residual.weight_scale"], new["residual.weight_scale"])
        assert not torch.equal(old["down.weight_scale"], new["down.weight_scale"])
        assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    block.norm.weight.data.copy_(tuned.vectors["norm.weight"])
    assert tuned.after == pytest.approx(error(block, calls[3:]), rel=slack)
    assert tuned.after < 0.97 * tuned.before


def test_same_seed_same_bytes():
    block, linears, calls = case("twin-w4a4")
    runs = [
        tune_block(block, in_sites(linears), ["norm.weight"], calls[:3], calls[3:], 5, torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(runs[0].vectors["norm.weight"], runs[1].vectors["norm.weight"])
    for name in linears:
        first, second = (run.linears[name].tensors for run in runs)
        assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("scheme", ["twin-w4a8", "twin-w4a4"])
def test_what_a_site_computes_of_its_input_stays_shared(scheme):
    model = tiny("Qwen3")
    tqcompile.compile(model, tokens(), scheme=scheme, **{**SETTINGS, "tune": 12})
    assert any(record.kept for record in tqcompile.report(model).blocks)
    for block in model.model.layers:
        for site in (
            [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
            [block.mlp.gate_proj, block.mlp.up_proj],
        ):
            assert len({layer.spec.act_ratio for layer in site}) == 1
            for layer in site[1:]:
                assert torch.equal(layer.down.weight_packed, site[0].down.weight_packed)
                assert torch.equal(layer.down.weight_scale, site[0].down.weight_scale)


def test_codes_are_tuned_straight_through_their_rounding(monkeypatch):
    monkeypatch.setattr(block_tuning, "LR_CODES", 0.3)
    block, linears, calls = case("twin-w4a16")
    tuned = tune_block(block, in_sites(linears), [], calls[:3], calls[3:], 20, torch.Generator().manual_seed(1))
    assert not tuned.vectors
    for name, result in tuned.linears.items():
        for part in ("residual", "down", "up"):
            changed = result.tensors[f"{part}.weight_packed"] != linears[name].tensors[f"{part}.weight_packed"]
            assert changed.any()


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2"])
def test_compile_tunes_blocks_and_reports_it(name):
    model = as_bfloat16(tiny(name)) if name == "Qwen2" else tiny(name)
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "norm" in n}
    tqcompile.compile(model, tokens(), scheme="twin-w4a8", **{**SETTINGS, "tune": 4})
    report = tqcompile.report(model)
    assert [b.name for b in report.blocks] == ["model.layers.0", "model.layers.1"]
    for record in report.blocks:
        assert 0 < record.before < 1
        assert record.kept == (record.after < record.before)
        assert f"tuned {record.name}: held-out error" in str(report)
    assert {n: p.dtype for n, p in model.named_parameters() if "norm" in n} == dtypes
    assert type(report).from_dict(report.to_dict()) == report
    assert torch.isfinite(logits(model)).all()


def test_a_block_that_got_worse_is_left_as_it_was(monkeypatch):
    plain, tuned = tiny("Qwen3"), tiny("Qwen3")
    tqcompile.compile(plain, tokens(), scheme="twin-w4a8", **SETTINGS)
    for rate in ("LR_CODES", "LR_SCALE", "LR_VECTOR"):
        monkeypatch.setattr(block_tuning, rate, 3.0)
    tqcompile.compile(tuned, tokens(), scheme="twin-w4a8", **{**SETTINGS, "tune": 2})
    assert not any(record.kept for record in tqcompile.report(tuned).blocks)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, tuned.state_dict()[key]), key


def test_a_failure_while_tuning_puts_everything_back(monkeypatch):
    model = tiny("Qwen3")
    before, calls = snapshot(model), []
    real = block_tuning.tune_block

    def fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("tqcompile.quantize_unit.tune_block", fails)
    with pytest.raises(KeyboardInterrupt):
        tqcompile.compile(model, tokens(), scheme="twin-w4a8", **{**SETTINGS, "tune": 3})
    assert_unchanged(model, before)


def test_attaching_a_recipe_leaves_norms_alone():
    model = tiny("Qwen3")
    before = snapshot(model)
    settings = {name: value for name, value in SETTINGS.items() if name != "backend"}
    report = tqcompile.attach_recipe(model, tokens(), scheme="twin-w4a8", **{**settings, "tune": 3})
    assert len(report.blocks) == 2
    assert_unchanged(model, before)
