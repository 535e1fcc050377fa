import pytest
import torch
from capture_graphs import SPELLINGS, capture, linears, only
from random_components import random_components
from torch import nn

from tqcompile.errors import PassError
from tqcompile.modules import TwinLinear
from tqcompile.passes.base import run_passes
from tqcompile.passes.decompose_linear import DecomposeLinear

FORMS = [
    {"act_bits": act, "low_rank_bits": low, "rank": rank, "block": block, "scaled": scaled, "bias": bias}
    for act in (4, 8, 16)
    for low, rank in ((4, 6), (16, 5), (4, 0))
    for block, scaled, bias in ((16, True, torch.float32), (0, False, None))
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_form_equals_the_quantized_module_bit_for_bit(spelling):
    for seed, form in enumerate(FORMS):
        quantized = random_components(n=23, k=64, seed=seed, **form)
        torch.manual_seed(seed)
        layer, x = nn.Linear(64, 23, bias=form["bias"] is not None), torch.randn(3, 5, 64)
        gm, inputs = capture(layer, x, spelling=spelling)
        (node,) = linears(gm)
        assert run_passes(gm, [DecomposeLinear({node.name: quantized})]) == {"decompose_linear": True}
        with torch.no_grad():
            assert torch.equal(only(gm(*inputs)), TwinLinear.from_quantized(quantized)(x)), form
        assert not any("tqcompile" in str(node.target) for node in gm.graph.nodes)
        buffers = {name for name, _ in gm.named_buffers() if name.startswith("tq_")}
        assert len(buffers) == len(quantized.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_the_input(dtype):
    quantized = random_components(bias=dtype)
    x = torch.randn(4, 64).to(dtype)
    gm, inputs = capture(nn.Linear(64, 24).to(dtype), x, spelling="dynamo")
    run_passes(gm, [DecomposeLinear(lambda node: quantized)])
    with torch.no_grad():
        got = only(gm(*inputs))
        assert got.dtype == dtype
        assert torch.equal(got, TwinLinear.from_quantized(quantized)(x))


def test_written_out_in_plain_torch():
    gm, _ = capture(nn.Linear(64, 24), torch.randn(4, 64), spelling="dynamo")
    run_passes(gm, [DecomposeLinear(lambda node: random_components())])
    body = [str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes if n.op.startswith("call")]
    # transform, quantize, then residual, down and up, each unpacked, scaled and multiplied, and the bias.
    assert [name for name in body if name in ("matmul", "round", "amax", "add", "linear")] == [
        "matmul",  # rotation
        "amax",
        "round",
        "matmul",  # residual
        "matmul",  # down
        "matmul",  # up
        "add",
        "add",
    ]


def test_origin_and_value_of_the_linear_are_kept():
    gm, _ = capture(nn.Sequential(nn.ReLU(), nn.Linear(64, 24)), torch.randn(4, 64), spelling="dynamo")
    (node,) = linears(gm)
    value, stack = node.meta["example_value"], node.meta["nn_module_stack"]
    run_passes(gm, [DecomposeLinear(lambda node: random_components())])
    (result,) = gm.graph.output_node().args[0]
    assert result.meta["example_value"] is value
    written = [node for node in gm.graph.nodes if "reference_of" in node.meta]
    assert len(written) > 20
    assert all(node.meta["nn_module_stack"] == stack for node in written)


def test_a_layer_called_twice_has_one_set_of_buffers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(self.layer(x))

    quantized = random_components(n=64)
    gm, _ = capture(Twice(), torch.randn(4, 64), spelling="dynamo")
    run_passes(gm, [DecomposeLinear(lambda node: quantized)])
    assert len(linears(gm)) == 0
    assert len(dict(gm.named_buffers())) == len(quantized.tensors)


def test_refused_linears_stay_with_their_reason_and_a_second_run_changes_nothing():
    gm, inputs = capture(nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 7)), torch.randn(4, 64), spelling="dynamo")
    first, second = linears(gm)
    step = DecomposeLinear(lambda node: random_components(low_rank_bits=16) if node is first else "too small")
    assert run_passes(gm, [step])["decompose_linear"]
    assert gm.meta["decompose_linear"] == {second.name: "too small"}
    before = only(gm(*inputs))
    # The dense low rank component is made of linears too; they are not decomposed again.
    again = DecomposeLinear(lambda node: "no" if node is second else pytest.fail(f"asked for {node.name}"))
    assert not run_passes(gm, [again])["decompose_linear"]
    assert torch.equal(only(gm(*inputs)), before)


def test_components_that_do_not_fit_are_refused():
    gm, _ = capture(nn.Linear(64, 24), torch.randn(4, 64), spelling="export")
    with pytest.raises(PassError, match=r"decompose_linear at node linear.*\(24, 64\).*\(24, 96\)"):
        run_passes(gm, [DecomposeLinear(lambda node: random_components(k=96))])
    gm, _ = capture(nn.Linear(64, 24), torch.randn(4, 64), spelling="export")
    with pytest.raises(PassError, match="has a bias"):
        run_passes(gm, [DecomposeLinear(lambda node: random_components(bias=None))])
