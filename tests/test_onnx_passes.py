"""The passes over the ONNX graph: what each changes, what it leaves alone, and that a second run changes nothing."""

import numpy as np
import pytest
import torch
from random_components import random_components
from torch import nn

import tqcompile
from tqcompile.errors import ExportError
from tqcompile.modules import TwinLinear

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
from tqcompile.exporters.fold_constants import LARGEST, FoldConstants  # noqa: E402
from tqcompile.exporters.merge_siblings import MergeSiblings  # noqa: E402
from tqcompile.exporters.record_sources import RecordSources  # noqa: E402
from tqcompile.exporters.share_activation_quant import ShareActivationQuant  # noqa: E402
from tqcompile.exporters.trace import plain_program, trace  # noqa: E402


class Siblings(nn.Module):
    """q, k and v read one activation and share ``down``; ``other`` reads it too and differs in one ``setting``.

    The rotation is large enough that torch.onnx.export does not compare it with its copies itself.
    """

    def __init__(self, **setting):
        super().__init__()
        for index, (name, n) in enumerate((("q", 24), ("k", 6), ("v", 10))):
            self.add_module(name, self.layer(n, seed=index))
        self.other = self.layer(8, seed=3, **setting)

    def layer(self, n: int, seed: int, **setting) -> TwinLinear:
        setting = {"block": 64, **setting}
        components, shared = random_components(n=n, seed=seed, **setting), random_components(seed=9, block=64)
        for key in ("transform.input_scale", "transform.rotation", "down.weight_packed", "down.weight_scale"):
            if key in components.tensors and components.tensors[key].shape == shared.tensors[key].shape:
                components.tensors[key] = shared.tensors[key].clone()
        return TwinLinear.from_quantized(components)

    def forward(self, x):
        return torch.cat((self.q(x), self.k(x), self.v(x), self.other(x)), -1)


def graph(module: nn.Module, **example: torch.Tensor):
    program = trace(*plain_program(module.eval(), example), 21)
    RecordSources()(program)
    return program


def ops(program) -> list[str]:
    return [node.op_type for node in program.graph]


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def test_record_sources_names_modules_and_forgets_the_rest():
    program = graph(nn.Sequential(Siblings().q, nn.LayerNorm(24), nn.ReLU()), input=X)
    assert [(n.op_type, n.metadata_props) for n in program.graph] == [
        ("QuantizeActivation", {"tqcompile.source": "0"}),
        ("TwinLinear", {"tqcompile.source": "0"}),
        ("LayerNormalization", {"tqcompile.source": "1"}),
        ("Relu", {"tqcompile.source": "2"}),
    ]
    assert {"0.residual.weight_packed", "0.up.weight_scale", "1.bias"} <= set(program.graph.initializers)
    assert not program.metadata_props


def test_share_activation_quant_quantizes_once():
    program = graph(Siblings(), x=X)
    assert ops(program) == ["QuantizeActivation", "TwinLinear"] * 4 + ["Concat"]
    assert ShareActivationQuant()(program).modified
    assert ops(program) == ["QuantizeActivation", *["TwinLinear"] * 4, "Concat"]
    assert sum("rotation" in name for name in program.graph.initializers) == 1
    assert not ShareActivationQuant()(program).modified


def test_activations_that_differ_are_not_shared():
    program = graph(Siblings(block=32), x=X)
    ShareActivationQuant()(program)
    assert ops(program).count("QuantizeActivation") == 2


def test_merge_siblings_stacks_rows_and_splits_the_result():
    model = Siblings()
    program = graph(model, x=X)
    ShareActivationQuant()(program)
    assert MergeSiblings()(program).modified
    assert ops(program) == ["QuantizeActivation", "TwinLinear", "Split", "Concat"]
    _, wide, split, concat = program.graph
    assert wide.name == "q+k+v+other"
    assert wide.metadata_props["tqcompile.source"] == "q,k,v,other"
    assert [value.shape[-1] for value in split.outputs] == [24, 6, 10, 8]
    assert list(concat.inputs) == list(split.outputs)
    layers = (model.q, model.k, model.v, model.other)
    for index, key in ((2, "residual.weight_packed"), (6, "up.weight_packed"), (8, "bias")):
        expected = torch.cat([layer.state_dict()[key] for layer in layers]).numpy()
        np.testing.assert_array_equal(wide.inputs[index].const_value.numpy(), expected)
    assert not MergeSiblings()(program).modified


@pytest.mark.parametrize(
    "setting", [{"bias": None}, {"group_size": 16}, {"rank": 0}, {"act_bits": 4}, {"act_bits": 16}, {"scaled": False}]
)
def test_what_differs_from_its_siblings_stays_apart(setting):
    program = graph(Siblings(**setting), x=X)
    ShareActivationQuant()(program)
    MergeSiblings()(program)
    twins = [node for node in program.graph if node.op_type == "TwinLinear"]
    assert [node.metadata_props["tqcompile.source"] for node in twins] == ["q,k,v", "other"]


class Recurrent(nn.Module):
    """Two sibling layers called twice, as in a model that shares its blocks."""

    def __init__(self):
        super().__init__()
        first, second = (random_components(n=64, seed=seed, act_bits=8) for seed in (0, 1))
        for key in ("transform.input_scale", "transform.rotation", "down.weight_packed", "down.weight_scale"):
            second.tensors[key] = first.tensors[key].clone()
        self.a, self.b = TwinLinear.from_quantized(first), TwinLinear.from_quantized(second)

    def forward(self, x):
        x = self.a(x) + self.b(x)
        return self.a(x) - self.b(x)


@pytest.mark.parametrize("form", ["portable", "ort"])
def test_layers_called_twice_are_merged_twice(tmp_path, form):
    report = tqcompile.export_onnx(Recurrent(), tmp_path / "m.onnx", form=form, example={"x": X})
    assert report.difference < 1e-5
    assert report.ops["ai.onnx::Split"] == 2


def test_ort_form_refuses_groups_that_it_has_no_blocks_for(tmp_path):
    layer = TwinLinear.from_quantized(random_components(group_size=8))
    with pytest.raises(ExportError, match=r"group size 8 cannot be cut into .* form='portable'"):
        tqcompile.export_onnx(layer, tmp_path / "m.onnx", form="ort", example={"x": X})
    assert not list(tmp_path.iterdir())


class Constants(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(size, 8).bfloat16())

    def forward(self, x):
        return x @ self.weight.float().t()


def test_fold_constants_folds_what_is_small():
    small, large = graph(Constants(16), x=X[:, :8]), graph(Constants(LARGEST // 8 + 1), x=X[:, :8])
    FoldConstants()(small)
    assert ops(small) == ["MatMul"]
    before = ops(large)
    FoldConstants()(large)
    assert ops(large) == before
    assert {"Cast", "Transpose"} <= set(before)
    assert not FoldConstants()(small).modified
