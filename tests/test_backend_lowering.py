"""The backend's graph for a GPU, run on the CPU: what a decoder layer becomes, and that generate() says the same."""

import copy
import functools

import pytest
import torch
from random_components import random_components
from test_backend import first, ops_by_name, tiny
from torch import nn

import tqcompile
from tqcompile import backend
from tqcompile.modules import TwinLinear
from tqcompile.passes.lower import op_name

LOWERED = {"inner": "eager", "lower": True, "quantize": False}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    backend.reports.clear()


@functools.cache
def _quantized(name: str, layers: int, scheme: str) -> nn.Module:
    ids = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    settings = {"rank": 8, "group_size": 32, "steps": 3, "tune": 2, "backend": None, "progress": False}
    return tqcompile.compile(tiny(name, layers), ids, scheme=scheme, **settings)


def quantized(name: str, layers: int, scheme: str = "twin-w4a8") -> nn.Module:
    """A model of its own each time: the backend moves the weights of the one it compiles."""
    return copy.deepcopy(_quantized(name, layers, scheme))


def compile_and_keep(model: nn.Module, **options) -> list[torch.fx.GraphModule]:
    """Compile in place; the graphs that the backend was called with, as it left them."""
    graphs = []

    def keep(gm, example_inputs, **arguments):
        compiled = backend.twinquant(gm, example_inputs, **arguments)
        graphs.append(gm)
        return compiled

    model.compile(backend=keep, dynamic=True, options={**LOWERED, **options})
    return graphs


def called(gm: torch.fx.GraphModule, *targets) -> int:
    return sum(node.target in targets for node in gm.graph.nodes if node.op.startswith("call"))


def assert_decoder_layers(gm: torch.fx.GraphModule, layers: int, head_norms: int) -> None:
    """Four prologues and four gemms a layer, and nothing left of what they replace."""
    ours = [op_name(node) for node in gm.graph.nodes if op_name(node)]
    assert ours == ["prologue", "twin_gemm"] * (4 * layers)
    # What is left of norms: the last one, before lm_head, and those of Qwen3's heads. Of gates: nothing.
    norms = head_norms * layers + 1
    assert called(gm, "pow") == called(gm, torch.rsqrt) == called(gm, "mean") == norms
    assert called(gm, nn.functional.silu) == 0
    adds = [node for node in gm.graph.nodes if op_name(node) == "twin_gemm" and node.args[9] is not None]
    assert len(adds) == 2 * layers  # both residual additions of a layer
    kinds = [node.args[7] for node in gm.graph.nodes if op_name(node) == "prologue"]
    assert kinds == ["rms_norm", "none", "rms_norm", "silu_mul"] * layers


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("name", "head_norms"), [("Llama", 0), ("Qwen3", 2)])
def test_a_decoder_layer_is_four_prologues_and_four_gemms(name, head_norms, cache):
    eager, model = quantized(name, 3), quantized(name, 3)
    graphs = compile_and_keep(model)
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    for length in (9, 13):
        ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(length))
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(got, eager.generate(ids, attention_mask=torch.ones_like(ids), **arguments))
        assert len(set(got[:, length:].flatten().tolist())) > 3
    assert len(graphs) == 2  # prefill and decode
    for gm, report in zip(graphs, backend.reports, strict=True):
        assert_decoder_layers(gm, 3, head_norms)
        assert gm.meta["merge_siblings"] == {}
        assert set(gm.meta["fuse_prologue"].values()) == {"no norm or gate before it"}  # o_proj
        assert ops_by_name(report, "prologue") == ops_by_name(report, "twin_gemm") == 12
        assert report.modified["merge_siblings"]
        assert report.modified["fuse_prologue"]


@pytest.mark.parametrize("scheme", ["twin-w4a4", "twin-w4a16", "rtn-w4a8", "svdquant-w4a8"])
def test_every_scheme_lowers(scheme):
    eager, model = quantized("Llama", 1, scheme), quantized("Llama", 1, scheme)
    graphs = compile_and_keep(model)
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        got, want = first(model(ids)), first(eager(ids))
    # 4 bits: the scale is divided before the product, so last bits differ and may move a later rounding.
    assert (got - want).norm() <= (1e-2 if scheme == "twin-w4a4" else 1e-5) * want.norm()
    (gm,) = graphs
    if scheme != "svdquant-w4a8":  # its 16-bit factors read the norm beside the quantization
        assert_decoder_layers(gm, 1, 0)
    assert called(gm, torch.ops.tqcompile.quantize_activation.default, torch.ops.tqcompile.twin_linear.default) == 0


@pytest.mark.parametrize(("name", "inner"), [("Llama", "aot_eager"), ("Qwen3", "inductor")])
def test_lowered_graphs_pass_aot_autograd_and_inductor(name, inner):
    eager, model = quantized(name, 1), quantized(name, 1)
    graphs = compile_and_keep(model, inner=inner)
    for shape in ((2, 9), (3, 5)):
        ids = torch.randint(0, 97, shape)
        with torch.no_grad():
            got, want = first(model(ids, use_cache=False)), first(eager(ids, use_cache=False))
        assert (got - want).norm() <= 1e-3 * want.norm()
    assert len(graphs) == len(backend.reports) == 1
    q, v = (getattr(model.model.layers[0].self_attn, name).residual.weight_packed for name in ("q_proj", "v_proj"))
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_another_model_of_the_same_class_does_not_run_this_ones_graph():
    models = [quantized("Llama", 1), quantized("Llama", 1)]
    for name, tensor in models[1].named_buffers():
        if name.endswith("residual.weight_packed"):
            tensor.copy_(tensor.flip(0))
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        want = [first(copy.deepcopy(model)(ids)) for model in models]
        assert (want[0] - want[1]).norm() > 0.1 * want[0].norm()
        graphs = [compile_and_keep(model) for model in models]
        for _ in range(2):
            for model, expected in zip(models, want, strict=True):
                torch.testing.assert_close(first(model(ids)), expected)
    assert [len(kept) for kept in graphs] == [1, 1]


def test_plain_linears_are_quantized_and_lowered():
    model, ids = tiny("Llama", 1), torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        results = []
        for lower in (False, True):
            torch._dynamo.reset()
            options = {"inner": "eager", "lower": lower}
            results.append(first(torch.compile(model, backend="twinquant", options=options)(ids)))
    torch.testing.assert_close(*results)
    portable, lowered = backend.reports
    assert ops_by_name(portable, "twin_linear") == ops_by_name(lowered, "twin_gemm") == 7
    # Quantized one by one, without data: no two linears share a down projection.
    assert ops_by_name(lowered, "prologue") == 7
    assert ops_by_name(portable, "quantize_activation") == 4


def test_calibrated_components_beside_a_plain_model_merge_too():
    model, ids = tiny("Llama", 1), torch.randint(0, 97, (8, 16))
    tqcompile.attach_recipe(model, ids, rank=8, group_size=32, steps=3, tune=2, progress=False)
    with torch.no_grad():
        compiled = torch.compile(model, backend="twinquant", options={"inner": "eager", "lower": True})
        got = first(compiled(ids))
        torch._dynamo.reset()
        want = first(torch.compile(model, backend="twinquant", options={"inner": "eager"})(ids))
    torch.testing.assert_close(got, want)
    lowered, portable = backend.reports
    assert ops_by_name(lowered, "twin_gemm") == 4
    assert ops_by_name(portable, "twin_linear") == 7


def test_on_the_cpu_the_portable_ops_stay_unless_asked():
    model = TwinLinear.from_quantized(random_components())
    x = torch.randn(3, 64)
    for options, expected in (({}, "twin_linear"), ({"lower": False}, "twin_linear"), ({"lower": True}, "twin_gemm")):
        torch._dynamo.reset()
        graphs = []

        def keep(gm, example_inputs, graphs=graphs, **arguments):
            graphs.append(gm)
            return backend.twinquant(gm, example_inputs, **arguments)

        got = torch.compile(model, backend=keep, options={"inner": "eager", **options})(x)
        torch.testing.assert_close(got, model(x))
        assert expected in [op_name(node) for node in graphs[0].graph.nodes]
