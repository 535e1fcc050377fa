"""FindAbsorbers: which producer can take a scale, proven by taking one and comparing the model's output."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tqcompile.config import Config
from tqcompile.errors import PassError
from tqcompile.passes.analyze import analyze
from tqcompile.passes.base import run_passes
from tqcompile.passes.capture import capture
from tqcompile.passes.find_absorbers import FindAbsorbers
from tqcompile.passes.find_linears import FindLinears
from tqcompile.passes.group_shared_inputs import GroupSharedInputs
from tqcompile.passes.plan import Absorber

MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16}),
}
PASSES = [FindLinears(), GroupSharedInputs(), FindAbsorbers()]
TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}


def make(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "hidden_size": 128}
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, num_hidden_layers=2))
    else:
        config, cls, extra = MODELS[kind]
        model = cls(config(**sizes, **extra, num_hidden_layers=2, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases that are not 1 and 0
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def found(model, example):
    gm = capture(model, example)
    assert not any(run_passes(gm, PASSES).values())
    groups = gm.meta["group_shared_inputs"]
    return {tuple(groups[node]): absorber for node, absorber in gm.meta["find_absorbers"].items()}


def output(model, example):
    with torch.no_grad():
        result = model(**example)
    return result if isinstance(result, torch.Tensor) else result[0]


def assert_absorption_is_exact(model, example, sites):
    """Divide every absorber by a random scale, multiply the columns of its site: the output must not move.

    Uses the plan alone: what an Absorber's fields mean is what this function does with them.
    """
    model = copy.deepcopy(model).double()
    example = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
    expected = output(model, example)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites:
            producer = moved.get_submodule(site.absorber.module)
            scale = torch.rand(producer.weight.shape[0], dtype=torch.float64) + 0.5
            columns = scale
            if site.absorber.kind == "attn_v":
                repeat, head_dim = site.absorber.repeat, site.absorber.head_dim
                j = torch.arange(moved.get_submodule(site.linears[0]).in_features)
                columns = scale[(j // head_dim // repeat) * head_dim + j % head_dim]
            producer.weight /= scale if site.absorber.kind == "norm" else scale[:, None]
            if getattr(producer, "bias", None) is not None:
                producer.bias /= scale
            for name in site.linears:
                moved.get_submodule(name).weight *= columns
    torch.testing.assert_close(output(moved, example), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2"])
def test_decoder(kind):
    absorbers = found(make(kind), TOKENS)
    expected = {}
    for i in range(2):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        expected[tuple(f"{attention}.{x}_proj" for x in "qkv")] = Absorber("norm", f"{layer}.input_layernorm")
        expected[(f"{attention}.o_proj",)] = Absorber("attn_v", f"{attention}.v_proj", 2, 32)
        expected[(f"{mlp}.gate_proj", f"{mlp}.up_proj")] = Absorber("norm", f"{layer}.post_attention_layernorm")
        expected[(f"{mlp}.down_proj",)] = Absorber("linear", f"{mlp}.up_proj")
    assert absorbers == {**expected, ("lm_head",): Absorber("norm", "model.norm")}


def test_bert_norms_feed_the_residual():
    absorbers = found(make("bert"), TOKENS)
    for i in range(2):
        layer = f"encoder.layer.{i}"
        qkv = tuple(f"{layer}.attention.self.{x}" for x in ("query", "key", "value"))
        assert "LayerNorm" in absorbers[qkv]
        assert "also feeds add" in absorbers[qkv]
        assert absorbers[(f"{layer}.attention.output.dense",)] == Absorber("attn_v", qkv[2], 1, 32)
        assert "also feeds add" in absorbers[(f"{layer}.intermediate.dense",)]
        assert "gelu" in absorbers[(f"{layer}.output.dense",)]
    assert "also feeds the model's output" in absorbers[("pooler.dense",)]


def test_gemma_gains_are_not_plain():
    absorbers = found(make("gemma"), TOKENS)
    reason = absorbers[tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")]
    assert "model.layers.1.input_layernorm.weight" in reason
    assert "1 + weight" in reason
    assert absorbers[("model.layers.1.self_attn.o_proj",)] == Absorber(
        "attn_v", "model.layers.1.self_attn.v_proj", 2, 16
    )
    assert absorbers[("model.layers.1.mlp.down_proj",)] == Absorber("linear", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "bert", "gemma"])
def test_absorption_leaves_the_output_unchanged(kind):
    model = make(kind)
    plan = analyze(model, TOKENS, Config(group_size=32, rank=8))
    sites = [site for site in plan.sites if site.absorber]
    assert {site.absorber.kind for site in sites} == {
        "bert": {"attn_v"},
        "gemma": {"attn_v", "linear"},
    }.get(kind, {"norm", "linear", "attn_v"})
    assert_absorption_is_exact(model, TOKENS, sites)


class Net(nn.Module):
    """The modules that the small forwards below use."""

    def __init__(self, forward):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(32), nn.RMSNorm(32)
        self.plain = nn.LayerNorm(32, elementwise_affine=False)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.kv = nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.body = forward
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def forward(self, x):
        return self.body(self, x)


def heads(x, n=4):
    return x.unflatten(-1, (n, 8)).transpose(1, 2)


def attend(m, x, value, **kwargs):
    out = F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), value, **kwargs)
    return out.transpose(1, 2).flatten(2)


ABSORBED = {
    "layer_norm": (lambda m, x: m.a(m.norm(x)), Absorber("norm", "norm")),
    "rms_norm": (lambda m, x: m.a(m.rms(x)), Absorber("norm", "rms")),
    "dropout and cast": (
        lambda m, x: m.a(F.dropout(m.norm(x).to(m.a.weight.dtype), 0.5, False)),
        Absorber("norm", "norm"),
    ),
    "token choice": (lambda m, x: m.a(m.norm(x)[:, 0]), Absorber("norm", "norm")),
    "chain of linears": (lambda m, x: m.a(m.b(x)), Absorber("linear", "b")),
    "gate on the right": (lambda m, x: m.a(m.b(x) * m.c(x).sigmoid()), Absorber("linear", "b")),
    "gelu gate": (lambda m, x: m.a(F.gelu(m.c(x)) * m.b(x)), Absorber("linear", "b")),
    "two linears": (lambda m, x: m.a(m.c(x) * m.b(x)), Absorber("linear", "b")),
    "attention": (
        lambda m, x: m.c(attend(m, x, heads(m.kv(x), 2).repeat_interleave(2, 1))),
        Absorber("attn_v", "kv", 2, 8),
    ),
    "enable_gqa": (
        lambda m, x: m.c(
            F.scaled_dot_product_attention(heads(m.a(x)), heads(x[..., :16], 2), heads(m.kv(x), 2), enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        ),
        Absorber("attn_v", "kv", 2, 8),
    ),
}


@pytest.mark.parametrize("case", ABSORBED)
def test_absorbed(case):
    forward, absorber = ABSORBED[case]
    torch.manual_seed(0)
    model, example = Net(forward), {"x": torch.randn(2, 5, 32)}
    sites = [site for site in analyze(model, example, Config(group_size=32, rank=8, ignore=())).sites if site.absorber]
    assert [site.absorber for site in sites] == [absorber]
    assert_absorption_is_exact(model, example, sites)


def tiled(m, x):
    """Query heads 0, 2 read key/value head 0 and heads 1, 3 head 1: not the order of grouped heads."""
    return m.c(attend(m, x, heads(m.kv(x), 2).unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2)))


def value_twice(m, x):
    value = m.b(x)
    out = F.scaled_dot_product_attention(heads(m.a(x)), heads(value), heads(value))
    return m.c(out.transpose(1, 2).flatten(2))


REFUSED = {
    "residual": (lambda m, x: (h := m.norm(x)) + m.a(h), "norm.* also feeds add"),
    "output": (lambda m, x: (h := m.norm(x), m.a(h)), "also feeds the model's output"),
    "other group": (
        lambda m, x: m.a(h := m.norm(x)) + m.b(h.transpose(1, 2).transpose(1, 2)),
        "also feeds [ab]$",
    ),
    "unnamed linear": (lambda m, x: m.a(h := m.norm(x)) + F.linear(h, m.scale[None]), "also feeds linear"),
    "no gain": (lambda m, x: m.a(m.plain(x)), "has no gain"),
    "foreign gain": (lambda m, x: m.a(m.plain(x) * m.scale), "the gain scale is not the `weight` of a norm"),
    "gain read twice": (lambda m, x: m.a(m.norm(x)) + m.norm.weight, "norm.weight also feeds add"),
    "gelu": (lambda m, x: m.a(F.gelu(m.b(x))), "comes from gelu .*cannot take a scale"),
    "model input": (lambda m, x: m.a(x), "comes from placeholder"),
    "channels reordered": (
        lambda m, x: m.a(m.norm(x).unflatten(-1, (4, 8)).transpose(2, 3).flatten(2)),
        "change place",
    ),
    "square": (lambda m, x: m.a((h := m.b(x)) * h), "b also feeds mul"),
    "square of a copy": (lambda m, x: m.a((h := m.b(x)) * h.clone()), "b also feeds mul"),
    "no linear factor": (
        lambda m, x: m.a(m.b(x).relu() * m.c(x).sigmoid()),
        "neither is the output of a linear",
    ),
    "factor read twice": (lambda m, x: m.a(F.silu(m.c(x)) * (h := m.b(x))) + h, "b also feeds add"),
    "half of a linear": (lambda m, x: m.a(F.silu(x) * m.b(x).repeat(1, 1, 2)[..., ::2]), "neither is"),
    "value through gelu": (
        lambda m, x: m.c(attend(m, x, heads(F.gelu(m.kv(x)), 2).repeat_interleave(2, 1))),
        "gelu",
    ),
    "key is value": (value_twice, "b also feeds scaled_dot_product_attention"),
    "tiled heads": (tiled, "channels change place"),
    "attention kept": (
        lambda m, x: m.c(h := attend(m, x, heads(m.kv(x), 2).repeat_interleave(2, 1))) + h,
        "scaled_dot_product_attention.* also feeds add",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    forward, reason = REFUSED[case]
    absorbers = found(Net(forward), {"x": torch.randn(2, 5, 32)})
    assert not any(isinstance(absorber, Absorber) for absorber in absorbers.values()), absorbers
    assert any(re.search(reason, text) for text in absorbers.values()), absorbers


def test_needs_what_ran_before():
    gm = capture(nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(2, 8)})
    with pytest.raises(PassError, match="run GroupSharedInputs first"):
        run_passes(gm, [FindLinears(), FindAbsorbers()])
    del gm.meta["parameters"]
    with pytest.raises(PassError, match=r"only graphs made by capture\(\)"):
        run_passes(gm, PASSES)
