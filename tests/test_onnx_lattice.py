"""ONNX export of linears with codes of two and three bits: what is stored, and that it computes what torch does."""

import numpy as np
import pytest
import torch
from random_components import random_codes
from torch import nn

import tqcompile
from tqcompile import demo
from tqcompile.errors import ExportError
from tqcompile.modules import LatticeLinear

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx_runtime_in_python import DOMAIN, OPS  # noqa: E402

SIGNS = "0f3c5a96"  # of 32 channels
SKIPPED = ["lm_head", "down_proj", "q_proj", "k_proj", "v_proj"]  # what is left takes seconds to quantize


class Layers(nn.Module):
    """Every kind of layer side by side, x (..., 96) -> (..., sum of widths); lattices of 4 and of other dimensions."""

    def __init__(self):
        super().__init__()
        kinds = [
            {"signs": SIGNS, "scaled": True, "bias": torch.bfloat16},
            {"rank": 10, "bias": None},
            {"rank": 6, "signs": SIGNS, "group_size": 96},
            {"lattice": 4, "basis": True, "signs": SIGNS},
            {"lattice": 2, "basis": True, "group_size": 8, "bias": None},
            {"lattice": 3, "group_size": 96, "scaled": True},
            {"lattice": 4, "signs": SIGNS, "output_signs": SIGNS, "n": 64},
        ]
        settings = [{"n": 7, "seed": seed, "bits": bits, **kind} for bits in (2, 3) for seed, kind in enumerate(kinds)]
        self.layers = nn.ModuleList(LatticeLinear.from_quantized(random_codes(**setting)) for setting in settings)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


def x(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("form", "opset"), [("portable", 21), ("portable", 23), ("inlined", 21), ("inlined", 23)])
def test_every_kind_runs_everywhere(tmp_path, form, opset):
    model = Layers().eval()
    report = tqcompile.export_onnx(model, tmp_path / "m.onnx", form=form, opset=opset, example={"x": x(1, 3, 5)})
    proto = onnx.load(str(report.path))
    assert next(entry.version for entry in proto.opset_import if entry.domain == "") == opset
    assert any(node.domain == DOMAIN for node in proto.graph.node) == (form == "portable")
    runs = [tqcompile.ort_session(report.path, optimize=optimize) for optimize in (True, False)]
    runs.append(reference.ReferenceEvaluator(proto))
    if form == "portable":
        del proto.functions[:]
        runs.append(reference.ReferenceEvaluator(proto, new_ops=OPS))
    expected = model(x(2, 2, 7)).detach().numpy()
    for run in runs:
        actual, start = run.run(None, {"x": x(2, 2, 7).numpy()})[0], 0
        for layer in model.layers:
            part = np.s_[..., start : start + layer.out_features]
            np.testing.assert_allclose(
                actual[part], expected[part], atol=2e-5 * np.abs(expected[part]).max(), err_msg=str(layer)
            )
            start += layer.out_features


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("form", ["portable", "inlined"])
def test_codes_stay_packed(tmp_path, form, bits):
    """Small enough that constants of this size are folded, where nothing forbids it."""
    layer = LatticeLinear.from_quantized(random_codes(n=48, k=256, bits=bits, group_size=128, bias=None))
    example = {"x": torch.randn(3, 256, generator=torch.Generator().manual_seed(0))}
    report = tqcompile.export_onnx(layer, tmp_path / "m.onnx", form=form, example=example)
    assert report.layer_bytes == 48 * 256 * bits // 8 + 48 * 2 * (4 + 1)
    assert report.stored["UINT8"] == 48 * 256 * bits // 8 + 48 * 2
    assert report.stored["FLOAT"] == 48 * 2
    assert report.path.with_name("m.onnx.data").stat().st_size < report.layer_bytes + 16 * 1024
    codes = next(t for t in onnx.load(str(report.path)).graph.initializer if t.name.endswith("weight_codes"))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes), layer.weight_codes.numpy().T)


class Siblings(nn.Module):
    """q and k share everything but their rows; ``other`` has an offset of its own, ``wide`` more bits."""

    def __init__(self):
        super().__init__()
        for index, (name, n) in enumerate((("q", 24), ("k", 6), ("other", 5), ("wide", 7))):
            codes = random_codes(n=n, lattice=4, bits=3 if name == "wide" else 2, seed=index)
            if name in ("k", "wide"):
                codes.tensors["weight_offset"] = self.q.weight_offset.clone()
            self.add_module(name, LatticeLinear.from_quantized(codes))

    def forward(self, x):
        return torch.cat((self.q(x), self.k(x), self.other(x), self.wide(x)), -1)


def test_siblings_become_one_product(tmp_path):
    report = tqcompile.export_onnx(Siblings().eval(), tmp_path / "m.onnx", example={"x": x(1, 3)})
    ours = {f"{DOMAIN}::LatticeLinearW2OffsetBias": 2, f"{DOMAIN}::LatticeLinearW3OffsetBias": 1}
    assert report.ops == ours | {"ai.onnx::Split": 1, "ai.onnx::Concat": 1}
    proto = onnx.load(str(report.path), load_external_data=False)
    assert [node.name for node in proto.graph.node if node.domain == DOMAIN] == ["q+k", "other", "wide"]
    assert report.difference < 1e-6


@pytest.mark.parametrize(
    ("scheme", "form", "opset", "ops"),
    [
        ("d2-w3a16", "portable", 23, {"LatticeLinearW3Zero": 2}),
        ("d2-w2a16", "inlined", 21, {}),
        ("twin-w2a16", "portable", 21, {"LatticeLinearW2Zero": 2, "TwinLinearA16Single": 4}),
        ("unisvq-w2a16", "inlined", 23, {}),
    ],
)
def test_the_embedded_model(tmp_path, scheme, form, opset, ops):
    model = demo.load_model()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.config.layer_types = model.config.layer_types[:1]
    ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(1))
    settings = {"steps": 0, "tune": 0, "rank": 8, "backend": None, "progress": False, "ignore": SKIPPED}
    tqcompile.compile(model, ids, scheme=scheme, **settings)
    layers = [module for module in model.modules() if isinstance(module, LatticeLinear)]
    assert len(layers) == 3  # o_proj, gate_proj, up_proj
    report = tqcompile.export_onnx(model, tmp_path / "m.onnx", form=form, opset=opset, verify_steps=3)
    assert report.difference < 1e-5
    assert (report.steps, report.agreeing) == (3, report.positions)
    assert {n.removeprefix(f"{DOMAIN}::"): c for n, c in report.ops.items() if n.startswith(DOMAIN)} == ops
    assert "ai.onnx::Split" in report.ops  # gate_proj and up_proj are one product
    codes = sum(layer.weight_codes.nbytes for layer in layers)
    state = [t for layer in layers for t in layer.state_dict().values()]
    stored = sum(t.nbytes * (2 if t.dtype == torch.bfloat16 else 1) for t in state)  # scales are float32 in the file
    rotations = {id(layer.transform.rotation): layer.transform.rotation for layer in layers}.values()
    assert codes < report.layer_bytes <= stored + sum(4 * r.numel() for r in rotations if r is not None)
    proto = onnx.load(str(report.path))
    shifts = [t.name for t in proto.graph.initializer if t.name.endswith(".shift")]
    assert len(shifts) == (scheme != "unisvq-w2a16")
    feed = {"input_ids": ids[:2, :5].numpy(), "attention_mask": np.ones((2, 5), np.int64)}
    feed["position_ids"] = np.tile(np.arange(5), (2, 1))
    for value in tqcompile.ort_session(report.path).get_inputs()[3:]:
        feed[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    with torch.no_grad():
        expected = model(input_ids=ids[:2, :5]).logits.numpy()
    runs = [reference.ReferenceEvaluator(proto)]
    if form == "portable":
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        del bare.functions[:]
        runs.append(reference.ReferenceEvaluator(bare, new_ops=OPS))
    for run in runs:
        actual = run.run(["logits"], feed)[0]
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_a_wrong_zero_point_is_found(tmp_path):
    layer = LatticeLinear.from_quantized(random_codes())
    report = tqcompile.export_onnx(layer, tmp_path / "m.onnx", example={"x": x(1, 3)})
    layer.weight_zero[5, 1] ^= 2
    with pytest.raises(ExportError, match="does not reproduce LatticeLinear"):
        tqcompile.exporters.verify.verify(report, layer, example={"x": x(1, 3)})


def test_the_ort_form_refuses_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(96, 96), LatticeLinear.from_quantized(random_codes(bits=3)))
    with pytest.raises(ExportError, match=r'^1 has 3-bit codes, .* Export form="portable"'):
        tqcompile.export_onnx(model, tmp_path / "m.onnx", form="ort", example={"input": x(1, 3)})
    assert not list(tmp_path.iterdir())
