"""FindLinears on both spellings of a linear, and the names of modules."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from tqcompile.passes.base import run_passes
from tqcompile.passes.capture import capture
from tqcompile.passes.find_linears import FindLinears, is_linear, linear_module_name

CONFIG = Qwen3Config(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
)
LAYER = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
EXPECTED = [f"model.layers.{i}.{name}" for i in range(2) for name in LAYER] + ["lm_head"]


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])
        self.by_name = nn.ModuleDict({"head": nn.Linear(8, 4)})
        self.free = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        x = self.first(self.first(x))
        return self.by_name["head"](self.blocks[0](x) + F.linear(x, self.free))


def dynamo_graph(model, *args, **kwargs):
    graphs = []

    def keep(gm, _inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


def found(gm):
    assert run_passes(gm, [FindLinears()]) == {"find_linears": False}
    return gm.meta["find_linears"], gm.meta["unnamed_linears"]


def test_export_spelling():
    torch.manual_seed(0)
    gm = capture(Qwen3ForCausalLM(CONFIG), {"input_ids": torch.zeros(2, 4, dtype=torch.long)})
    names, unnamed = found(gm)
    assert list(names.values()) == EXPECTED
    assert unnamed == []
    nodes = {node.name: node for node in gm.graph.nodes}
    assert all(nodes[name].target is torch.ops.aten.linear.default for name in names)


def test_dynamo_spelling():
    gm = dynamo_graph(Qwen3ForCausalLM(CONFIG).eval(), input_ids=torch.zeros(2, 4, dtype=torch.long))
    names, unnamed = found(gm)
    assert list(names.values()) == EXPECTED
    assert unnamed == []


@pytest.mark.parametrize("spelling", ["export", "dynamo"])
def test_containers_reuse_and_free_functions(spelling):
    x = torch.randn(3, 8)
    gm = capture(Mixed(), {"x": x}) if spelling == "export" else dynamo_graph(Mixed(), x)
    names, unnamed = found(gm)
    assert list(names.values()) == ["first", "first", "blocks.0", "by_name.head"]
    assert len(unnamed) == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("L['self'].model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("L['self']._modules['model']._modules['layers']._modules['0'].mlp", "model.layers.0.mlp"),
        ("L['self'].layers[0].proj", "layers.0.proj"),
        ("G['net'].proj", "proj"),
        ("L['self']", None),
        ("", None),
    ],
)
def test_module_names(path, name):
    node = SimpleNamespace(meta={"nn_module_stack": {"1": ("outer", nn.Module), "2": (path, nn.Linear)}})
    assert linear_module_name(node) == name


def test_no_record_is_no_name():
    gm = torch.fx.symbolic_trace(lambda x, w: F.linear(x, w))
    node = next(node for node in gm.graph.nodes if is_linear(node))
    assert linear_module_name(node) is None
    assert not any(is_linear(node) for node in gm.graph.nodes if node.op != "call_function")
