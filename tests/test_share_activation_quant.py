import operator

import pytest
import torch
from capture_graphs import calls, capture, only
from random_components import random_components
from torch import nn

from tqcompile import ops
from tqcompile.modules import TwinLinear
from tqcompile.passes.base import run_passes
from tqcompile.passes.share_activation_quant import ShareActivationQuant

QUANTIZE = torch.ops.tqcompile.quantize_activation.default


class Siblings(nn.Module):
    """Layers that read one x; each has its own copy of the transform."""

    def __init__(self, *components, between=None):
        super().__init__()
        self.layers = nn.ModuleList(TwinLinear.from_quantized(c) for c in components)
        self.between = between

    def forward(self, x):
        results = []
        for layer in self.layers:
            results.append(layer(x))
            if self.between is not None:
                self.between(x)
        return torch.cat(results, -1)


def set_item(x):
    x[..., 0] = 3.0


def siblings(count=3, between=None):
    components = [random_components(n=8 + i, seed=i) for i in range(count)]
    for c in components[1:]:
        for key in ("transform.input_scale", "transform.rotation"):
            c.tensors[key] = components[0].tensors[key].clone()
    return Siblings(*components, between=between)


def shared(module, x, *, values=True):
    """(graph after the pass, result, quantizations left)"""
    gm, inputs = capture(module, x.clone(), spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    tensors = dict(zip(names, inputs, strict=True)) if values else {}
    run_passes(gm, [ShareActivationQuant(tensors)])
    fresh = [x.clone() if name.startswith("l_x") else value for name, value in zip(names, inputs, strict=True)]
    return gm, only(gm(*fresh)), len(calls(gm, QUANTIZE))


def test_equal_copies_are_one_quantization():
    module, x = siblings(), torch.randn(2, 7, 64)
    gm, result, left = shared(module, x)
    assert left == 1
    assert torch.equal(result, module(x))
    assert len(calls(gm, operator.getitem)) == 2
    assert not run_passes(gm, [ShareActivationQuant()])["share_activation_quant"]


@pytest.mark.parametrize("key", ["transform.input_scale", "transform.rotation"])
def test_a_different_transform_keeps_its_own(key):
    module, x = siblings(), torch.randn(7, 64)
    tensor = module.get_buffer(f"layers.1.{key}")
    tensor[-1] += 0.5
    _, result, left = shared(module, x)
    assert left == 2
    assert torch.equal(result, module(x))


def test_absent_and_present_differ():
    plain = [random_components(n=8 + i, seed=i, scaled=False, block=0) for i in range(2)]
    module = Siblings(*plain, random_components(seed=5, block=0), random_components(seed=6, scaled=False))
    assert shared(module, torch.randn(3, 64))[2] == 3


def test_values_that_nobody_gave_are_not_compared():
    assert shared(siblings(), torch.randn(3, 64), values=False)[2] == 3


def test_fake_tensors_equal_nothing():
    gm, inputs = capture(siblings(), torch.randn(3, 64), spelling="dynamo")
    nodes = gm.graph.find_nodes(op="placeholder")
    run_passes(gm, [ShareActivationQuant({node.name: node.meta["example_value"] for node in nodes})])
    assert len(calls(gm, QUANTIZE)) == 3
    run_passes(gm, [ShareActivationQuant({n.name: t.to("meta") for n, t in zip(nodes, inputs, strict=True)})])
    assert len(calls(gm, QUANTIZE)) == 3


def test_attributes_of_the_graph_are_compared():
    gm, (x,) = capture(siblings(), torch.randn(3, 64), spelling="export")
    before = gm(x)
    assert len(calls(gm, QUANTIZE)) == 3
    run_passes(gm, [ShareActivationQuant()])
    assert len(calls(gm, QUANTIZE)) == 1
    assert torch.equal(gm(x), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(1.5),
        lambda x: x.view(-1).add_(1),
        set_item,
        lambda x: operator.imul(x, 2.0),
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: nn.functional.silu(x, True),
        lambda x: torch.neg(x, out=x),
        torch.relu_,
    ],
)
def test_a_write_between_keeps_them_apart(write):
    module, x = siblings(between=write), torch.randn(3, 64)
    _, result, left = shared(module, x)
    assert left == 3
    assert torch.equal(result, module(x.clone()))


def test_different_inputs_keep_their_own():
    class Two(nn.Module):
        def forward(self, x):
            return ops.quantize_activation(x)[0] + ops.quantize_activation(x + 1)[0] + ops.quantize_activation(x)[0]

    gm, _ = capture(Two(), torch.randn(3, 64), spelling="dynamo")
    run_passes(gm, [ShareActivationQuant()])
    assert len(calls(gm, QUANTIZE)) == 2
