"""analyze(): sites, skips with reasons, absorbers that are used or not, and the way without a graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tqcompile.config import Config
from tqcompile.errors import ConfigError
from tqcompile.passes.analyze import analyze
from tqcompile.passes.plan import Absorber, Plan, ResidualStream, Site, StreamNorm

TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
VECTORS = {"x": torch.randn(2, 32)}
SMALL = Config(group_size=32, rank=8)


def qwen(tied=False):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=64,
            tie_word_embeddings=tied,
        )
    )


class Net(nn.Module):
    def __init__(self, body=lambda m, x: m.b(m.norm(m.a(x))), **modules):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def site_of(plan, name):
    return next(site for site in plan.sites if name in site.linears)


def test_the_whole_plan_of_a_decoder():
    layer = "model.layers.0"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    assert analyze(qwen(), TOKENS, SMALL) == Plan(
        (
            Site(tuple(f"{attention}.{x}_proj" for x in "qkv"), Absorber("norm", f"{layer}.input_layernorm")),
            Site((f"{attention}.o_proj",), Absorber("attn_v", f"{attention}.v_proj", 2, 16)),
            Site((f"{mlp}.gate_proj", f"{mlp}.up_proj"), Absorber("norm", f"{layer}.post_attention_layernorm")),
            Site((f"{mlp}.down_proj",), Absorber("linear", f"{mlp}.up_proj")),
        ),
        {"lm_head": "ignored by 'lm_head'"},
        stream=ResidualStream(
            64,
            ("model.embed_tokens",),
            (
                StreamNorm(f"{layer}.input_layernorm", tuple(f"{attention}.{x}_proj" for x in "qkv")),
                StreamNorm(f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
                StreamNorm("model.norm", ("lm_head",)),
            ),
            (f"{attention}.o_proj", f"{mlp}.down_proj"),
        ),
    )


def test_ignored_linears_take_absorbers_with_them():
    plan = analyze(qwen(), TOKENS, SMALL.replace(ignore=("lm_head", "q_proj", "re:.*up_proj")))
    assert plan.skipped["model.layers.0.self_attn.q_proj"] == "ignored by 'q_proj'"
    assert plan.skipped["model.layers.0.mlp.up_proj"] == "ignored by 're:.*up_proj'"
    rest = site_of(plan, "model.layers.0.self_attn.k_proj")
    assert rest.linears == ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
    assert rest.absorber is None
    assert "q_proj reads the same input and is not quantized" in rest.reason
    down = site_of(plan, "model.layers.0.mlp.down_proj")
    assert down.absorber is None
    assert "up_proj could absorb but is not quantized (ignored by 're:.*up_proj')" in down.reason
    assert site_of(plan, "model.layers.0.self_attn.o_proj").absorber is not None


def test_ignored_value_projection_and_norm():
    plan = analyze(qwen(), TOKENS, SMALL.replace(ignore=("v_proj", "post_attention_layernorm", "lm_head")))
    assert "v_proj could absorb but is not quantized" in site_of(plan, "model.layers.0.self_attn.o_proj").reason
    gate = site_of(plan, "model.layers.0.mlp.gate_proj")
    assert gate.absorber is None
    assert gate.reason.endswith("post_attention_layernorm is ignored by 'post_attention_layernorm'")


@pytest.mark.parametrize("pattern", ["model.layers.0.self_atn", "re:.*q_prj"])
def test_a_pattern_that_matches_nothing(pattern):
    with pytest.raises(ConfigError) as caught:
        analyze(qwen(), TOKENS, SMALL.replace(ignore=(pattern,)))
    assert repr(pattern) in str(caught.value)
    close = {"model.layers.0.self_atn": "model.layers.0.self_attn", "re:.*q_prj": "q_proj"}[pattern]
    assert close in str(caught.value)


def test_the_default_pattern_may_match_nothing():
    assert analyze(Net(), VECTORS, SMALL).skipped == {}


def test_tied_weights():
    plan = analyze(qwen(tied=True), TOKENS, SMALL.replace(ignore=()))
    assert plan.skipped == {"lm_head": "its weight is tied to model.embed_tokens.weight"}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_tied_norm_does_not_absorb(norm):
    net = Net(norm=norm(32), twin=norm(32))
    assert site_of(analyze(net, VECTORS, SMALL), "b").absorber == Absorber("norm", "norm")
    net.twin.weight = net.norm.weight
    site = site_of(analyze(net, VECTORS, SMALL), "b")
    assert site.absorber is None
    assert "twin" in site.reason


class Odd(nn.Linear):
    pass


def plain(n=32, k=32):
    return nn.Linear(k, n)


def call(m, x):
    return m.odd(x)


SKIPS = [
    (plain(k=48), lambda m, x: m.odd(F.pad(x, (0, 16))), "in_features 48 is not divisible by group_size 32"),
    (plain(n=31), call, None),
    (plain(n=6), call, "rank 8 is not below min(out_features 6, in_features 32)"),
    (plain(n=8), call, "rank 8 is not below"),
    (Odd(32, 32), call, "test_analyze.Odd is not exactly torch.nn.Linear"),
    (nn.utils.parametrizations.weight_norm(plain()), call, "ParametrizedLinear is not exactly"),
    (plain(), lambda m, x: x, "not reached by the example input"),
    (plain(), lambda m, x: F.linear(x, m.odd.weight), "not reached by the example input"),
    (plain(), lambda m, x: m.odd(m.odd(x)), "called on 2 different inputs (module reuse)"),
    (plain(), lambda m, x: m.odd(x) + m.odd.weight.sum(), "its weight is also read by node sum"),
    (plain(), lambda m, x: m.odd(x) + m.odd(x), None),
]


@pytest.mark.parametrize(("module", "body", "reason"), SKIPS)
def test_skipped_with_a_reason(module, body, reason):
    plan = analyze(Net(lambda m, x: m.b(m.a(x)) + body(m, x).sum(), odd=module), VECTORS, SMALL)
    assert plan.notes == () or "made by no named module" in plan.notes[0]
    names = [name for site in plan.sites for name in site.linears]
    assert {"a", "b"} <= set(names)
    if reason is None:
        assert plan.skipped == {}
        assert names.count("odd") == 1
    else:
        assert reason in plan.skipped["odd"]
        assert "odd" not in names


def test_rank_limits_only_methods_that_have_one():
    net = Net(lambda m, x: m.b(m.a(x)), b=plain(n=8))
    assert "b" in analyze(net, VECTORS, SMALL.replace(scheme="svdquant-w4a8")).skipped
    assert analyze(net, VECTORS, SMALL.replace(scheme="gptq-w4a16")).skipped == {}


def test_one_module_under_two_names():
    shared = nn.Linear(32, 32)
    plan = analyze(Net(lambda m, x: m.b(m.c(m.a(x))), b=shared, c=shared), VECTORS, SMALL)
    assert plan.skipped == {"b": "its weight is tied to c.weight", "c": "its weight is tied to b.weight"}


def test_linears_of_no_module_are_noted():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32))

        def forward(self, x):
            return F.linear(x, self.weight)

    plan = analyze(
        Net(lambda m, x: (m.router(m.norm(m.a(x))), F.linear(x, m.b.weight)), router=Router()), VECTORS, SMALL
    )
    assert plan.skipped["router"] == "a linear computed by Router, not by a torch.nn.Linear"
    assert "made by no named module: linear_2" in plan.notes[0]


def test_fused_experts():
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
    )
    plan = analyze(MixtralForCausalLM(config), TOKENS, SMALL.replace(ignore=("lm_head", "down_proj")))
    experts = "model.layers.0.mlp.experts"
    assert "fused expert parameter of shape (4, 192, 64): quantization" in plan.skipped[f"{experts}.gate_up_proj"]
    assert plan.skipped[f"{experts}.down_proj"] == "ignored by 'down_proj'"
    assert "MixtralTopKRouter" in plan.skipped["model.layers.0.mlp.gate"]
    assert [len(site.linears) for site in plan.sites] == [3, 1]


def test_conv_and_position_parameters_are_no_experts():
    class Vision(Net):
        def __init__(self):
            super().__init__(lambda m, x: m.b(m.a(x)) + m.position[0, 0], conv=nn.Conv1d(4, 4, 3))
            self.position = nn.Parameter(torch.zeros(1, 8, 32))

    assert analyze(Vision(), VECTORS, SMALL).skipped == {}


def test_conv1d():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4))
    plan = analyze(model, TOKENS, SMALL)
    assert plan.sites == ()
    assert sorted(name.removeprefix("transformer.h.0.") for name in plan.skipped) == [
        "attn.c_attn",
        "attn.c_proj",
        "lm_head",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    assert "Conv1D stores its weight transposed" in plan.skipped["transformer.h.0.mlp.c_fc"]


def test_without_a_graph_every_linear_is_its_own_site():
    def branch(m, x):
        return m.b(m.a(x)) if x.sum() > 0 else m.odd(x)

    plan = analyze(Net(branch, odd=nn.Linear(48, 32), lm_head=nn.Linear(32, 32)), VECTORS, SMALL)
    assert plan.sites == (Site(("a",), None, "no graph"), Site(("b",), None, "no graph"))
    assert plan.skipped["odd"] == "in_features 48 is not divisible by group_size 32"
    assert plan.skipped["lm_head"] == "ignored by 'lm_head'"
    assert len(plan.skipped) == 2
    (note,) = plan.notes
    assert note.startswith("Net does not export: ")
    assert "data-dependent" in note
    assert note.endswith("every linear is its own site and no scale is absorbed")
    assert (plan.stream, plan.stream_reason) == (None, "no graph")


def test_transformer_encoder_layer_is_not_hidden_by_its_fast_path():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    plan = analyze(Net(lambda m, x: m.layer(x[None]), layer=layer).eval(), VECTORS, SMALL)
    assert site_of(plan, "layer.linear1").absorber == Absorber("norm", "layer.norm2")
    assert "relu" in site_of(plan, "layer.linear2").reason
    assert "MultiheadAttention" in plan.skipped["layer.self_attn"]
