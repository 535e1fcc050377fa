import pytest
import torch
from capture_graphs import calls, capture, only
from random_components import random_components
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tqcompile.modules import TwinLinear
from tqcompile.ops import dispatch
from tqcompile.ops.packing import integer_scales
from tqcompile.ops.quantize_activation import transform_activation
from tqcompile.passes.base import run_passes
from tqcompile.passes.fuse_prologue import GEMM, LATTICE, PROLOGUE, QUANTIZE, TWIN, FusePrologue
from tqcompile.passes.lower import Lower, op_name
from tqcompile.passes.share_activation_quant import ShareActivationQuant

K = 64


def layer(n=24, **form) -> TwinLinear:
    return TwinLinear.from_quantized(random_components(n=n, k=K, **form))


class Normed(nn.Module):
    """norm -> linear, with the residual stream around it; ``also`` sees every value."""

    def __init__(self, also=None, **form):
        super().__init__()
        self.norm, self.linear, self.also = LlamaRMSNorm(K, eps=1e-5), layer(n=K, **form), also
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x, other):
        h = x + other
        v = self.norm(h)
        extra = self.also(x, h, v) if self.also else None
        y = h + self.linear(v)
        return y if extra is None else (y, extra)


class Gated(nn.Module):
    def __init__(self, swap=False, **form):
        super().__init__()
        self.linear, self.swap = layer(**form), swap

    def forward(self, x, other):
        gate = nn.functional.silu(x)
        return self.linear(other * gate if self.swap else gate * other)


class Plain(nn.Module):
    def __init__(self, count=1, **form):
        super().__init__()
        self.layers = nn.ModuleList(layer(n=24 + 2 * i, seed=i, **form) for i in range(count))

    def forward(self, x):
        return torch.cat([one(x) for one in self.layers], -1)


def fused(module, *inputs, expect=True):
    """(graph after the pass, what it returns, what the module returns)"""
    module.requires_grad_(False)
    want = module(*(x.clone() for x in inputs))
    copies = {id(x): x.clone() for x in inputs}  # capturing runs the graph, which may write to what it is given
    gm, given = capture(module, *inputs, spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    tensors = dict(zip(names, given, strict=True))
    fresh = [copies.get(id(x), x) for x in given]
    assert run_passes(gm, [FusePrologue(tensors)]) == {"fuse_prologue": expect}
    return gm, gm(*fresh), want


def arguments(gm, op=PROLOGUE):
    names = [argument.name for argument in op._schema.arguments]
    return [dict(zip(names, node.args, strict=True)) for node in calls(gm, op)]


def assert_only_new_ops(gm):
    assert {op_name(node) for node in gm.graph.nodes} - {None} == {"prologue", "twin_gemm"}


FORMS = [
    {},
    {"act_bits": 4},
    {"act_bits": 16},
    {"rank": 0},
    {"rank": 0, "act_bits": 16, "block": 0, "scaled": False},
    {"block": 0, "bias": None},
    {"scaled": False, "act_bits": 16},
    {"scaled": False, "act_bits": 4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_becomes_two_ops(form, dtype):
    gm, got, want = fused(Plain(**form), torch.randn(2, 3, K).to(dtype))
    # With 4 bits the scale is divided before the product and not after it: a rounding of each component, and where the
    # two cancel they are larger than their sum.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(only(got), want, rtol=2 * eps, atol=2 * eps * want.abs().max().item())
    assert_only_new_ops(gm)
    (prologue,), (gemm,) = arguments(gm), arguments(gm, GEMM)
    bits = form.get("act_bits", 8)
    assert (prologue["kind"], prologue["act_bits"]) == ("none", bits)
    assert (prologue["act_ratio"] > 0) == (bits == 4)
    assert (prologue["rotation"] is not None) == (form.get("block") != 0)
    assert (prologue["input_scale"] is not None) == form.get("scaled", True)
    assert (gemm["t"] is None) == (gemm["up"] is None) == (form.get("rank") == 0)
    assert (gemm["operand_scale"] is None) == (bits == 16)
    assert not calls(gm, torch.matmul)  # the 16-bit transform is part of the op
    assert list(gm.meta["fuse_prologue"].values()) == ["no norm or gate before it"]
    values = [node.meta["example_value"] for node in calls(gm, GEMM)]
    assert [(tuple(value.shape), value.dtype) for value in values] == [((2, 3, 24), dtype)]


@pytest.mark.parametrize("act_bits", [8, 4, 16])
def test_from_33_tokens_on_t_is_left_to_the_product(act_bits):
    gm, got, want = fused(Plain(act_bits=act_bits), torch.randn(2, 20, K))
    torch.testing.assert_close(only(got), want, rtol=1e-5, atol=1e-5)
    (prologue,), (gemm,) = arguments(gm), arguments(gm, GEMM)
    assert prologue["defer_from"] == gemm["defer_from"] == 33
    assert (gemm["down"], gemm["down_scale"]) == (prologue["down"], prologue["down_scale"])
    if act_bits == 4:  # t is of the 8-bit integers
        assert gemm["wide"].args == (calls(gm, PROLOGUE)[0], 4)
        assert gemm["wide_ratio"] == prologue["act_ratio"] > 0
    else:
        assert (gemm["wide"], gemm["wide_ratio"]) == (None, 0.0)


@pytest.mark.parametrize("form", FORMS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_residual_and_the_addition_behind(form, dtype):
    module = Normed(**form).to(dtype)
    x, other = (torch.randn(2, 3, K).to(dtype) for _ in range(2))
    gm, got, want = fused(module, x, other)
    # The sum behind the linear is rounded once, not twice.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(only(got), want, rtol=2 * eps, atol=4 * eps)
    assert_only_new_ops(gm)
    (prologue,), (gemm,) = arguments(gm), arguments(gm, GEMM)
    assert (prologue["kind"], prologue["eps"]) == ("rms_norm", 1e-5)
    assert prologue["other"] is not None
    # The residual stream is the fourth result, and what the second op adds.
    assert gemm["addend"].args == (calls(gm, PROLOGUE)[0], 3)
    left = {node.target for node in gm.graph.nodes if node.op.startswith("call")}
    assert not left & {"pow", "mean", torch.rsqrt, "to", "item"}
    assert gm.meta["fuse_prologue"] == {}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("form", FORMS[:3])
def test_gate(form, swap):
    x, other = torch.randn(2, 3, 2 * K).bfloat16().split(K, -1)
    gm, got, want = fused(Gated(swap, **form), x, other)
    assert torch.equal(only(got), want) or form.get("act_bits") == 4
    torch.testing.assert_close(only(got), want, rtol=2**-6, atol=2**-6)
    assert_only_new_ops(gm)
    (prologue,) = arguments(gm)
    assert prologue["kind"] == "silu_mul"
    assert not calls(gm, nn.functional.silu)


@pytest.mark.parametrize(
    ("also", "kind", "reason"),
    [
        (lambda x, h, v: v * 2, "none", "the rms_norm before it is read elsewhere, at "),
        (lambda x, h, v: x.mul_(3) * 1, "none", "writes in place between the rms_norm and the quantization"),
        # The stream may have any reader; one that comes before the quantization needs the sum where it was.
        (lambda x, h, v: h * 2, "rms_norm", ""),
    ],
)
def test_what_something_else_reads_or_writes_stays(also, kind, reason):
    gm, got, want = fused(Normed(also), torch.randn(3, K), torch.randn(3, K))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    (prologue,) = arguments(gm)
    assert (prologue["kind"], prologue["other"]) == (kind, None)
    assert reason in "".join(gm.meta["fuse_prologue"].values())
    assert len(calls(gm, QUANTIZE)) == 0


def test_a_reader_of_a_shape_does_not_keep_a_norm():
    gm, inputs = capture(Normed().requires_grad_(False), torch.randn(3, K), torch.randn(3, K), spelling="dynamo")
    (quantize,) = calls(gm, QUANTIZE)
    with gm.graph.inserting_before(quantize):
        size = gm.graph.call_method("size", (quantize.args[0],))
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], size),)
    gm.recompile()
    want = gm(*inputs)
    run_passes(gm, [FusePrologue()])
    got = gm(*inputs)
    torch.testing.assert_close(got[0], want[0])
    assert got[1] == want[1] == (3, K)
    assert [prologue["kind"] for prologue in arguments(gm)] == ["rms_norm"]


def test_a_quantized_activation_that_others_read_keeps_its_op():
    class Reader(Plain):
        def forward(self, x):
            q, scale = torch.ops.tqcompile.quantize_activation.default(x)
            twin, one = torch.ops.tqcompile.twin_linear.default, self.layers[0]
            weights = (one.residual.weight_packed, one.residual.weight_scale, None, None, None, None, None)
            return twin(q, scale, *weights, 0.0, x.dtype), q.float() * scale

    gm, got, want = fused(Reader(), torch.randn(3, K), expect=False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    (reason,) = gm.meta["fuse_prologue"].values()
    assert reason.endswith("reads it and is no linear of ours")
    assert len(calls(gm, QUANTIZE)) == len(calls(gm, TWIN)) == 1


def test_linears_that_share_an_activation_share_its_prologue_if_they_share_down():
    for same, prologues in ((True, 1), (False, 2)):
        module = Plain(2)
        if same:
            module.layers[1].down.load_state_dict(module.layers[0].down.state_dict())
        module.layers[1].transform.load_state_dict(module.layers[0].transform.state_dict())
        gm, inputs = capture(module.requires_grad_(False), torch.randn(3, K), spelling="dynamo")
        want = only(gm(*inputs))
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        tensors = dict(zip(names, inputs, strict=True))
        run_passes(gm, [ShareActivationQuant(tensors), FusePrologue(tensors)])
        assert (len(calls(gm, PROLOGUE)), len(calls(gm, GEMM))) == (prologues, 2)
        assert torch.equal(only(gm(*inputs)), want)
        assert_only_new_ops(gm)
        if not same:
            assert "different down projections" in next(iter(gm.meta["fuse_prologue"].values()))


def test_scales_with_an_integer_form_come_with_it():
    module, x, seen = Plain(), torch.randn(3, K), []
    scale = module.layers[0].residual.weight_scale
    for integer in (False, True):
        if integer:
            scale.copy_((torch.randint(1, 17, scale.shape) * 2.0 ** -torch.randint(5, 9, (len(scale), 1))).bfloat16())
        gm, inputs = capture(module.requires_grad_(False), x, spelling="dynamo")
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        run_passes(gm, [FusePrologue(dict(zip(names, inputs, strict=True)), seen.append)])
        (gemm,) = arguments(gm, GEMM)
        torch.testing.assert_close(only(gm(*inputs)), module(x))
        if not integer:
            assert gemm["channel_scale"] is None
    channel = getattr(gm, gemm["channel_scale"].target)
    assert torch.equal(channel, integer_scales(scale)[0])
    assert len(seen) == 1


class Lattice(nn.Module):
    """norm -> transform -> two low-bit products of one activation, with the residual stream around them."""

    def __init__(self, rotated=True, also=None):
        super().__init__()
        self.norm, self.also = LlamaRMSNorm(K, eps=1e-5), also
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(32, 32))[0] if rotated else None)
        self.register_buffer("codes", torch.randint(0, 256, (K, K // 4), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(K, 1) + 0.1)

    def forward(self, x, other):
        h = x + other
        v = self.norm(h)
        u = transform_activation(v, None, self.rotation)
        product = torch.ops.tqcompile.lattice_linear.default
        y = product(u, self.codes, self.scale, None, None, None, 2)
        z = product(u, self.codes, self.scale, None, None, None, 2)
        return h + y, z, *(() if self.also is None else (self.also(v, u),))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_bit_products_read_what_one_prologue_computes(rotated, dtype):
    x, other = (torch.randn(2, 3, K).to(dtype) for _ in range(2))
    gm, got, want = fused(Lattice(rotated, lambda v, u: u * 2).to(dtype), x, other)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    (prologue,), products = arguments(gm), calls(gm, LATTICE)
    assert (prologue["kind"], prologue["act_bits"], prologue["planes"]) == ("rms_norm", 16, False)
    assert prologue["other"] is not None
    assert (prologue["rotation"] is not None) == rotated
    assert len(products) == 2
    assert {node.args[0].args for node in products} == {(calls(gm, PROLOGUE)[0], 0)}
    assert not calls(gm, torch.matmul)
    assert gm.meta["fuse_prologue"] == {}


def test_a_norm_that_others_read_stays_in_front_of_a_low_bit_product():
    gm, got, want = fused(Lattice(True, lambda v, u: v * 2), torch.randn(3, K), torch.randn(3, K))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    (prologue,) = arguments(gm)
    assert (prologue["kind"], prologue["rotation"] is None) == ("none", False)
    assert "read elsewhere" in "".join(gm.meta["fuse_prologue"].values())


def test_a_low_bit_product_with_nothing_in_front_is_left_with_a_reason():
    class Bare(Lattice):
        def forward(self, x):
            return torch.ops.tqcompile.lattice_linear.default(x, self.codes, self.scale, None, None, None, 2)

    gm, got, want = fused(Bare(), torch.randn(3, K), expect=False)
    assert torch.equal(only(got), want)
    assert list(gm.meta["fuse_prologue"].values()) == ["no norm or gate before it"]


def test_two_linears_with_one_sum_behind_them():
    class Sum(Plain):
        def forward(self, x, y):
            return self.layers[0](x) + self.layers[1](y)

    module = Sum(2)
    module.layers[1] = layer(n=24, seed=1)
    gm, got, want = fused(module, torch.randn(3, K), torch.randn(3, K))
    torch.testing.assert_close(only(got), want)
    assert sorted(gemm["addend"] is None for gemm in arguments(gm, GEMM)) == [False, True]


def test_a_sum_that_broadcasts_or_changes_dtype_is_no_addend():
    class Sum(Plain):
        def forward(self, x, y):
            return self.layers[0](x) + y

    for y in (torch.randn(24), torch.randn(3, 24).double()):
        gm, got, want = fused(Sum(), torch.randn(3, K), y)
        assert torch.equal(only(got), want)
        assert arguments(gm, GEMM)[0]["addend"] is None


def on_cuda(module, *inputs):
    """The module's graph with example values on a GPU; they are fakes, so none is needed."""
    gm, _ = capture(module.requires_grad_(False), *inputs, spelling="dynamo")
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
            node.meta["example_value"] = FakeTensor(value.fake_mode, meta, torch.device("cuda"))
    return gm


def test_on_cuda_both_ops_need_a_kernel(monkeypatch):
    reasons = {}

    def kernel_of(op):
        return type("Kernel", (), {"unsupported": staticmethod(lambda *args: reasons.get(op))}), None

    monkeypatch.setattr(dispatch, "_load", kernel_of)
    gm = on_cuda(Normed(), torch.randn(3, K), torch.randn(3, K))
    text = str(gm.graph)
    for op in ("prologue", "twin_gemm"):
        reasons.clear()
        reasons[op] = "not here, says the test"
        assert run_passes(gm, [FusePrologue()]) == {"fuse_prologue": False}
        (reason,) = gm.meta["fuse_prologue"].values()
        assert reason == f"{op}: reference: not here, says the test"
        assert str(gm.graph) == text
    reasons.clear()
    run_passes(gm, [FusePrologue(), Lower()])
    assert_only_new_ops(gm)
    assert set(gm.meta["lower"].values()) == {"triton"}
