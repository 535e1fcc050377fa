"""GroupSharedInputs: which linears read one tensor."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tqcompile.errors import PassError
from tqcompile.passes.base import run_passes
from tqcompile.passes.capture import capture
from tqcompile.passes.find_linears import FindLinears
from tqcompile.passes.group_shared_inputs import GroupSharedInputs

DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}


def groups(model, example=None):
    gm = capture(model, example or {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert not any(run_passes(gm, [FindLinears(), GroupSharedInputs()]).values())
    return gm.meta["group_shared_inputs"], gm


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_decoder(kind):
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    found, gm = groups(model(config(**DECODER)))
    expected = []
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        expected += [[f"{attention}.{x}_proj" for x in "qkv"], [f"{attention}.o_proj"]]
        expected += [[f"{mlp}.gate_proj", f"{mlp}.up_proj"], [f"{mlp}.down_proj"]]
    assert list(found.values()) == [*expected, ["lm_head"]]
    assert set(found) <= {node.name for node in gm.graph.nodes}


def test_bert():
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    found, _ = groups(BertModel(config))
    expected = []
    for i in range(2):
        layer = f"encoder.layer.{i}"
        expected += [[f"{layer}.attention.self.{x}" for x in ("query", "key", "value")]]
        expected += [[f"{layer}.attention.output.dense"], [f"{layer}.intermediate.dense"]]
        expected += [[f"{layer}.output.dense"]]
    assert list(found.values()) == [*expected, ["pooler.dense"]]


class Branches(nn.Module):
    """Two linears behind ``before`` applied to one tensor, per branch."""

    def __init__(self, before, dtypes=(torch.float32, torch.float32)):
        super().__init__()
        self.before = before
        self.a, self.b = (nn.Linear(8, 8, dtype=dtype) for dtype in dtypes)

    def forward(self, x):
        x = x.relu()
        return self.a(self.before(x, self.a.weight.dtype)), self.b(self.before(x, self.b.weight.dtype))


@pytest.mark.parametrize(
    "before",
    [
        lambda x, dtype: x.to(dtype),
        lambda x, dtype: nn.functional.dropout(x, 0.5, training=False),
        lambda x, dtype: x.clone().contiguous(),
        lambda x, dtype: x[:, :],
        lambda x, dtype: x.double().to(dtype),
    ],
)
def test_copies_per_branch_do_not_split(before):
    found, _ = groups(Branches(before), {"x": torch.randn(2, 8)})
    assert found == {"relu": ["a", "b"]}


def test_the_same_cast_per_branch_does_not_split():
    model = Branches(lambda x, dtype: x.to(dtype), dtypes=(torch.bfloat16, torch.bfloat16))
    found, _ = groups(model, {"x": torch.randn(2, 8)})
    assert list(found.values()) == [["a", "b"]]


@pytest.mark.parametrize("before", [lambda x, dtype: x * 1.5, lambda x, dtype: x[:, :4].repeat(1, 2)])
def test_computation_per_branch_splits(before):
    found, _ = groups(Branches(before), {"x": torch.randn(2, 8)})
    assert list(found.values()) == [["a"], ["b"]]


def test_another_dtype_splits():
    model = Branches(lambda x, dtype: x.to(dtype), dtypes=(torch.float32, torch.bfloat16))
    found, _ = groups(model, {"x": torch.randn(2, 8)})
    assert list(found.values()) == [["a"], ["b"]]


def test_needs_the_linears():
    gm = capture(nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(2, 8)})
    with pytest.raises(PassError, match="run FindLinears first"):
        run_passes(gm, [GroupSharedInputs()])
