import pytest
import torch
from capture_graphs import SPELLINGS, calls, capture, linears, only
from random_components import random_components
from test_decompose_linear import FORMS
from torch import nn

from tqcompile import ops
from tqcompile.errors import PassError
from tqcompile.passes.base import run_passes
from tqcompile.passes.decompose_linear import DecomposeLinear
from tqcompile.passes.fuse_twin_linear import FuseTwinLinear

TWIN = torch.ops.tqcompile.twin_linear.default
QUANTIZE = torch.ops.tqcompile.quantize_activation.default


def decomposed(spelling="dynamo", dtype=torch.float32, **form):
    torch.manual_seed(form.get("seed", 0))
    quantized = random_components(**form)
    spec = quantized.spec
    layer = nn.Linear(spec.in_features, spec.out_features, bias="bias" in quantized.tensors).to(dtype)
    gm, inputs = capture(layer, torch.randn(3, 5, spec.in_features).to(dtype), spelling=spelling)
    run_passes(gm, [DecomposeLinear(lambda node: quantized)])
    return gm, inputs, spec


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_form_fuses_completely_and_bit_for_bit(spelling):
    for seed, form in enumerate(FORMS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        gm, inputs, spec = decomposed(spelling, dtype, n=23, seed=seed, **form)
        before = only(gm(*inputs))
        assert run_passes(gm, [FuseTwinLinear()]) == {"fuse_twin_linear": True}
        assert torch.equal(only(gm(*inputs)), before), form
        (twin,) = calls(gm, TWIN)
        assert len(calls(gm, QUANTIZE)) == (spec.act_bits != 16)
        assert (twin.args[9], twin.args[10]) == (spec.act_ratio, dtype)
        assert len(linears(gm)) == (2 if spec.rank and spec.low_rank_bits == 16 else 0)
        left = {node.meta.get("reference_of") for node in gm.graph.nodes}
        assert left <= {None, "transform", "low_rank"}
        assert not calls(gm, torch.round)
        assert not run_passes(gm, [FuseTwinLinear()])["fuse_twin_linear"]


def test_ops_carry_the_values_that_later_passes_read():
    gm, _, _ = decomposed()
    run_passes(gm, [FuseTwinLinear()])
    (twin,), (quantize,) = calls(gm, TWIN), calls(gm, QUANTIZE)
    assert twin.meta["example_value"].shape == (3, 5, 24)
    q, scale = (node.meta["example_value"] for node in twin.args[:2])
    assert (q.shape, q.dtype) == ((3, 5, 64), torch.int8)
    assert (scale.shape, scale.dtype) == ((3, 5, 1), torch.float32)
    assert len(quantize.meta["example_value"]) == 2


def also_return(gm, node):
    output = gm.graph.output_node()
    output.args = ((*output.args[0], node),) if isinstance(output.args[0], (tuple, list)) else ((output.args[0], node),)
    gm.recompile()


@pytest.mark.parametrize("which", ["rank-R intermediate", "unpacked residual", "sum before the bias"])
def test_a_reader_of_an_inner_value_keeps_the_twin_linear_apart(which):
    gm, inputs, _ = decomposed()
    products = [n for n in calls(gm, torch.matmul) if n.meta["reference_of"] == "twin_linear"]
    inner = {
        "rank-R intermediate": products[2].args[0],
        "unpacked residual": products[0].args[1],
        "sum before the bias": next(iter(products[2].users)),
    }[which]
    also_return(gm, inner)
    before = gm(*inputs)
    run_passes(gm, [FuseTwinLinear()])
    assert not calls(gm, TWIN)
    assert [n for n in calls(gm, torch.matmul) if n.meta["reference_of"] == "twin_linear"] == products
    assert len(calls(gm, QUANTIZE)) == 1
    (reason,) = gm.meta["fuse_twin_linear"].values()
    assert reason == f"inner value {inner.name} is read elsewhere"
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_a_reader_of_the_transformed_activation_keeps_the_quantization_apart():
    gm, inputs, _ = decomposed()
    (rotated,) = [n for n in calls(gm, torch.matmul) if n.meta["reference_of"] == "quantize_activation"]
    also_return(gm, rotated)
    before = gm(*inputs)
    run_passes(gm, [FuseTwinLinear()])
    assert (len(calls(gm, TWIN)), len(calls(gm, QUANTIZE))) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_the_quantized_activation_may_be_read_elsewhere():
    gm, inputs, _ = decomposed()
    (anchor,) = [n for n in gm.graph.nodes if n.target == "to" and n.args[1:] == (torch.int8,)]
    also_return(gm, anchor)
    before = gm(*inputs)
    run_passes(gm, [FuseTwinLinear()])
    assert (len(calls(gm, TWIN)), len(calls(gm, QUANTIZE))) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_fuses_the_references_wherever_they_come_from():
    class ByHand(nn.Module):
        def forward(self, x, w, ws):
            q, s = ops.quantize_activation_reference(x)
            return ops.twin_linear_reference(q, s, w, ws, None, None, None, None, None, 0.5, torch.float32)

    tensors = random_components().tensors
    x = torch.randn(6, 64)
    args = (x, tensors["residual.weight_packed"], tensors["residual.weight_scale"])
    gm = torch.fx.symbolic_trace(ByHand())
    before = gm(*args)
    run_passes(gm, [FuseTwinLinear()])
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][::3] == [QUANTIZE, TWIN]
    assert torch.equal(gm(*args), before)


def test_something_almost_alike_is_left_alone_and_noticed():
    gm, _, _ = decomposed()
    clamp = next(n for n in gm.graph.nodes if n.target == "clamp")
    clamp.args = (clamp.args[0], -128, 127)
    with pytest.raises(PassError, match="left without its op"):
        run_passes(gm, [FuseTwinLinear()])
    assert not calls(gm, QUANTIZE)
