"""ONNX export: what is in the file, that stock ONNX Runtime reproduces the model, and how failures end."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_components import random_components
from torch import nn
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

import tqcompile
from tqcompile.errors import ExportError
from tqcompile.exporters import portable
from tqcompile.exporters.session import open_session
from tqcompile.exporters.verify import verify
from tqcompile.modules import TwinLinear

onnx = pytest.importorskip("onnx")
inliner = pytest.importorskip("onnx.inliner")
reference = pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}
# Four sites in each of two layers; the rotation of o_proj's input is absorbed by v_proj.
_ACTIVATIONS = {"com.tqcompile::QuantizeActivationRotated": 6, "com.tqcompile::QuantizeActivation": 2}
OPS = {
    "twin-w4a16": {"com.tqcompile::TwinLinearA16": 8},
    "twin-w4a8": {"com.tqcompile::TwinLinear": 8, **_ACTIVATIONS},
    "twin-w4a4": {"com.tqcompile::TwinLinearA4": 8, **_ACTIVATIONS},
}
BESIDE = ["config.json", "generation_config.json"]


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**SIZES)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)).eval()


def quantized(kind: str, scheme: str) -> nn.Module:
    rows = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"rank": 16, "group_size": 64, "steps": 3, "tune": 2, "backend": None, "progress": False}
    return tqcompile.compile(tiny(kind), rows, scheme=scheme, **settings)


@pytest.fixture(scope="module", params=list(OPS))
def qwen(request, tmp_path_factory):
    """(scheme, model, verification) of an exported decoder."""
    model = quantized("qwen", request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    return request.param, model, tqcompile.export_onnx(model, path)


class EveryForm(nn.Module):
    """One layer of every form side by side; x (b, 64) -> (b, 24 * forms)."""

    def __init__(self):
        super().__init__()
        forms = [
            {"act_bits": bits, "rank": rank, "bias": bias}
            for bits in (16, 8, 4)
            for rank, bias in ((8, torch.float32), (8, None), (0, None))
        ]
        forms += [{"act_bits": 8, "block": 0}, {"act_bits": 8, "scaled": False}, {"act_bits": 4, "low_rank_bits": 16}]
        forms += [{"act_bits": 16, "low_rank_bits": 16}, {"act_bits": 8, "block": 0, "scaled": False}]
        forms += [{"act_bits": 8, "bias": torch.bfloat16}]
        layers = [random_components(seed=seed, **form) for seed, form in enumerate(forms)]
        self.layers = nn.ModuleList(TwinLinear.from_quantized(layer) for layer in layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def every_form(tmp_path_factory):
    model = EveryForm().eval()
    report = tqcompile.export_onnx(model, tmp_path_factory.mktemp("forms") / "forms.onnx", example={"x": X})
    return model, report


def feeds(past: int, ids: torch.Tensor, cache: dict | None = None) -> dict[str, np.ndarray]:
    b, s = ids.shape
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((b, past + s), np.int64)}
    feed["position_ids"] = np.tile(np.arange(past, past + s), (b, 1))
    names = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    empty = np.zeros((b, 2, 0, 32), np.float32)
    return feed | {n: cache[n.replace("past_key_values", "present")] if cache else empty for n in names}


def run(runtime, feed) -> dict[str, np.ndarray]:
    names = [value.name for value in runtime.get_outputs()]
    return dict(zip(names, runtime.run(None, feed), strict=True))


def prompt(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(5))


def test_the_decoder_is_verified_with_its_cache(qwen):
    scheme, _, report = qwen
    assert report.difference < 1e-5  # measured 6e-7 to 2e-6
    assert report.tipped < 1e-3
    assert report.provider == "CPUExecutionProvider"
    assert report.ran.keys() == {"CPUExecutionProvider"}
    assert report.steps == 32
    assert report.positions == 2 * 11 - 2 + 2 * 32
    ours = {name: count for name, count in report.ops.items() if name.startswith("com.tqcompile")}
    assert ours == OPS[scheme]


def test_weights_are_int4_and_the_file_is_near_four_bits(qwen):
    _, model, report = qwen
    layers = [m for m in model.modules() if isinstance(m, TwinLinear)]
    residuals = sum(m.in_features * m.out_features for m in layers)
    low_rank = sum(16 * m.out_features for m in layers) + 2 * 16 * (3 * 128 + 256)  # up a layer, down a site
    assert report.stored["INT4"] == residuals + low_rank
    dense = 2 * 256 * 128  # embedding and head
    scales = report.stored["FLOAT"] - dense - 128 * 128
    assert scales < residuals / 16
    data = report.path.with_name("model.onnx.data").stat().st_size
    assert data < report.stored["INT4"] / 2 + 4 * (dense + scales + 128 * 128) + 64 * 1024
    assert data < 0.5 * 4 * (residuals + dense)


def test_layout_is_k_major_and_exact(qwen):
    _, model, report = qwen
    proto = onnx.load(str(report.path))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    node = next(node for node in proto.graph.node if node.name == name)
    given = dict(zip(next(f.input for f in proto.functions if f.name == node.op_type), node.input, strict=True))
    weight, scale = tensors[given["residual"]], tensors[given["residual_scale"]]
    assert weight.data_type == onnx.TensorProto.INT4
    assert list(weight.dims) == [256, 128]
    assert list(scale.dims) == [4, 128]
    values = onnx.numpy_helper.to_array(weight).astype(np.float32)
    dense = values * onnx.numpy_helper.to_array(scale).repeat(64, 0)
    expected = tqcompile.ops.packing.dequantize_int4(layer.residual.weight_packed, layer.residual.weight_scale)
    np.testing.assert_array_equal(dense.T, expected.numpy())


def test_the_file_names_its_inputs_and_tells_nothing_about_this_machine(qwen):
    _, _, report = qwen
    proto = onnx.load(str(report.path), load_external_data=False)
    past = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [i.name for i in proto.graph.input] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [o.name for o in proto.graph.output] == ["logits", *(n.replace("past_key_values", "present") for n in past)]
    assert all(dim.dim_param for value in proto.graph.input[:3] for dim in value.type.tensor_type.shape.dim)
    assert proto.producer_name == "tqcompile"
    assert b".py" not in report.path.read_bytes()
    assert sorted(p.name for p in report.path.parent.iterdir()) == [*BESIDE, "model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("optimize", [False, True])
def test_logits_equal_torch_with_and_without_optimisation(qwen, optimize):
    scheme, model, report = qwen
    logits = run(tqcompile.ort_session(report.path, optimize=optimize), feeds(0, prompt()))["logits"]
    with torch.no_grad():
        expected = model(input_ids=prompt()).logits.numpy()
    relative = np.abs(logits - expected).max(-1) / np.abs(expected).max()
    assert np.median(relative) < 1e-5
    # a value that float32 noise tips to the next step may show at a few positions (see exporters/verify.py)
    assert relative.max() < {"twin-w4a16": 1e-5, "twin-w4a8": 2e-2, "twin-w4a4": 5e-2}[scheme]


def test_cached_decoding_equals_one_prefill(qwen):
    scheme, _, report = qwen
    if scheme != "twin-w4a16":
        pytest.skip("rounded activations may tip; the verification replays them")
    runtime, ids = tqcompile.ort_session(report.path), prompt(3, 12)
    whole = run(runtime, feeds(0, ids))
    out = run(runtime, feeds(0, ids[:, :7]))
    rows = [out["logits"]]
    for position in range(7, 12):
        out = run(runtime, feeds(position, ids[:, position : position + 1], out))
        rows.append(out["logits"])
    np.testing.assert_allclose(np.concatenate(rows, 1), whole["logits"], atol=1e-5)
    np.testing.assert_allclose(out["present.1.key"], whole["present.1.key"], atol=1e-5)


def test_onnx_runtime_fuses_every_product(qwen, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(qwen[2].path), options, providers=["CPUExecutionProvider"])
    nodes = [n.op_type for n in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
    assert nodes.count("MatMulNBits") == 3 * 8
    assert nodes.count("DequantizeLinear") == 0


def test_verify_notices_a_change_of_one_per_cent_in_one_layer(qwen):
    _, model, report = qwen
    scale = model.model.layers[0].mlp.up_proj.residual.weight_scale
    before = scale.clone()
    try:
        scale.mul_(1.01)
        with pytest.raises(ExportError, match=r"does not (reproduce|quantize)"):
            verify(report, model)
    finally:
        scale.copy_(before)
    assert verify(report, model).difference == report.difference


def test_an_encoder_gives_its_last_hidden_state(tmp_path):
    model = quantized("bert", "twin-w4a8").train()
    report = tqcompile.export_onnx(model, tmp_path / "bert.onnx")
    assert model.training
    assert report.difference < 1e-5
    runtime = tqcompile.ort_session(report.path, optimize=False)
    assert [i.name for i in runtime.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [o.name for o in runtime.get_outputs()] == ["last_hidden_state"]
    assert report.ops["com.tqcompile::TwinLinearBias"] == 8
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    feed = {"input_ids": prompt(3, 7), "attention_mask": mask, "token_type_ids": prompt(3, 7) % 2}
    actual = runtime.run(None, {name: tensor.numpy() for name, tensor in feed.items()})[0]
    with torch.no_grad():
        expected = model.eval()(**feed).last_hidden_state.numpy()
    assert np.median(np.abs(actual - expected).max(-1)) < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("how", ["optimized", "as written", "reference", "inlined"])
def test_every_form_everywhere(every_form, how):
    model, report = every_form
    if how == "reference":
        runtime = reference.ReferenceEvaluator(onnx.load(str(report.path)))
    elif how == "inlined":
        proto = inliner.inline_local_functions(onnx.load(str(report.path)))
        assert not proto.functions
        assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
        runtime = open_session(proto.SerializeToString(), "inlined")
    else:
        runtime = tqcompile.ort_session(report.path, optimize=how == "optimized")
    actual = runtime.run(None, {"x": X[:3].numpy()})[0]
    expected = model(X[:3]).detach().numpy()
    for index in range(len(model.layers)):
        part = slice(24 * index, 24 * index + 24)
        np.testing.assert_allclose(actual[:, part], expected[:, part], atol=1e-5, err_msg=str(model.layers[index]))


def test_forms_have_distinct_names(every_form):
    names = {name.removeprefix("com.tqcompile::") for name in every_form[1].ops if name.startswith("com")}
    twins = {f"TwinLinear{act}{rest}" for act in ("A16", "", "A4") for rest in ("Bias", "", "Single")}
    quantizers = {f"QuantizeActivation{rest}" for rest in ("", "Scaled", "Rotated", "ScaledRotated")}
    # dense low-rank factors leave the residual to our op
    assert names == twins | quantizers | {"TwinLinearA4SingleBias", "TwinLinearA16SingleBias"}
    assert not any(onnx.defs.has(name, "com.tqcompile") for name in ("TwinLinear", "QuantizeActivation"))


def test_a_failing_verification_leaves_the_old_files(tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "transposed", lambda scale: np.ascontiguousarray(scale.astype(np.float32).T * 1.01))
    target, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    target.write_bytes(b"good model")
    data.write_bytes(b"good data")
    model = TwinLinear.from_quantized(random_components(act_bits=8))
    with pytest.raises(ExportError, match=r"does not reproduce TwinLinear: its output differs by 0\.00\d+"):
        tqcompile.export_onnx(model, target, example={"x": X}, overwrite=True)
    assert (target.read_bytes(), data.read_bytes()) == (b"good model", b"good data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failing_move_puts_every_file_back(tmp_path, monkeypatch, failing):
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"good")
    model = TwinLinear.from_quantized(random_components(act_bits=16))
    original, calls = os.replace, []

    def replace(source, destination):
        calls.extend(path for path in (source, destination) if Path(path).parent == tmp_path)
        if len(calls) == failing:
            raise OSError("disk says no")
        original(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match=r"cannot move the exported model to .*disk says no"):
        tqcompile.export_onnx(model, tmp_path / "model.onnx", example={"x": X}, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"model.onnx": b"good", "model.onnx.data": b"good"}


def test_refusals_say_what_to_do(tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    layer = TwinLinear.from_quantized(random_components(act_bits=8))
    with pytest.raises(ExportError, match=r"Linear has no quantized layer. Call tqcompile.compile"):
        tqcompile.export_onnx(nn.Linear(8, 8), target)
    mixed = nn.Sequential(layer, nn.LayerNorm(24)).bfloat16()
    with pytest.raises(ExportError, match=r"1.weight is bfloat16; only float32 .* model.float\(\)"):
        tqcompile.export_onnx(mixed, target)
    mixed.float()
    with pytest.raises(ExportError, match="opset 20 is not supported; choose 21"):
        tqcompile.export_onnx(layer, target, opset=20)
    with pytest.raises(ExportError, match=r"expected a name ending in \.onnx"):
        tqcompile.export_onnx(layer, tmp_path / "model.bin")
    with pytest.raises(ExportError, match=r"no config.vocab_size: pass example"):
        tqcompile.export_onnx(layer, target)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"needs onnxruntime, .* pip install 'tqcompile\[onnx\]'"):
        tqcompile.export_onnx(layer, target, example={"x": X})
    assert not list(tmp_path.iterdir())
