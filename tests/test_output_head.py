"""The output head as an option: what is rounded, how well; that it saves, loads, compiles, generates and exports."""

import pytest
import torch
from tiny_models import SETTINGS, assert_unchanged, logits, snapshot, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import backend
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ConfigError, NumericError
from tqcompile.modules import Int8Linear, TwinLinear
from tqcompile.ops.packing import dequantize_int4
from tqcompile.output_head import find_head, round_head

KINDS = {"w8a16": Int8Linear, "w4a16": TwinLinear}


def quantized(name="Qwen3", data=None, **changes) -> nn.Module:
    options = {k: changes.pop(k) for k in ("lm_head", "scheme", "ignore") if k in changes}
    model = tiny(name, **changes)
    return tqcompile.compile(model, tokens() if data is None else data, **{**SETTINGS, **options})


def dense(layer) -> torch.Tensor:
    """The weights that a rounded head computes with, float32."""
    if isinstance(layer, TwinLinear):
        return dequantize_int4(layer.residual.weight_packed, layer.residual.weight_scale)
    groups = layer.weight_int8.float().unflatten(1, (layer.weight_scale.shape[1], -1))
    return (groups * layer.weight_scale.float()[:, :, None]).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_rounded_and_the_embeddings_stay(kind, tied):
    plain = tiny("Qwen3", tie_word_embeddings=tied)
    model = quantized(lm_head=kind, tie_word_embeddings=tied)
    head, exact = model.lm_head, plain.lm_head.weight
    assert type(head) is KINDS[kind]
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    error = (dense(head) - exact).norm() / exact.norm()
    # 8 bits: largest of 64 normal values / 127 / sqrt(12). 4 bits: GPTQ moves weights further than to the nearest code.
    assert 0 < error < {"w8a16": 0.007, "w4a16": 0.25}[kind]
    assert model.config.tie_word_embeddings is False
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    # Everything but the head is what it is without the option.
    kept = quantized(tie_word_embeddings=tied)
    state = kept.state_dict()
    for name, tensor in model.state_dict().items():
        if "lm_head" not in name:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_has_the_head_with_its_error_on_rows_it_was_not_made_from(kind):
    model = quantized(lm_head=kind)
    report = tqcompile.report(model)
    record = report.layers[-1]
    assert (record.name, record.scheme, record.rank, record.shape) == ("lm_head", kind, 0, (97, 128))
    bits = int(kind[1])
    assert record.bits == pytest.approx(bits + 16 / SETTINGS["group_size"])
    assert 0 < record.error < {8: 0.01, 4: 0.2}[bits]
    assert "lm_head" not in report.skipped
    kept = tqcompile.report(quantized())
    assert "ignored" in kept.skipped["lm_head"]
    assert [layer.name for layer in kept.layers] == [layer.name for layer in report.layers[:-1]]


def test_eight_bits_are_much_closer_than_four():
    eight, four = (tqcompile.report(quantized(lm_head=kind)).layers[-1].error for kind in ("w8a16", "w4a16"))
    assert eight < four / 10


def test_calibration_makes_four_bits_better_where_it_matters():
    """GPTQ has less output error than rounding to nearest, on inputs of the kind it was made for."""
    torch.manual_seed(0)
    head = nn.Linear(128, 200, bias=False)
    mix = torch.randn(128, 128) * torch.logspace(0, -2, 128)
    x = torch.randn(4000, 128) @ mix

    from tqcompile.methods.statistics import StatisticsCollector

    collector = StatisticsCollector(128, "cpu", 2, 1)
    collector.add(x[:3000], held_out=False)
    collector.add(x[3000:], held_out=True)
    exact = x[3000:] @ head.weight.T
    errors = [(x[3000:] @ dense(round_head(head, 4, 64, seen)).T - exact).norm() for seen in (None, collector.finish())]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_the_head_is_rounded_to_nearest(kind):
    model = tiny("Llama")
    weight = model.lm_head.weight.detach().clone()
    tqcompile.compile(model, lm_head=kind, **SETTINGS)
    record = tqcompile.report(model).layers[-1]
    assert (record.name, record.error) == ("lm_head", None)
    step = (model.lm_head.weight_scale if kind == "w8a16" else model.lm_head.residual.weight_scale).float()
    off = (dense(model.lm_head) - weight).unflatten(1, (step.shape[1], -1)).abs()
    half = off <= 0.5001 * step[:, :, None]
    assert half.all() if kind == "w8a16" else half.float().mean() > 0.95  # 4 bits may clip the largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_bit_equal(kind, tied, tmp_path):
    model = quantized(lm_head=kind, tie_word_embeddings=tied)
    tqcompile.save(model, tmp_path / "m")
    again = tqcompile.load(tmp_path / "m")
    assert type(again.lm_head) is KINDS[kind]
    assert torch.equal(logits(again), logits(model))
    assert set(again.state_dict()) == set(model.state_dict())
    assert tqcompile.report(again).layers[-1].scheme == kind
    filled = tqcompile.load(tmp_path / "m", model=tiny("Qwen3", seed=5, tie_word_embeddings=tied))
    assert torch.equal(logits(filled), logits(model))
    tqcompile.save(again, tmp_path / "n")
    assert torch.equal(logits(tqcompile.load(tmp_path / "n")), logits(model))


def test_an_impossible_description_is_refused(tmp_path):
    import json

    tqcompile.save(quantized(lm_head="w8a16"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"]["modules"]["lm_head"]["rank"] = 16
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="lm_head: impossible layer description"):
        tqcompile.load(tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_generating_it_is_what_it_is_eagerly(kind):
    model = quantized(lm_head=kind, tie_word_embeddings=True)
    ids = tokens(2, 7, seed=3)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    reference = logits(model, ids)
    torch._dynamo.reset()
    backend.reports.clear()
    model.compile(backend="twinquant", dynamic=True, options={"quantize": False, "inner": "eager"})
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert ("logits" in backend.reports[-1].lowered) == (kind == "w8a16")  # the node of int8_linear


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_keeps_its_dtype(kind):
    model = quantized(lm_head=kind)
    scale = (model.lm_head.weight_scale if kind == "w8a16" else model.lm_head.residual.weight_scale).clone()
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    kept = model.lm_head.weight_scale if kind == "w8a16" else model.lm_head.residual.weight_scale
    assert torch.equal(kept, scale)


def test_a_model_without_a_head_and_other_mistakes_are_named():
    with pytest.raises(ConfigError, match="lm_head must be one of keep, w8a16, w4a16, got 'int8'"):
        Config(lm_head="int8")
    with pytest.raises(ConfigError, match=r"Sequential has no output head.*use 'keep'"):
        tqcompile.compile(nn.Sequential(nn.Linear(128, 128)), lm_head="w8a16", **SETTINGS)
    with pytest.raises(ConfigError, match="attach_recipe leaves the model as it is"):
        tqcompile.attach_recipe(tiny("Llama"), lm_head="w8a16", progress=False)
    with pytest.raises(Exception, match=r"lm_head is a setting of tqcompile\.compile"):
        torch.compile(tiny("Llama"), backend="twinquant", options={"lm_head": "w8a16"})(tokens(1, 4))
    assert find_head(tiny("Llama")) == "lm_head"


def test_a_damaged_head_is_named_and_the_model_is_left_as_it_was(monkeypatch):
    from tqcompile import output_head

    def fail(*_):
        raise NumericError("the output head's weight: broken")

    model = tiny("Qwen3", tie_word_embeddings=True)
    before, settings = snapshot(model), model.config.to_dict()
    monkeypatch.setattr(output_head, "output_error", fail)
    with pytest.raises(NumericError, match="output head"):
        tqcompile.compile(model, tokens(), lm_head="w4a16", **SETTINGS)
    assert_unchanged(model, before)
    monkeypatch.undo()
    journal = output_head.Journal(model)
    output_head.declare_untied(model, "lm_head.weight", journal)
    assert model.config.tie_word_embeddings is False
    journal.restore()
    assert model.config.to_dict() == settings
    assert "lm_head.weight" in model.all_tied_weights_keys


def test_with_lm_head_not_ignored_it_is_still_rounded_as_asked():
    model = quantized(ignore=(), lm_head="w8a16")
    assert type(model.lm_head) is Int8Linear
    model = quantized(ignore=())
    assert type(model.lm_head) is TwinLinear
    assert model.lm_head.spec.rank == SETTINGS["rank"]


def test_a_quantized_head_counts_as_quantized():
    from tqcompile.errors import ModelError

    model = nn.Sequential(nn.Linear(64, 64), round_head(nn.Linear(64, 32), 8, 32, None))
    with pytest.raises(ModelError, match="already quantized"):
        tqcompile.compile(model, torch.randn(4, 64), **SETTINGS)


@pytest.mark.parametrize(("kind", "op"), [("w8a16", "Int8Linear"), ("w4a16", "TwinLinearA16Single")])
def test_export_has_the_head_as_one_op_and_reproduces_the_model(kind, op, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    found = tqcompile.export_onnx(quantized(lm_head=kind, tie_word_embeddings=True), tmp_path / "m.onnx")
    assert found.ops[f"com.tqcompile::{op}"] == 1
    assert found.difference < 1e-5
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node if node.name == "lm_head"] == [op]
    weight = next(t for t in graph.initializer if t.name.startswith("lm_head.") and t.name.endswith(("int8", "packed")))
    assert weight.data_type == (onnx.TensorProto.INT8 if kind == "w8a16" else onnx.TensorProto.INT4)
    assert list(weight.dims) == [128, 97]


@pytest.mark.parametrize("bias", [False, True])
def test_the_exported_op_means_what_the_layer_does(bias, tmp_path):
    """Small enough to run in the reference evaluator too, which shares no code with ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    head = nn.Linear(64, 40, bias=bias)
    model = nn.Sequential(round_head(head, 8, 32, None)).eval()
    x = torch.randn(3, 64)
    tqcompile.export_onnx(model, tmp_path / "m.onnx", example={"input": x})
    (y,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)
