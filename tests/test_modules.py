"""TwinLinear as an nn.Module: buffers, dtypes, moves, copies and state_dict."""

import copy

import pytest
import torch
from random_components import random_components
from torch import nn

from tqcompile.modules import TwinLinear

FORMS = [
    {},
    {"act_bits": 4},
    {"act_bits": 16},
    {"rank": 0},
    {"low_rank_bits": 16},
    {"bias": None},
    {"block": 0, "scaled": False},
]


def layer_of(**form):
    return TwinLinear.from_quantized(random_components(**form))


def x_of(dtype=torch.float32, shape=(3, 5, 64)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_buffers_only_and_exactly_the_tensors_it_was_given(form):
    quantized = random_components(**form)
    layer = TwinLinear.from_quantized(quantized)
    assert not list(layer.parameters())
    state = layer.state_dict()
    assert set(state) == set(quantized.tensors)
    for name, tensor in state.items():
        assert torch.equal(tensor, quantized.tensors[name]), name
        assert tensor.dtype == quantized.tensors[name].dtype, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_follow_the_input(form, dtype):
    layer = layer_of(**form)
    for shape in ((3, 5, 64), (64,), (0, 64), (2, 0, 64)):
        y = layer(x_of(dtype, shape))
        assert y.shape == (*shape[:-1], 24)
        assert y.dtype == dtype
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_casting_the_model_changes_no_weight(form, move):
    layer = layer_of(**form)
    x, before = x_of(), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    y = layer(x)
    assert move(layer) is layer
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor, before[name]), name
    if "bias" in before:
        # The bias is a parameter of the model like any other and follows it: 2**-8 is bfloat16's rounding.
        assert (layer(x) - y).abs().max() <= before["bias"].abs().max() * 2.0**-8 + 1e-5
    else:
        assert torch.equal(layer(x), y)


def test_every_buffer_moves_with_the_layer():
    layer = layer_of(low_rank_bits=16).to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.transform.rotation.is_meta


def test_deepcopy_and_state_dict_give_the_same_layer():
    layer = layer_of(act_bits=4)
    x = x_of()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    fresh = layer_of(act_bits=4, seed=9)
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_a_hadamard_rotation_is_rebuilt_and_not_stored():
    from tqcompile.config import Config
    from tqcompile.methods.hadamard import signed_hadamard
    from tqcompile.methods.recipe import quantize_data_free

    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    quantized = quantize_data_free(weight, None, Config(rank=8, group_size=32))
    layer = TwinLinear.from_quantized(quantized)
    assert "transform.rotation" not in layer.state_dict()
    assert torch.equal(layer.transform.rotation, signed_hadamard(quantized.spec.rotation_signs))
    fresh = TwinLinear(quantized.spec)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x_of()), layer(x_of()))


def test_its_repr_says_what_it_is():
    shown = repr(layer_of(act_bits=4))
    assert "in_features=64, out_features=24, rank=8, group_size=32, act_bits=4" in shown


def test_a_missing_tensor_is_refused():
    quantized = random_components()
    del quantized.tensors["up.weight_scale"]
    with pytest.raises(KeyError, match=r"up\.weight_scale"):
        TwinLinear.from_quantized(quantized)
