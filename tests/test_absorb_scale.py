"""Absorbing a scale into a producer leaves the model's function as it was."""

import pytest
import torch
from tiny_models import logits, tiny, tokens
from torch import nn

from tqcompile.config import Config
from tqcompile.passes.absorb_scale import absorb_into_norm, producer_channel, producer_scale
from tqcompile.passes.analyze import analyze
from tqcompile.passes.plan import Absorber
from tqcompile.passes.replace_linear import Journal


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def norm_of(kind, dtype, channels=37):
    norm = kind(channels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=seeded(1)))
    return norm.to(dtype)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_divided_by_the_returned_scale_is_the_old_one(kind, dtype):
    norm, wanted = norm_of(kind, dtype), torch.exp(torch.randn(37, generator=seeded(2)))
    old = {name: parameter.double().clone() for name, parameter in norm.named_parameters()}
    applied = absorb_into_norm(norm, wanted).double()
    # The quotient of two floats is stored in float32; bfloat16 gains make it differ from the wanted scale.
    assert torch.allclose(norm.weight.double() * applied, old["weight"], rtol=2.0**-23, atol=0)
    assert norm.weight.dtype == dtype
    if kind is nn.LayerNorm:
        # fp32 rounds twice; in 16 bits the scale is a power of two and nothing is rounded (no subnormals here).
        exact = 2.0**-22 if dtype == torch.float32 else 0
        assert torch.allclose(norm.bias.double() * applied, old["bias"], rtol=exact, atol=0)
    if kind is nn.LayerNorm and dtype != torch.float32:
        assert torch.equal(applied.log2(), applied.log2().round())
        assert ((applied / wanted).log2().abs() <= 0.5 + 1e-6).all()
    else:
        # Half a unit in the last place of the gain's dtype.
        assert torch.allclose(applied, wanted.double(), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_vanishing_gains_are_left_alone(kind, dtype):
    norm = norm_of(kind, dtype, 8)
    with torch.no_grad():
        norm.weight[2], norm.weight[5] = 0.0, torch.finfo(dtype).tiny
        if kind is nn.LayerNorm:
            norm.bias[2] = 1.5
    before = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    applied = absorb_into_norm(norm, torch.full((8,), 2.0**60))
    assert applied[2] == 1
    assert torch.isfinite(applied).all()
    assert norm.weight[2] == 0
    assert torch.equal(applied[5], torch.tensor(1.0)) == torch.equal(norm.weight[5], before["weight"][5])
    if kind is nn.LayerNorm:
        assert norm.bias[2] == 1.5
    used = [0, 1, 3, 4, 6, 7]
    assert torch.equal(applied[used], torch.full((6,), 2.0**60))


def test_an_overflowing_gain_is_left_alone():
    norm = nn.RMSNorm(4)
    applied = absorb_into_norm(norm, torch.tensor([1.0, 1e-39, 2.0, 0.5]))
    assert torch.isfinite(norm.weight).all()
    assert torch.allclose(norm.weight * applied, torch.ones(4), rtol=2.0**-22, atol=0)


def test_the_norm_computes_the_same_up_to_the_scale():
    norm, x = norm_of(nn.LayerNorm, torch.float32, 33), torch.randn(5, 33, generator=seeded(3))
    before = norm(x).double()
    applied = absorb_into_norm(norm, torch.rand(33, generator=seeded(4)) + 0.3)
    # Two roundings of values whose parts may cancel: relative to the largest.
    assert (norm(x).double() * applied - before).abs().max() <= before.abs().max() * 2.0**-21


@pytest.mark.parametrize(("heads", "repeat", "head_dim"), [(4, 1, 8), (6, 2, 16), (6, 3, 5), (8, 8, 4)])
def test_channels_of_grouped_query_heads(heads, repeat, head_dim):
    absorber = Absorber("attn_v", "v", repeat, head_dim)
    index = producer_channel(absorber, heads * head_dim)
    value = torch.arange(heads // repeat * head_dim).reshape(heads // repeat, head_dim)
    expected = value.repeat_interleave(repeat, 0).flatten()  # what transformers' repeat_kv does
    assert torch.equal(index, expected)
    seen = torch.rand(heads // repeat * head_dim, generator=seeded(5))
    assert torch.equal(producer_scale(absorber, seen[index]), seen)


@pytest.mark.parametrize("kind", ["norm", "linear"])
def test_other_producers_are_channel_for_channel(kind):
    absorber, scale = Absorber(kind, "m"), torch.rand(12, generator=seeded(6))
    assert torch.equal(producer_channel(absorber, 12), torch.arange(12))
    assert torch.equal(producer_scale(absorber, scale), scale)


def absorb_everything(model, powers_of_two):
    """Absorb a random scale at every site of the model that has an absorber; returns their kinds."""
    plan = analyze(model, {"input_ids": tokens(2, 6)}, Config(group_size=64, rank=16))
    kinds = []
    with torch.no_grad():
        for seed, site in enumerate(plan.sites):
            if site.absorber is None:
                continue
            kinds.append(site.absorber.kind)
            linears = [model.get_submodule(name) for name in site.linears]
            channel = producer_channel(site.absorber, linears[0].in_features)
            exponent = torch.randn(int(channel.max()) + 1, generator=seeded(seed), dtype=torch.float64)
            scale = torch.exp2(exponent.round() if powers_of_two else exponent).float()[channel].double()
            producer = model.get_submodule(site.absorber.module)
            if site.absorber.kind == "norm":
                scale = absorb_into_norm(producer, scale.float()).double()
            else:
                rows = producer_scale(site.absorber, scale)
                producer.weight.div_(rows[:, None])
                if producer.bias is not None:
                    producer.bias.div_(rows)
            for linear in linears:
                linear.weight.mul_(scale)
    return kinds


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen2", "Bert"])
@pytest.mark.parametrize("powers_of_two", [True, False])
def test_the_function_of_a_whole_model_is_unchanged(name, powers_of_two):
    model = tiny(name).double()
    before = logits(model)
    kinds = absorb_everything(model, powers_of_two)
    # In BERT only the last norm feeds a linear alone: the pooler.
    assert set(kinds) == ({"norm", "attn_v"} if name == "Bert" else {"norm", "attn_v", "linear"})
    assert len(kinds) >= 2
    # Powers of two divide exactly, so only float64 sums differ (their order does not: nothing at all is rounded
    # anew but the norms' float32 inside). Otherwise each gain is one float32 rounding away: 2**-24, over two layers
    # whose softmax may enlarge it by the size of its logits, here below 100.
    tolerance = 1e-9 if powers_of_two else 2.0**-24 * 4 * 100
    assert (logits(model) - before).abs().max() <= tolerance * before.abs().max()


def test_the_journal_puts_everything_back():
    model = tiny("Qwen3").train()
    model.lm_head.eval()
    norm, linear = model.model.norm, model.model.layers[1].mlp.up_proj
    before = norm.weight.detach().clone()
    journal = Journal(model)
    journal.replace("model.layers.1.mlp.up_proj", nn.Identity())
    journal.replace("model.layers.1.mlp.up_proj", nn.Dropout())
    for _ in range(2):
        journal.remember(norm)
        absorb_into_norm(norm, torch.rand(128, generator=seeded(7)) + 0.5)
    model.eval()
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Dropout)
    assert not torch.equal(norm.weight, before)
    journal.restore()
    assert model.model.layers[1].mlp.up_proj is linear
    assert torch.equal(norm.weight, before)
    assert model.training
    assert not model.lm_head.training
