"""The inlined and ort forms, opset 23, the session and generate, the command, and what lies beside the file."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from random_components import random_components
from test_benchmarks import script
from tiny_models import SETTINGS, tiny, tokens
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import tqcompile
from tqcompile import demo
from tqcompile.cli import app, main
from tqcompile.errors import ExportError
from tqcompile.exporters.session import generate, open_session
from tqcompile.modules import TwinLinear
from tqcompile.output_head import round_head

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def quantized(scheme: str, **changes) -> nn.Module:
    settings = {**SETTINGS, "scheme": scheme, "steps": 0, **changes}
    return tqcompile.compile(tiny("Qwen3", num_hidden_layers=1), tokens(), **settings)


@pytest.fixture(scope="module")
def a16():
    return quantized("twin-w4a16")


@pytest.fixture(scope="module")
def checkpoint(a16, tmp_path_factory):
    """A saved model with the embedded model's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tqcompile.save(a16, folder)
    demo.load_tokenizer().save_pretrained(folder)
    return folder


class Forms(nn.Module):
    """Layers whose groups and ranks are sizes that MatMulNBits has, and sizes that it lacks; x (..., 96)."""

    def __init__(self):
        super().__init__()
        forms = [
            {"act_bits": bits, "rank": rank, "group_size": group}
            for bits in (16, 8, 4)
            for rank, group in ((8, 32), (0, 96), (40, 96))
        ]
        forms += [{"act_bits": 8, "block": 0, "bias": None}, {"act_bits": 16, "low_rank_bits": 16}]
        layers = [random_components(k=96, seed=seed, **form) for seed, form in enumerate(forms)]
        self.layers = nn.ModuleList(TwinLinear.from_quantized(layer) for layer in layers)
        torch.manual_seed(0)
        self.layers.append(round_head(nn.Linear(96, 24), 8, 96, None))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def x(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 96, generator=torch.Generator().manual_seed(seed))


def test_inlined_is_standard_operators_and_runs_everywhere(tmp_path):
    model = Forms().eval()
    report = tqcompile.export_onnx(model, tmp_path / "m.onnx", form="inlined", example={"x": x(1, 3, 5)})
    proto = onnx.load(str(report.path))
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    assert {entry.key: entry.value for entry in proto.metadata_props}["tqcompile.form"] == "inlined"
    expected = model(x(2, 2, 7)).numpy()
    for run in (
        tqcompile.ort_session(report.path),
        tqcompile.ort_session(report.path, optimize=False),
        reference.ReferenceEvaluator(proto),
    ):
        np.testing.assert_allclose(run.run(None, {"x": x(2, 2, 7).numpy()})[0], expected, atol=2e-5)


def test_ort_form_uses_4_bit_products_at_the_documented_level(tmp_path):
    model = Forms().eval()
    report = tqcompile.export_onnx(model, tmp_path / "m.onnx", form="ort", example={"x": x(1, 3, 5)})
    assert report.difference < 1e-5
    proto = onnx.load(str(report.path), load_external_data=False)
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {"", "com.microsoft"}
    products = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    levels = {}
    for node in products:
        source = next(entry.value for entry in node.metadata_props if entry.key == "tqcompile.source")
        levels.setdefault(source, set()).add(next(a.i for a in node.attribute if a.name == "accuracy_level"))
    float_activations = [isinstance(layer, TwinLinear) and layer.spec.act_bits == 16 for layer in model.layers]
    assert levels == {f"layers.{i}": {1 if exact else 4} for i, exact in enumerate(float_activations)}
    expected = model(x(2, 2, 7)).numpy()
    for optimize in (True, False):
        actual = tqcompile.ort_session(report.path, optimize=optimize).run(None, {"x": x(2, 2, 7).numpy()})[0]
        for layer, exact, ours, theirs in zip(model.layers, float_activations, actual, expected, strict=True):
            error = np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean())
            assert error < (1e-6 if exact else 0.02), layer


@pytest.mark.parametrize("form", ["portable", "ort"])
def test_a_wrong_weight_is_found_in_every_form(tmp_path, form):
    layer = TwinLinear.from_quantized(random_components(k=96, act_bits=8))
    report = tqcompile.export_onnx(layer, tmp_path / "m.onnx", form=form, example={"x": x(1, 3, 5)})
    layer.up.weight_scale.mul_(1.02)
    with pytest.raises(ExportError, match="does not reproduce TwinLinear"):
        tqcompile.exporters.verify.verify(report, layer, example={"x": x(1, 3, 5)})


@pytest.mark.parametrize(("form", "opset"), [("portable", 23), ("inlined", 23), ("ort", 21)])
def test_forms_of_a_decoder(a16, tmp_path, form, opset):
    report = tqcompile.export_onnx(a16, tmp_path / "m.onnx", form=form, opset=opset, verify_steps=4)
    assert report.difference < 1e-5
    assert report.agreeing == report.positions
    proto = onnx.load(str(report.path), load_external_data=False)
    assert next(entry.version for entry in proto.opset_import if entry.domain == "") == opset
    assert ("ai.onnx::Attention" in report.ops) == (opset == 23)
    assert all([entry.key for entry in node.metadata_props] == ["tqcompile.source"] for node in proto.graph.node)
    sources = {entry.value for node in proto.graph.node for entry in node.metadata_props}
    assert "model.layers.0.mlp.gate_proj,model.layers.0.mlp.up_proj" in sources
    assert {"model.embed_tokens", "model.layers.0.self_attn.q_norm", "lm_head"} <= sources
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["tqcompile.scheme"] == "twin-w4a16"
    assert facts["torch.version"] == torch.__version__
    if opset == 23:
        return
    ids = tokens(2, 6, seed=3)
    with torch.no_grad():
        expected = a16.generate(ids, max_new_tokens=9, do_sample=False)
    actual = generate(tqcompile.ort_session(report.path), ids.numpy(), 9)
    np.testing.assert_array_equal(actual, expected.numpy())
    eos = int(actual[0, 8])
    short = generate(tqcompile.ort_session(report.path), ids[:1].numpy(), 9, eos_token_id=eos)
    np.testing.assert_array_equal(short, actual[:1, : short.shape[1]])
    assert short[0, -1] == eos
    assert short.shape[1] <= 9


def test_the_command_exports_and_copies_what_belongs_beside(checkpoint, tmp_path):
    out = tmp_path / "m.onnx"
    done = CliRunner().invoke(app, ["export", str(checkpoint), "--onnx", str(out), "--no-past"])
    assert done.exit_code == 0, done.output
    assert "same most probable token at" in done.output
    assert "not quantized: lm_head: ignored by 'lm_head'" in done.output
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 128
    text = "def f(x):\n    return x"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == demo.load_tokenizer()(text)
    session = tqcompile.ort_session(out)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    with pytest.raises(ExportError, match="needs a decoder exported with with_past=True"):
        generate(session, tokens(1, 4).numpy())


def test_the_command_refuses_before_it_reads_a_model(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "m.onnx").write_bytes(b"good")
    monkeypatch.setattr(tqcompile.checkpoint, "load", lambda *_, **__: pytest.fail("the model was read"))
    for arguments, message in (
        ([tmp_path / "m.onnx"], r"m.onnx exists. Choose another name, or pass overwrite=True (--overwrite)"),
        ([tmp_path / "no" / "m.onnx"], "in a directory that exists"),
        ([tmp_path / "n.onnx", "--form", "fast"], "unknown form 'fast'; choose one of portable, ort, inlined"),
        ([tmp_path / "n.onnx", "--opset", "19"], "opset 19 is not supported"),
    ):
        monkeypatch.setattr("sys.argv", ["tqcompile", "export", str(checkpoint), "--onnx", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_what_lies_beside_is_never_replaced_unasked(a16, checkpoint, tmp_path):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"holds a checkpoint whose config.json would be replaced"):
            tqcompile.export_onnx(a16, checkpoint / "m.onnx", overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config.json exists and differs .* overwrite=True"):
        tqcompile.export_onnx(a16, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"no tokenizer could be read from .*tokenizer=None"):
        tqcompile.export_onnx(a16, tmp_path / "m.onnx", tokenizer=tmp_path)
    with pytest.raises(ExportError, match="got int: it has no save_pretrained"):
        tqcompile.export_onnx(a16, tmp_path / "m.onnx", tokenizer=3)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_bad_settings_leave_nothing(tmp_path):
    layer, example = TwinLinear.from_quantized(random_components(k=96)), {"x": x(1, 2)}
    for dtype in ("bfloat16", torch.bfloat16):
        with pytest.raises(ExportError, match=r"dtype bfloat16 cannot be exported: .*Use dtype='float32'"):
            tqcompile.export_onnx(layer, tmp_path / "m.onnx", dtype=dtype, example=example)
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(ExportError, match="it is a directory"):
        tqcompile.export_onnx(layer, tmp_path / "d.onnx", example=example)
    (tmp_path / "m.onnx.data").write_bytes(b"other weights")
    with pytest.raises(ExportError, match=r"m.onnx.data exists"):
        tqcompile.export_onnx(layer, tmp_path / "m.onnx", example=example)
    (tmp_path / "m.onnx.data").unlink()
    (tmp_path / "d.onnx").rmdir()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    layer = TwinLinear.from_quantized(random_components(k=96))
    with pytest.raises(ExportError, match=r"cannot write to .*Permission denied.* Choose a folder"):
        tqcompile.export_onnx(layer, tmp_path / "m.onnx", example={"x": x(1, 2)})


def test_skipped_layers_are_reported_with_the_reason(tmp_path):
    model = quantized("rtn-w4a16", ignore=["lm_head", "layers.0.mlp.down_proj"])
    report = tqcompile.export_onnx(model, tmp_path / "m.onnx", with_past=False)
    assert report.skipped["model.layers.0.mlp.down_proj"] == "ignored by 'layers.0.mlp.down_proj'"
    assert "not quantized: model.layers.0.mlp.down_proj: ignored by" in str(report)
    assert report.steps == 0


def test_sessions_refuse_what_would_go_wrong_quietly(tmp_path):
    with pytest.raises(ExportError, match=r"absent.onnx is not a file. Export a model there first"):
        tqcompile.ort_session(tmp_path / "absent.onnx")
    layer = TwinLinear.from_quantized(random_components(k=96, n=64))
    path = tqcompile.export_onnx(layer, tmp_path / "m.onnx", example={"x": x(1, 2)}).path
    with pytest.raises(ExportError, match=r"CUDAExecutionProvider does not run here"):
        open_session(str(path), "m.onnx", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    path.with_name("m.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"cannot load m.onnx: .* Is its .data file beside it\?"):
        tqcompile.ort_session(path)


def test_layers_of_usual_size_take_less_than_a_third_of_fp16(tmp_path):
    layer = TwinLinear.from_quantized(
        random_components(n=1024, k=768, rank=32, group_size=128, act_bits=16, block=128, bias=None)
    )
    example = {"x": torch.randn(2, 768, generator=torch.Generator().manual_seed(0))}
    for form in ("portable", "inlined", "ort"):
        report = tqcompile.export_onnx(layer, tmp_path / f"{form}.onnx", form=form, example=example)
        assert report.fp16_bytes == 2 * 1024 * 768
        weights = 1024 * 768 // 2 + 4 * 1024 * 6 + 32 * 768 // 2 + 4 * 32 * 6 + 32 * 1024 // 2 + 4 * 1024
        assert report.layer_bytes == weights + 4 * 128 * 128 + 4 * 768
        assert weights < 0.32 * report.fp16_bytes
        assert report.path.with_name(f"{form}.onnx.data").stat().st_size < report.layer_bytes + 64 * 1024


def test_weights_are_converted_one_at_a_time(tmp_path, monkeypatch):
    """The layouts that the file needs never stand in memory beside the model's, except for one layer's."""
    model = nn.Sequential(*(random_linear(seed) for seed in range(24)))
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    peaks = []
    original = tqcompile.exporters.onnx._save

    def measured(program, draft):
        tracemalloc.start()
        original(program, draft)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    monkeypatch.setattr(tqcompile.exporters.onnx, "_save", measured)
    tqcompile.export_onnx(model, tmp_path / "m.onnx", example={"input": torch.randn(2, 512)})
    assert peaks[0] < weights / 2


def random_linear(seed: int) -> TwinLinear:
    return TwinLinear.from_quantized(random_components(n=512, k=512, seed=seed, block=0, scaled=False))


def test_the_benchmark_times_only_what_is_right(tmp_path, capsys):
    model = demo.load_model()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(tmp_path)
    demo.load_tokenizer().save_pretrained(tmp_path)
    quick = [
        "--windows=1",
        "--rounds=1",
        "--decode=3",
        "--prompt=8",
        "--schemes=rtn-w4a8",
        "--forms=ort",
        "--threads=1",
    ]
    benchmark = script("onnx_cpu")
    rows = benchmark.main([str(tmp_path), *quick])["rows"]
    assert set(rows) == {"fp32", "rtn-w4a8 ort"}
    for row in rows.values():
        assert row["ms_per_token"] > 0
        assert abs(row["perplexity"] / row["torch_perplexity"] - 1) < 0.005
    assert rows["rtn-w4a8 ort"]["megabytes"] < rows["fp32"]["megabytes"]
    with pytest.raises(SystemExit, match=r"a: perplexity 10.06\d*, but torch's is 10.0*: nothing is timed"):
        benchmark.gate("a", 10.06, 10.0)
    with pytest.raises(SystemExit, match="nothing is timed"):
        benchmark.gate("a", float("nan"), 10.0)


def test_the_memory_benchmark_runs(tmp_path, capsys):
    quick = ["--small", "--layers=1", "--vocabulary=100", f"--folder={tmp_path}", f"--json={tmp_path / 'memory.json'}"]
    result = script("onnx_memory").main(quick)
    assert list(result["stages"]) == ["start", "model", "trace", "_save", "verify"]
    peaks = [stage["peak"] for stage in result["stages"].values()]
    assert peaks == sorted(peaks)
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    assert "peak" in capsys.readouterr().out
