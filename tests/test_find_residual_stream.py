"""FindResidualStream: which models have a residual stream that a rotation may turn, and why others have none.

That a found stream can be turned is proven in test_rotate_residual_stream.py, by turning it.
"""

import re

import pytest
import torch
import transformers
from tiny_models import in_float64, tiny, tokens
from torch import nn
from torch.nn import functional as F

from tqcompile.config import Config
from tqcompile.errors import PassError
from tqcompile.passes.analyze import analyze
from tqcompile.passes.base import run_passes
from tqcompile.passes.capture import capture
from tqcompile.passes.find_residual_stream import FindResidualStream
from tqcompile.passes.plan import ResidualStream, StreamNorm

IDS = {"input_ids": tokens(2, 6)}


def found(model, example=IDS):
    gm = capture(model, example)
    assert not any(run_passes(gm, [FindResidualStream()]).values())
    return gm.meta["find_residual_stream"]


def decoder_stream(layers=2, tied_head=""):
    norms, producers = [], []
    for i in range(layers):
        layer = f"model.layers.{i}"
        qkv = tuple(f"{layer}.self_attn.{x}_proj" for x in "qkv")
        norms.append(StreamNorm(f"{layer}.input_layernorm", qkv))
        mlp = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        norms.append(StreamNorm(f"{layer}.post_attention_layernorm", mlp))
        producers += [f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"]
    norms.append(StreamNorm("model.norm", ("lm_head",)))
    return ResidualStream(128, ("model.embed_tokens",), tuple(norms), tuple(producers), tied_head)


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen2", "Mistral", "Granite"])
def test_decoders(name):
    # Granite multiplies the embedding and every write by a number: that commutes.
    assert found(tiny(name)) == decoder_stream()


def test_a_tied_head_is_found():
    assert found(tiny("Qwen3", tie_word_embeddings=True)) == decoder_stream(tied_head="lm_head")


def test_fused_and_written_out_norms_are_the_same():
    model = tiny("Qwen3")
    assert any("pow" in node.name for node in capture(model, IDS).graph.nodes)
    fused = in_float64(model)
    assert not any("pow" in node.name for node in capture(fused, IDS).graph.nodes)
    assert found(fused) == decoder_stream()


def test_analyze_puts_it_into_the_plan():
    plan = analyze(tiny("Qwen3"), IDS, Config(group_size=64, rank=16))
    assert plan.stream == decoder_stream()
    assert plan.stream_reason == ""
    assert plan.stream.consumers[-3:] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "lm_head")
    plan = analyze(tiny("Bert"), IDS, Config(group_size=64, rank=16))
    assert plan.stream is None
    assert "subtracts the mean" in plan.stream_reason


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4))


def t5():
    sizes = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=True))


REFUSED_MODELS = {
    "bert": (lambda: tiny("Bert"), "layer_norm in bert.embeddings.LayerNorm .* subtracts the mean"),
    "gpt2": (gpt2, "layer_norm in transformer.h.0.ln_1 .* subtracts the mean"),
    "gemma": (lambda: tiny("Gemma"), "mul in model.embed_tokens .* reads the residual stream"),
    "olmo": (lambda: tiny("Olmo"), "subtracts the mean"),
    "olmo2": (lambda: tiny("Olmo2"), "q_proj reads the residual stream, and is neither"),
    "mixtral": (lambda: tiny("Mixtral"), "post_attention_layernorm feeds .* no linear"),
    "headless": (lambda: tiny("Llama").model, "norm feeds the model's output, which is no linear"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_refused_models(name):
    make, reason = REFUSED_MODELS[name]
    assert_refused(found(make().eval()), reason)


def test_an_encoder_and_a_decoder():
    example = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 5)}
    # T5's decoder output is multiplied by a number before the tied head: a consumer that is no linear.
    assert_refused(found(t5().eval(), example), "decoder.final_layer_norm feeds mul")


def assert_refused(result, reason):
    assert isinstance(result, str), result
    assert re.search(reason, result), result


def rms(x, weight=None, eps=1e-6):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else weight * y


class Net(nn.Module):
    """The modules that the small forwards below use; a parameter that a forward does not reach is a refusal."""

    def __init__(self, forward):
        super().__init__()
        self.table, self.places = nn.Embedding(97, 32), nn.Embedding(8, 32)
        self.first, self.last, self.plain = nn.RMSNorm(32), nn.RMSNorm(32), nn.RMSNorm(32, elementwise_affine=False)
        self.a, self.b, self.up = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 48)
        self.down, self.head, self.thin = nn.Linear(48, 32), nn.Linear(32, 97), nn.Linear(32, 1)
        self.gain = nn.Parameter(torch.rand(32) + 0.5)
        self.body = forward
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def forward(self, input_ids):
        return self.body(self, self.table(input_ids))


def only(*names):
    """A Net whose other parameters are gone."""

    def make(forward):
        net = Net(forward)
        for name in ("places", "first", "last", "a", "b", "up", "down", "head", "thin", "gain"):
            if name not in names:
                delattr(net, name)
        return net

    return make


def mlp(m, x):
    return x + m.down(F.relu(m.up(m.first(x))))


ACCEPTED = {
    "one block": (
        ("first", "up", "down", "last", "head"),
        lambda m, x: m.head(m.last(mlp(m, x))),
        ResidualStream(32, ("table",), (StreamNorm("first", ("up",)), StreamNorm("last", ("head",))), ("down",)),
    ),
    "written first": (
        ("first", "up", "down", "last", "head"),
        lambda m, x: m.head(m.last(m.down(F.relu(m.up(m.first(x)))) + x)),
        ResidualStream(32, ("table",), (StreamNorm("first", ("up",)), StreamNorm("last", ("head",))), ("down",)),
    ),
    "learned positions": (
        ("places", "last", "head"),
        lambda m, x: m.head(m.last(x + m.places(torch.arange(x.shape[1])))),
        ResidualStream(32, ("table", "places"), (StreamNorm("last", ("head",)),), ()),
    ),
    "arguments by name": (
        ("first", "a", "last", "head"),
        lambda m, x: m.head(m.last(torch.add(input=m.a(m.first(x)), other=x))),
        ResidualStream(32, ("table",), (StreamNorm("first", ("a",)), StreamNorm("last", ("head",))), ("a",)),
    ),
    "no gain": (
        ("up",),
        lambda m, x: m.up(m.plain(x)),
        ResidualStream(32, ("table",), (StreamNorm("", ("up",)),), ()),
    ),
    "a norm written out, without gain": (
        ("up",),
        lambda m, x: m.up(rms(x)),
        ResidualStream(32, ("table",), (StreamNorm("", ("up",)),), ()),
    ),
    "parallel branches": (
        ("first", "a", "up", "down", "last", "head"),
        lambda m, x: m.head(m.last(x + (m.a(h := m.first(x)) + m.down(F.relu(m.up(h)))))),
        ResidualStream(
            32, ("table",), (StreamNorm("first", ("a", "up")), StreamNorm("last", ("head",))), ("a", "down")
        ),
    ),
    "the last token only": (
        ("last", "head"),
        lambda m, x: m.head(m.last(x[:, -1])),
        ResidualStream(32, ("table",), (StreamNorm("last", ("head",)),), ()),
    ),
    "numbers": (
        ("first", "a", "last", "head"),
        lambda m, x: m.head(m.last((y := x * 3.0) + m.a(m.first(y)) / 2.0)),
        ResidualStream(32, ("table",), (StreamNorm("first", ("a",)), StreamNorm("last", ("head",))), ("a",)),
    ),
    "twice the stream": (
        ("last", "head"),
        lambda m, x: m.head(m.last(x + x)),
        ResidualStream(32, ("table",), (StreamNorm("last", ("head",)),), ()),
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case):
    names, forward, stream = ACCEPTED[case]
    assert found(only(*names)(forward)) == stream


BLOCK = ("first", "up", "down", "last", "head")
REFUSED = {
    "layer norm": (("head",), lambda m, x: m.head(F.layer_norm(x, (32,))), "it subtracts the mean"),
    "another reader": (BLOCK, lambda m, x: (m.head(m.last(y := mlp(m, x))), y.relu()), "relu .* reads the residual"),
    "the stream is an output": (BLOCK, lambda m, x: (m.head(m.last(y := mlp(m, x))), y), "the model's output reads"),
    "a linear without a norm": (BLOCK, lambda m, x: m.head(mlp(m, x)) + m.last.weight.sum(), "head reads the residual"),
    "the norm is an output": (
        BLOCK,
        lambda m, x: (m.head(h := m.last(mlp(m, x))), h),
        "last feeds the model's output, which is no linear",
    ),
    "the norm is written back": (
        BLOCK,
        lambda m, x: m.head(m.last(x + (h := m.first(x)) + m.down(F.relu(m.up(h))))),
        "what an RMSNorm made",
    ),
    "written by something else": (
        BLOCK,
        lambda m, x: m.head(m.last(x + F.relu(m.down(F.relu(m.up(m.first(x))))))),
        "also written by relu .*, which is neither a linear nor an embedding",
    ),
    "a post-norm": (
        ("first", "a", "last", "head"),
        lambda m, x: m.head(m.last(x + rms(m.a(m.first(x))))),
        "also written by mul",
    ),
    "a number is added": (("last", "head"), lambda m, x: m.head(m.last(x + 1.0)), "adds one number"),
    "a parameter is added": (("last", "head", "gain"), lambda m, x: m.head(m.last(x + m.gain)), "written by gain"),
    "a multiple is added": (
        ("first", "a", "last", "head"),
        lambda m, x: m.head(m.last(torch.add(x, m.a(m.first(x)), alpha=2))),
        "adds a multiple",
    ),
    "scaled channels": (("last", "head", "gain"), lambda m, x: m.head(m.last(x * m.gain)), "mul .* reads the residual"),
    "a gain of 1 + weight": (
        ("head", "gain"),
        lambda m, x: m.head(rms(x) * (1 + m.gain)),
        "mul .* multiplies the normalised stream by something that is not the plain gain",
    ),
    "a gain that is no module's": (("head", "gain"), lambda m, x: m.head(rms(x, m.gain)), "uses gain, which is not"),
    "a mean over tokens": (
        ("head",),
        lambda m, x: m.head(x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
        "mean .* reads the residual",
    ),
    "a mean over everything": (
        ("head",),
        lambda m, x: m.head(x * torch.rsqrt(torch.mean(x.pow(2), None, True) + 1e-6)),
        "mean .* reads the residual",
    ),
    "a column is added": (
        ("first", "last", "head", "thin"),
        lambda m, x: m.head(m.last(x + m.thin(m.first(x)))),
        "adds one number to all channels",
    ),
    "a cube": (
        ("head",),
        lambda m, x: m.head(x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)),
        "pow .* reads the residual",
    ),
    "another value's norm": (
        ("last", "head"),
        lambda m, x: m.head(m.last(x)) + m.head(x * torch.rsqrt((x + x).pow(2).mean(-1, keepdim=True) + 1e-6)),
        "mul .* reads the residual",
    ),
    "the square is read twice": (
        ("head",),
        lambda m, x: m.head(x * torch.rsqrt((s := x.pow(2)).mean(-1, keepdim=True) + 1e-6)) + s.sum(),
        "sum .* reads the residual",
    ),
    "channels reordered": (
        ("last", "head"),
        lambda m, x: m.head(m.last(x.unflatten(-1, (4, 8)).transpose(2, 3).flatten(2))),
        "moves channels",
    ),
    "half of the channels": (("down",), lambda m, x: m.down(F.pad(m.plain(x)[..., :16], (0, 32))), "moves channels"),
    "a producer has another reader": (
        BLOCK,
        lambda m, x: (m.head(m.last(x + (y := m.down(F.relu(m.up(m.first(x))))))), y),
        "down writes the residual stream and also feeds the model's output",
    ),
    "a gain is read elsewhere": (
        BLOCK,
        lambda m, x: m.head(m.last(mlp(m, x))) + m.last.weight.sum(),
        "last.weight is also read by sum",
    ),
    "a weight is read elsewhere": (
        BLOCK,
        lambda m, x: m.head(m.last(mlp(m, x))) + m.up.weight.sum(),
        "up.weight is also read by sum",
    ),
    "a norm is used twice": (
        BLOCK,
        lambda m, x: m.head(m.first(mlp(m, x))) + m.last.weight.sum(),
        "first.weight is used 2 times",
    ),
    "a linear is used twice": (
        ("first", "a", "last", "head"),
        lambda m, x: m.head(m.last((y := x + m.a(m.first(x))) + m.a(m.first(y)))),
        "(a|first).weight is used 2 times",
    ),
    "a table is also a factor": (
        ("last", "head"),
        lambda m, x: m.head(m.last(x)) + m.table.weight.sum(),
        "table.weight is also read by sum",
    ),
    "an unreached module": (
        (*BLOCK, "a"),
        lambda m, x: m.head(m.last(mlp(m, x))),
        "the example input does not reach a.weight",
    ),
    "no norm": ((), lambda m, x: torch.zeros(3), "no linear reads the residual stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    names, forward, reason = REFUSED[case]
    assert_refused(found(only(*names)(forward)), reason)


def test_no_embedding():
    assert found(nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(2, 8)}) == (
        "no embedding starts a residual stream"
    )


def test_weights_tied_between_linears():
    net = only("first", "a", "b", "last", "head")(lambda m, x: m.head(m.last(x + m.b(m.a(m.first(x))))))
    net.b.weight = net.a.weight
    assert_refused(found(net), r"a.weight is also read by b|(a|b).weight is used 2 times")


def test_needs_what_ran_before():
    gm = capture(nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(2, 8)})
    del gm.meta["tied"]
    with pytest.raises(PassError, match=r"only graphs made by capture\(\)"):
        run_passes(gm, [FindResidualStream()])
