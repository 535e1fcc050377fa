import copy
import operator

import pytest
import torch
from capture_graphs import calls, capture, only
from random_components import random_components
from torch import nn

import tqcompile
from tqcompile.modules import TwinLinear
from tqcompile.passes.base import run_passes
from tqcompile.passes.merge_siblings import MergeSiblings, concatenated
from tqcompile.passes.share_activation_quant import ShareActivationQuant

TWIN = torch.ops.tqcompile.twin_linear.default
SHARED = ("transform.input_scale", "transform.rotation", "down.weight_packed", "down.weight_scale")


class Siblings(nn.Module):
    """Layers that read one x, as q, k and v do; ``between`` is called with x after each."""

    def __init__(self, components, between=None):
        super().__init__()
        self.layers = nn.ModuleList(TwinLinear.from_quantized(c) for c in components)
        self.between = between

    def forward(self, x):
        results = []
        for layer in self.layers:
            y = layer(x)
            results.append(y.view(*y.shape[:-1], 2, -1).flatten(-2))
            if self.between is not None:
                self.between(x)
        return torch.cat(results, -1)


def site(count=3, **form):
    """Components of one site: each linear has its own copy of the transform and of down."""
    components = [random_components(n=8 + 2 * i, seed=i, **form) for i in range(count)]
    for c in components[1:]:
        c.tensors.update({key: components[0].tensors[key].clone() for key in SHARED if key in c.tensors})
    return components


def merged(module, x, *, values=True):
    """(graph after the pass, result, the pass)"""
    gm, inputs = capture(module, x.clone(), spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    tensors = dict(zip(names, inputs, strict=True)) if values else {}
    step = MergeSiblings(tensors)
    run_passes(gm, [ShareActivationQuant(tensors), step])
    fresh = [x.clone() if name.startswith("l_x") else value for name, value in zip(names, inputs, strict=True)]
    return gm, only(gm(*fresh)), step


def close(got, want):
    """Equal but for the order in which a product of another width sums 64 float32 terms."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def bytes_of(module) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}.values())


FORMS = [{}, {"act_bits": 4}, {"act_bits": 16}, {"rank": 0}, {"bias": None}, {"act_bits": 16, "block": 0}]


@pytest.mark.parametrize("form", FORMS)
def test_siblings_become_one_linear_in_the_same_memory(form):
    module, x = Siblings(site(**form)), torch.randn(2, 7, 64)
    want, before = module(x), bytes_of(module)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    gm, result, step = merged(module, x)
    close(result, want)
    (twin,) = calls(gm, TWIN)
    assert twin.meta["example_value"].shape == (2, 7, 8 + 10 + 12)
    assert gm.meta["merge_siblings"] == {}
    assert step.moved_inputs
    # No second copy; what the module holds is the same.
    assert bytes_of(module) == before
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
    close(module(x), want)
    # The 16-bit transform of the others is gone with them.
    assert len(calls(gm, torch.matmul)) == (form.get("act_bits") == 16 and form.get("block") != 0)


def test_a_second_compilation_moves_nothing():
    module, x = Siblings(site()), torch.randn(3, 64)
    merged(module, x)
    at = [tensor.data_ptr() for tensor in module.buffers()]
    gm, inputs = capture(module, x, spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    step = MergeSiblings(dict(zip(names, inputs, strict=True)))
    run_passes(gm, [ShareActivationQuant(step._tensors), step])
    assert len(calls(gm, TWIN)) == 1
    assert not step.moved_inputs
    assert [tensor.data_ptr() for tensor in module.buffers()] == at
    # The graph reads the module's memory: a weight that is loaded into it is seen.
    module.layers[1].residual.weight_packed.zero_()
    close(only(gm(*inputs)), module(x))


def test_only_what_belongs_together_is_merged():
    components = site(5)
    components[1].tensors["down.weight_scale"] = components[1].tensors["down.weight_scale"] * 2
    components[3] = site(4, bias=None)[3]
    components[3].tensors.update({key: components[0].tensors[key].clone() for key in SHARED})
    module, x = Siblings(components), torch.randn(3, 64)
    want = module(x)
    gm, result, _ = merged(module, x)
    close(result, want)
    assert len(calls(gm, TWIN)) == 3
    reasons = sorted(reason.split(": ")[1] for reason in gm.meta["merge_siblings"].values())
    assert reasons == ["only one of them has bias", "their down projections differ"]


def test_different_transforms_are_different_inputs():
    for form in ({}, {"act_bits": 16}):
        components = site(2, **form)
        components[1].tensors["transform.rotation"] = components[1].tensors["transform.rotation"].flip(0)
        module, x = Siblings(components), torch.randn(3, 64)
        want = module(x)
        gm, result, _ = merged(module, x)
        close(result, want)
        assert len(calls(gm, TWIN)) == 2
        assert gm.meta["merge_siblings"] == {}


def test_weights_without_values_stay_apart():
    module, x = Siblings(site(2, rank=0, scaled=False, block=0)), torch.randn(3, 64)
    gm, _ = capture(module, x, spelling="dynamo")
    run_passes(gm, [ShareActivationQuant(), MergeSiblings()])
    assert len(calls(gm, TWIN)) == 2
    (reason,) = gm.meta["merge_siblings"].values()
    assert reason.endswith("residual has no data here, or is computed")


def test_a_layer_that_is_called_twice_keeps_its_one_weight():
    module, x = Siblings(site(1)), torch.randn(3, 64)
    module.layers.append(module.layers[0])
    want = module(x)
    gm, result, _ = merged(module, x)
    close(result, want)
    (reason,) = gm.meta["merge_siblings"].values()
    assert reason.endswith("they share residual")


def test_inference_tensors_cannot_move():
    with torch.inference_mode():
        module = Siblings(site(2))
    with torch.inference_mode(False), torch.no_grad():
        gm, _, _ = merged(module, torch.randn(3, 64))
    (reason,) = gm.meta["merge_siblings"].values()
    assert reason.endswith("residual was made under inference_mode")


@pytest.mark.parametrize(("form", "left"), [({}, 1), ({"act_bits": 16}, 2)])
def test_a_write_to_the_input_between_them(form, left):
    # An int8 operand is a value of its own; a floating one is read again by each linear.
    module, x = Siblings(site(2, **form), between=lambda x: x.mul_(1.5)), torch.randn(3, 64)
    want = module(x.clone())
    gm, inputs = capture(module, x.clone(), spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    run_passes(gm, [MergeSiblings(dict(zip(names, inputs, strict=True)))])
    assert len(calls(gm, TWIN)) == 2
    fresh = [x.clone() if name.startswith("l_x") else value for name, value in zip(names, inputs, strict=True)]
    close(only(gm(*fresh)), want)


def test_constants_are_reported_to_whoever_guards_them():
    module, seen = Siblings(site(2)), []
    gm, inputs = capture(module, torch.randn(3, 64), spelling="dynamo")
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    tensors = dict(zip(names, inputs, strict=True))
    run_passes(gm, [ShareActivationQuant(tensors), MergeSiblings(tensors, seen.append)])
    assert [tensors[node.name] is layer.residual.weight_packed for node, layer in zip(seen, module.layers, strict=True)]
    assert len(seen) == 2


def test_attributes_of_an_exported_graph_are_merged():
    gm, (x,) = capture(Siblings(site()), torch.randn(3, 64), spelling="export")
    before = gm(x)
    run_passes(gm, [ShareActivationQuant(), MergeSiblings()])
    assert len(calls(gm, TWIN)) == 1
    close(gm(x), before)


def test_concatenated_tensors_share_their_storage_and_keep_their_values():
    parts = [torch.randn(n, 6) for n in (2, 5, 1)]
    copies = [part.clone() for part in parts]
    whole = concatenated(parts)
    assert torch.equal(whole, torch.cat(copies))
    assert all(torch.equal(part, copy) and part.is_contiguous() for part, copy in zip(parts, copies, strict=True))
    assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
    again = concatenated(parts)
    assert again.data_ptr() == whole.data_ptr()
    assert again.shape == (8, 6)
    # In another order, or with a gap, they have to move.
    assert concatenated([parts[0], parts[2]]).data_ptr() != whole.data_ptr()


def test_everything_that_reads_or_writes_a_model_works_after_a_merge(tmp_path):
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(0, 50, (4, 12))
    tqcompile.compile(model, ids, rank=8, group_size=32, backend=None, progress=False)
    untouched, before = copy.deepcopy(model), bytes_of(model)
    torch._dynamo.reset()
    model.compile(backend="twinquant", options={"inner": "eager", "lower": True, "quantize": False})
    with torch.no_grad():
        want = model(ids).logits
    q, k = (getattr(model.model.layers[0].self_attn, name).residual.weight_packed for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert bytes_of(model) == before
    save_file({name: t for name, t in model.state_dict().items() if t is not model.lm_head.weight}, tmp_path / "a")
    tqcompile.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for where in ("saved", "pretrained"):
        loaded = tqcompile.load(tmp_path / where)
        for name, tensor in untouched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 1.2 * sum(t.nbytes for t in untouched.state_dict().values()) + 20_000
    other = copy.deepcopy(model)
    other.load_state_dict(untouched.state_dict())
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(other(ids).logits, want)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:2]).logits, want[:2])


def test_readers_of_a_part_may_still_ask_for_a_view():
    module, x = Siblings(site(2)), torch.randn(2, 3, 64)
    gm, result, _ = merged(module, x)
    parts = [node for node in calls(gm, operator.getitem) if "split" in node.args[0].name]
    assert [user.target for part in parts for user in part.users if user.op == "call_method"] == ["reshape"] * 2
    close(result, module(x))
