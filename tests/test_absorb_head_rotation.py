"""A rotation of attention heads moves into the value projection and leaves the model's function as it was."""

import pytest
import torch
from tiny_models import assert_unchanged, in_float64, logits, random_orthogonal, snapshot, tiny, tokens
from torch import nn
from torch.nn import functional as F

from tqcompile.config import Config
from tqcompile.errors import ConfigError, PassError
from tqcompile.methods.hadamard import signed_hadamard
from tqcompile.passes.absorb_head_rotation import (
    absorb_head_rotation,
    refuse_head_rotation,
    rotate_output,
    rotate_value,
)
from tqcompile.passes.absorb_scale import producer_channel, producer_scale
from tqcompile.passes.analyze import analyze
from tqcompile.passes.plan import Absorber, Site
from tqcompile.passes.replace_linear import Journal

SMALL = Config(group_size=64, rank=16)
# Biases in Qwen2, Qwen3 with bias (also on o_proj) and BERT; multi-head in the second Llama and BERT.
MODELS = {
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "llama multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama multi-query": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"head_dim": 48}),
    "gemma": ("Gemma", {"head_dim": 48}),
    "bert": ("Bert", {}),
}


def sites_of(model):
    return [s for s in analyze(model, {"input_ids": tokens(2, 6)}, SMALL).sites if not refuse_head_rotation(s)]


def relative(model, before):
    return (logits(model) - before).abs().max() / before.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_function_of_a_whole_model_is_unchanged(name, shared):
    kind, changes = MODELS[name]
    model = tiny(kind, **changes).double()
    sites = sites_of(model)
    assert [s.absorber.kind for s in sites] == ["attn_v", "attn_v"]
    before, journal = logits(model), Journal(model)
    for seed, site in enumerate(sites):
        value = model.get_submodule(site.absorber.module)
        output = model.get_submodule(site.linears[0])
        old = value.weight.clone(), output.weight.clone()
        d = site.absorber.head_dim
        heads = value.weight.shape[0] // d
        assert output.in_features == heads * d * site.absorber.repeat
        rotation = random_orthogonal(*(() if shared else (heads,)), d, seed=seed)
        absorb_head_rotation(model, site, rotation, journal)
        assert (value.weight - old[0]).abs().max() > 0.01
        assert (output.weight - old[1]).abs().max() > 0.01
    assert relative(model, before) < 1e-10


def test_the_output_projection_reads_rotated_heads():
    model = tiny("Qwen2").double()
    (site, _), seen = sites_of(model), []
    d, repeat = site.absorber.head_dim, site.absorber.repeat
    model.get_submodule(site.linears[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    rotation = random_orthogonal(2, d)
    absorb_head_rotation(model, site, rotation, Journal(model))
    logits(model)
    expected = torch.cat([x @ rotation[h // repeat] for h, x in enumerate(seen[0].split(d, -1))], -1)
    assert (seen[-1] - seen[0]).abs().max() > 0.01
    # Rounding of float64 sums only.
    torch.testing.assert_close(seen[1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "bert"])
def test_it_composes_with_a_scale_absorbed_before(name):
    kind, changes = MODELS[name]
    model = tiny(kind, **changes).double()
    before, journal = logits(model), Journal(model)
    for seed, site in enumerate(sites_of(model)):
        value, output = (model.get_submodule(n) for n in (site.absorber.module, site.linears[0]))
        channel = producer_channel(site.absorber, output.in_features)
        generator = torch.Generator().manual_seed(seed)
        scale = (torch.rand(output.in_features, generator=generator, dtype=torch.float64) + 0.5)[channel]
        rows = producer_scale(site.absorber, scale)
        journal.set_parameter(f"{site.absorber.module}.weight", value.weight / rows[:, None])
        if value.bias is not None:
            journal.set_parameter(f"{site.absorber.module}.bias", value.bias / rows)
        journal.set_parameter(f"{site.linears[0]}.weight", output.weight * scale)
        absorb_head_rotation(model, site, random_orthogonal(site.absorber.head_dim, seed=seed), journal)
    assert relative(model, before) < 1e-10


@pytest.mark.parametrize("block", [4, 16, 32])
def test_blocks_within_a_head(block):
    model = tiny("Qwen3").double()
    before = logits(model)
    for site in sites_of(model):
        absorb_head_rotation(model, site, random_orthogonal(64 // block, block), Journal(model))
    assert relative(model, before) < 1e-10


def test_a_bfloat16_hadamard_is_undone_exactly():
    # It is orthogonal only up to a factor; the other side takes its inverse.
    model = tiny("Llama").double()
    before = logits(model)
    for site in sites_of(model):
        absorb_head_rotation(model, site, signed_hadamard("0f1e2d3c"), Journal(model))
    assert relative(model, before) < 1e-10


def test_the_journal_puts_everything_back():
    model = tiny("Qwen2").train()
    before, journal = snapshot(model), Journal(model)
    for site in sites_of(model):
        absorb_head_rotation(model, site, random_orthogonal(32), journal)
    assert not torch.equal(
        model.state_dict()["model.layers.0.self_attn.v_proj.weight"],
        before["state"]["model.layers.0.self_attn.v_proj.weight"],
    )
    journal.restore()
    assert_unchanged(model, before)


class Interleaved(nn.Module):
    """Channel c of head h is row c * heads + h: what a scale absorbs and a rotation of heads does not."""

    def __init__(self, inputs=True, outputs=True):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x):
        def heads(y, interleaved):
            return (
                y.unflatten(-1, (8, 4)).permute(0, 3, 1, 2) if interleaved else y.unflatten(-1, (4, 8)).transpose(1, 2)
            )

        y = F.scaled_dot_product_attention(*(heads(m(x), self.inputs) for m in (self.q, self.k, self.v)))
        return self.o((y.permute(0, 2, 3, 1) if self.outputs else y.transpose(1, 2)).flatten(2))


def test_interleaved_heads_absorb_a_scale_but_no_rotation():
    x = {"x": torch.randn(2, 5, 32)}
    plain = analyze(Interleaved(False, False), x, SMALL.replace(group_size=32)).sites[-1]
    assert plain.absorber == Absorber("attn_v", "v", 1, 8)
    assert refuse_head_rotation(plain) == ""
    net = Interleaved()
    site = analyze(net, x, SMALL.replace(group_size=32)).sites[-1]
    assert site.absorber.module == "v"
    assert "the channels of one head of scaled_dot_product_attention" in refuse_head_rotation(site)
    before = snapshot(net)
    with pytest.raises(PassError, match=r"not neighbours.*on-line"):
        absorb_head_rotation(net, site, torch.eye(8), Journal(net))
    assert_unchanged(net, before)


def test_other_sites_are_refused_with_a_reason():
    qkv, _, gate, down = analyze(tiny("Qwen3"), {"input_ids": tokens(2, 6)}, SMALL).sites[:4]
    assert "input_layernorm is no value projection" in refuse_head_rotation(qkv)
    assert "post_attention_layernorm is no value projection" in refuse_head_rotation(gate)
    assert "up_proj is no value projection" in refuse_head_rotation(down)
    ignored = analyze(tiny("Qwen3"), {"input_ids": tokens(2, 6)}, SMALL.replace(ignore=("v_proj", "lm_head")))
    reason = next(refuse_head_rotation(s) for s in ignored.sites if "o_proj" in s.linears[0])
    assert "v_proj could absorb but is not quantized" in reason
    assert refuse_head_rotation(Site(("a",), None, "no graph")) == "no graph"
    import transformers

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4))
    assert analyze(gpt2, {"input_ids": tokens(2, 6) % 64}, SMALL).sites == ()  # Conv1D: nothing to rotate


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (torch.eye(24), "64 channels cannot be rotated"),
        (torch.eye(64), "a rotation of 64 channels would mix heads"),
        (torch.eye(32).expand(4, 32, 32), "64 channels are 2 blocks of 32, got 4"),
        (torch.zeros(32, 32), "not invertible"),
    ],
)
def test_wrong_rotations_change_nothing(rotation, reason):
    model = tiny("Qwen3")
    site, before = sites_of(model)[0], snapshot(model)
    with pytest.raises(ConfigError, match=reason):
        absorb_head_rotation(model, site, rotation, Journal(model))
    assert_unchanged(model, before)


def test_the_functions_that_take_weights():
    absorber = Absorber("attn_v", "v", 3, 4)
    generator = torch.Generator().manual_seed(0)
    w, bias, out = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(8, 5), (8,), (7, 24)])
    rotation = random_orthogonal(2, 4)
    value, shift = rotate_value(absorber, rotation, w, bias)
    dense = torch.block_diag(*rotation)
    torch.testing.assert_close(value, dense.t() @ w, rtol=0, atol=1e-13)
    torch.testing.assert_close(shift, bias @ dense, rtol=0, atol=1e-13)
    heads = torch.block_diag(*(rotation[h // 3] for h in range(6)))
    torch.testing.assert_close(rotate_output(absorber, rotation, out), out @ heads, rtol=0, atol=1e-13)
    assert rotate_value(absorber, rotation, w, None)[1] is None


def test_float64_norms_change_nothing_but_precision():
    model = tiny("Qwen3")
    before = logits(model)
    torch.testing.assert_close(logits(in_float64(model)).float(), before, rtol=0, atol=1e-3)
