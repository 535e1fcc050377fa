"""capture(): what the graph holds, and that the model is as it was."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tqcompile.errors import PassError
from tqcompile.passes.capture import capture

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        if x.sum() > 0:
            return self.proj(x)
        return x


class Mlp(nn.Module):
    """Depends on the number of rows; has a buffer; takes a non-tensor argument."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x, flip: bool = False):
        x = self.proj(x + self.shift)
        return -x if flip else x


def count(gm, target):
    return sum(node.target is target for node in gm.graph.nodes)


def test_parameters_are_named(llama):
    gm = capture(llama, {"input_ids": torch.zeros(2, 6, dtype=torch.long)})
    names = gm.meta["parameters"]
    placeholders = {node.name for node in gm.graph.nodes if node.op == "placeholder"}
    assert set(names) <= placeholders
    expected = {name for name, _ in llama.named_parameters()} | {"model.rotary_emb.inv_freq"}
    assert expected <= set(names.values())


def test_tied_parameters_are_named():
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, bias=False)})
    net["b"].weight = net["a"].weight
    net.forward = lambda x: net["b"](net["a"](x))
    both = ("a.weight", "b.weight")
    assert capture(net, {"x": torch.randn(2, 8)}).meta["tied"] == {
        "a.weight": both,
        "b.weight": both,
        "a.bias": ("a.bias",),
    }


@pytest.mark.parametrize("shape", [(1, 1), (3, 40)])
def test_one_graph_for_every_example_shape(llama, shape):
    gm = capture(llama, {"input_ids": torch.zeros(shape, dtype=torch.long)})
    hidden = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.embedding.default).meta["val"]
    assert all(isinstance(size, torch.SymInt) for size in hidden.shape[:2])
    assert [size.node.hint for size in hidden.shape[:2]] == [2, min(max(shape[1], 4), 8)]


def test_all_inputs_are_resized_together(llama):
    ids, mask = torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)
    gm = capture(llama, {"input_ids": ids, "attention_mask": mask})
    inputs = {n.name: n.meta["val"] for n in gm.graph.nodes if n.name in ("input_ids", "attention_mask")}
    assert [tuple(s.node.hint for s in v.shape) for v in inputs.values()] == [(2, 8), (2, 8)]


def test_channels_of_float_inputs_are_kept():
    gm = capture(Mlp(), {"x": torch.randn(5, 8), "flip": True})
    value = next(n for n in gm.graph.nodes if n.name == "x").meta["val"]
    assert value.shape[1] == 8
    assert count(gm, torch.ops.aten.neg.default) == 1
    assert "shift" in gm.meta["parameters"].values()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(llama, training):
    llama.train(training)
    llama.model.layers[0].mlp.eval()  # mixed modes come back as well
    llama.set_attn_implementation("eager")
    modes = [module.training for module in llama.modules()]
    before = {name: (id(p), p.clone()) for name, p in llama.state_dict(keep_vars=True).items()}
    gm = capture(llama, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert count(gm, SDPA) == 1
    assert llama.config._attn_implementation == "eager"
    assert [module.training for module in llama.modules()] == modes
    for name, p in llama.state_dict(keep_vars=True).items():
        assert id(p) == before[name][0], name
        assert p.requires_grad == before[name][1].requires_grad, name
        assert torch.equal(p, before[name][1]), name
    assert torch.backends.mha.get_fastpath_enabled()


def test_no_cache_in_the_outputs(llama):
    gm = capture(llama, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert len(gm.graph.output_node().all_input_nodes) == 1


def test_encoder_without_use_cache():
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    gm = capture(BertModel(config), {"input_ids": torch.zeros(1, 5, dtype=torch.long)})
    assert count(gm, SDPA) == 1
    dropouts = [n for n in gm.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert dropouts
    assert not any(n.args[2] for n in dropouts)


def test_static_shapes_where_the_model_needs_them():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(x.reshape(2, 4, 8))

    gm = capture(Fixed(), {"x": torch.randn(2, 4, 8)})
    assert next(n for n in gm.graph.nodes if n.name == "x").meta["val"].shape == (2, 4, 8)


def test_failure_carries_the_reason_and_the_line(capfd):
    model = Branches().train()
    with pytest.raises(PassError, match=r"Branches does not export: .*data-dependent") as caught:
        capture(model, {"x": torch.randn(3, 8)})
    assert "test_capture.py" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training
    assert "def forward" not in capfd.readouterr().err  # torch's dump of the partial graph


def test_failure_on_a_wrong_argument():
    with pytest.raises(PassError, match=r"missing a required argument: 'x'$"):
        capture(Mlp(), {"y": torch.randn(2, 8)})
