import logging

import pytest
import torch
from capture_graphs import capture
from random_components import random_components
from torch import nn

from tqcompile.errors import PassError
from tqcompile.modules import TwinLinear
from tqcompile.ops import dispatch
from tqcompile.passes.base import run_passes
from tqcompile.passes.lower import Lower, op_name


def graph(device="cpu"):
    """A twin linear's graph; on "cuda" its example values are fakes, so no GPU is needed."""
    gm, _ = capture(TwinLinear.from_quantized(random_components()), torch.randn(3, 64), spelling="dynamo")
    if device != "cpu":
        from torch._subclasses.fake_tensor import FakeTensor

        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
                node.meta["example_value"] = FakeTensor(value.fake_mode, meta, torch.device(device))
    return gm


def test_on_cpu_every_op_is_the_reference():
    gm = graph()
    text = str(gm.graph)
    assert run_passes(gm, [Lower()]) == {"lower": False}
    assert sorted(op_name(node) for node in gm.graph.nodes if op_name(node)) == [
        "quantize_activation",
        "twin_linear",
    ]
    decisions = gm.meta["lower"]
    assert set(decisions) == {node.name for node in gm.graph.nodes if op_name(node)}
    assert set(decisions.values()) == {"reference: there is no kernel for device cpu"}
    assert str(gm.graph) == text


def test_on_cuda_the_kernel_decides(monkeypatch):
    asked = []

    class Kernel:
        @staticmethod
        def unsupported(x, *args):
            asked.append((tuple(x.shape), x.dtype, x.device.type, len(args)))

    monkeypatch.setattr(dispatch, "_load", lambda op: (Kernel, None))
    gm = graph("cuda")
    run_passes(gm, [Lower()])
    assert set(gm.meta["lower"].values()) == {"triton"}
    assert asked == [((3, 64), torch.float32, "cuda", 2), ((3, 64), torch.int8, "cuda", 10)]


def test_the_form_of_a_kernel_is_named_where_the_graph_fixes_it(monkeypatch):
    class Kernel:
        unsupported = staticmethod(lambda *args: None)
        describe = staticmethod(lambda x, *args: f"form for {x.shape[0]} tokens")

    monkeypatch.setattr(dispatch, "_load", lambda op: (Kernel, None))
    gm = graph("cuda")
    run_passes(gm, [Lower()])
    assert set(gm.meta["lower"].values()) == {"triton: form for 3 tokens"}
    assert dispatch.kernel_form("twin_gemm", torch.empty(0, 64)) is None
    Kernel.remark = staticmethod(lambda x, *args: "slow" if x.dtype == torch.int8 else None)
    run_passes(gm, [Lower()])
    assert set(gm.meta["lower"].values()) == {"triton: form for 3 tokens", "triton: form for 3 tokens (slow)"}


def test_a_fallback_on_cuda_is_named_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_load", lambda op: (None, "no Triton here, says the test"))
    with caplog.at_level(logging.WARNING, logger="tqcompile"):
        for _ in range(2):
            gm = graph("cuda")
            run_passes(gm, [Lower()])
    assert set(gm.meta["lower"].values()) == {"reference: no Triton here, says the test"}
    said = [record.getMessage() for record in caplog.records]
    assert sum("tqcompile::twin_linear" in line for line in said) == 1
    assert sum("tqcompile::quantize_activation" in line for line in said) == 1


def test_a_graph_without_values_is_refused():
    gm = graph()
    for node in gm.graph.nodes:
        node.meta.pop("example_value", None)
    with pytest.raises(PassError, match=r"lower at node .* x has no example value"):
        run_passes(gm, [Lower()])


def test_other_nodes_are_not_ours():
    gm, _ = capture(nn.Linear(8, 8), torch.randn(3, 8), spelling="export")
    run_passes(gm, [Lower()])
    assert gm.meta["lower"] == {}
