"""The commands: on the embedded model with tiny settings, and every refusal before anything is read or written."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from typer.testing import CliRunner

import tqcompile
from tqcompile import demo
from tqcompile.cli import app
from tqcompile.commands import files, memory
from tqcompile.commands import info as info_command
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ConfigError, ModelError, TQError
from tqcompile.modules import TwinLinear

ROOT = Path(__file__).parents[1]
# Two of 42 layers are quantized: enough to see every part of the command work.
QUICK = ["--ignore", r"re:model\.layers\.[1-5]\..*", "--ignore", "mlp", "--steps", "1", "--tune", "0"]
QUICK += ["--samples", "4", "--seq-len", "32"]


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    output = run(
        "quantize", demo.MODEL_DIR, "--calib", "stdlib", "--out", folder / "q", *QUICK, "--json", folder / "q.json"
    )
    return folder / "q", output, json.loads((folder / "q.json").read_text())


def test_quantize_writes_a_checkpoint_with_report_and_tokenizer(checkpoint):
    directory, output, result = checkpoint
    model = tqcompile.load(directory)
    names = [name for name, module in model.named_modules() if isinstance(module, TwinLinear)]
    assert names == [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"]
    assert result["report"] == json.loads(json.dumps(tqcompile.report(model).to_dict()))
    assert result["report"]["config"]["ignore"][0] == "lm_head"
    assert [layer["name"] for layer in result["report"]["layers"]] == names
    assert files.load_tokenizer(directory)("def f(x):")["input_ids"] == demo.load_tokenizer()("def f(x):")["input_ids"]
    assert "4 layers quantized" in output
    assert "memory, estimated:" in output
    assert str(directory) in output
    assert any("peak memory of the process" in note for note in result["report"]["notes"])
    # The estimate was made for more than is needed here, and not for ten times as much.
    assert result["peak_bytes"] / 10 < result["estimated_bytes"]
    assert sorted(path.name for path in directory.parent.iterdir()) == ["q", "q.json"]


def test_the_command_is_the_call_from_python(checkpoint):
    directory, _, _ = checkpoint
    model, texts = files.load_model(demo.MODEL_DIR), demo.calibration_texts(4 * 32 * 8)
    ignore = ("lm_head", QUICK[1], "mlp")
    settings = {"ignore": ignore, "steps": 1, "tune": 0, "samples": 4, "seq_len": 32}
    tqcompile.compile(model, texts, tokenizer=demo.load_tokenizer(), backend=None, progress=False, **settings)
    loaded = tqcompile.load(directory).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_eval_of_the_held_out_modules_and_of_a_text(checkpoint, tmp_path):
    directory, _, _ = checkpoint
    output = run("eval", directory, "--windows", 2, "--seq-len", 64, "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    ids = demo.held_out_windows(demo.load_tokenizer(), 2, 64)
    with torch.no_grad():
        scores = tqcompile.load(directory)(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    expected = math.exp(-scores.gather(-1, ids[:, 1:, None]).mean().item())
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (result["windows"], result["seq_len"], result["quantized"]) == (2, 64, True)
    assert f"perplexity {expected:.4f}" in output
    text = tmp_path / "text.txt"
    text.write_text((Path(torch.__file__).parent / "_utils.py").read_text())
    run("eval", demo.MODEL_DIR, "--text", text, "--windows", 3, "--seq-len", 32, "--json", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["quantized"] is False
    assert result["windows"] == 3
    assert 1 < result["perplexity"] < 1000


def test_report_reads_no_weights(checkpoint, tmp_path):
    directory, _, result = checkpoint
    shutil.copytree(directory, tmp_path / "q")
    (tmp_path / "q" / "model.safetensors").unlink()
    output = run("report", tmp_path / "q", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    found = json.loads((tmp_path / "r.json").read_text())
    ranking = found.pop("sensitivity")
    assert found == result["report"]
    assert {entry["name"] for entry in ranking} == {layer["name"] for layer in found["layers"]}
    assert "leave these at more bits first" in output
    assert (tmp_path / "r.csv").read_text().startswith("name,shape,")


def test_info_tells_what_runs_and_why_not(tmp_path):
    output = run("info", "--json", tmp_path / "i.json")
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["torch"] == torch.__version__
    assert set(info_command.kernels()) >= {"quantize_activation", "twin_linear", "prologue", "twin_gemm", "int8_linear"}
    assert set(found["kernels"]) == set(info_command.kernels())
    if torch.cuda.is_available():
        assert found["gpus"][0]["name"] == torch.cuda.get_device_name()
    else:
        assert found["gpus"] == []
        assert found["gpu_reason"] in output
        assert all(found["kernels"].values())


def test_info_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript cannot be imported" in info_command.collect()["extras"]["onnx"]
    monkeypatch.setattr("tqcompile.ops.dispatch._load", lambda op: (None, f"no Triton for {op}"))
    assert info_command.collect()["kernels"]["twin_linear"] == "no Triton for twin_linear"


def plain_directory(folder: Path, **changes) -> Path:
    """A copy of the embedded model with a changed config.json."""
    shutil.copytree(demo.MODEL_DIR, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.update(changes)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


REFUSALS = {
    "no such model": (ModelError, lambda t: ["quantize", t / "nothing"], "is not a directory"),
    "an empty model": (ModelError, lambda t: ["quantize", t], "holds no config.json"),
    "a model without weights": (
        ModelError,
        lambda t: ["quantize", _without(plain_directory(t / "m"), "model.safetensors")],
        r"holds no \.safetensors file",
    ),
    "pickled weights": (
        ModelError,
        lambda t: ["quantize", _renamed(plain_directory(t / "m"))],
        "pytorch_model.bin is a pickle, which is never opened",
    ),
    "code of the model's own": (
        ModelError,
        lambda t: ["eval", plain_directory(t / "m", architectures=["Evil"], auto_map={"AutoModel": "evil.Evil"})],
        "Evil; this command is for causal",
    ),
    "broken JSON": (ModelError, lambda t: ["eval", _broken(plain_directory(t / "m"))], "is not valid JSON"),
    "another tool's": (
        ModelError,
        lambda t: ["quantize", plain_directory(t / "m", quantization_config={"quant_method": "gptq"})],
        "quantized by 'gptq'",
    ),
    "ours again": (
        ModelError,
        lambda t: ["quantize", plain_directory(t / "m", quantization_config={"quant_method": "twinquant"})],
        "already quantized by tqcompile",
    ),
    "an unknown scheme": (ConfigError, lambda t: ["quantize", demo.MODEL_DIR, "--scheme", "w4"], "unknown scheme 'w4'"),
    "an unknown dtype": (ConfigError, lambda t: ["eval", demo.MODEL_DIR, "--dtype", "int3"], "--dtype must be one of"),
    "an unknown device": (
        ConfigError,
        lambda t: ["quantize", demo.MODEL_DIR, "--device", "abacus"],
        "--device 'abacus'",
    ),
    "no such text": (TQError, lambda t: ["quantize", demo.MODEL_DIR, "--calib", t / "no.txt"], "no such file"),
    "an empty text": (
        TQError,
        lambda t: ["quantize", demo.MODEL_DIR, "--calib", _file(t / "e.txt", b" \n")],
        "no text",
    ),
    "a binary text": (TQError, lambda t: ["eval", demo.MODEL_DIR, "--text", _file(t / "b", b"\xff\xfe")], "not UTF-8"),
    "a line without text": (
        TQError,
        lambda t: ["quantize", demo.MODEL_DIR, "--calib", _file(t / "a.jsonl", b'{"text": "x"}\n{"body": 1}')],
        "line 2: no object with a 'text'",
    ),
    "a text that is too short": (
        TQError,
        lambda t: ["eval", demo.MODEL_DIR, "--text", _file(t / "a.txt", b"def f")],
        "shorter than one window",
    ),
    "more positions than there are": (
        ConfigError,
        lambda t: ["eval", demo.MODEL_DIR, "--seq-len", 10**6],
        "longer than the model's",
    ),
    "json into no folder": (
        ConfigError,
        lambda t: ["quantize", demo.MODEL_DIR, "--json", t / "no" / "a.json"],
        "is not a directory",
    ),
    "a foreign report": (CheckpointError, lambda t: ["report", demo.MODEL_DIR], r"holds no tqcompile\.json"),
    "an altered report": (
        CheckpointError,
        lambda t: ["report", _file(t / "tqcompile.json", b'{"report": []}').parent],
        "no readable report",
    ),
}


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _renamed(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _broken(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_comes_before_any_work(case, tmp_path, monkeypatch):
    def work(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", work)
    error, make, message = REFUSALS[case]
    arguments = make(tmp_path)
    if arguments[0] == "quantize":
        given = [*arguments, *([] if "--calib" in arguments else ["--calib", "stdlib"]), "--out", tmp_path / "out"]
        arguments = given
    with pytest.raises(error, match=message):
        run(*arguments)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_when_asked(checkpoint, tmp_path):
    directory, _, _ = checkpoint
    shutil.copytree(directory, tmp_path / "q")
    before = (tmp_path / "q" / "tqcompile.json").read_bytes()
    arguments = ["quantize", demo.MODEL_DIR, "--calib", "stdlib", "--scheme", "rtn-w4a8", *QUICK]
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        run(*arguments, "--out", tmp_path / "q")
    assert (tmp_path / "q" / "tqcompile.json").read_bytes() == before
    run(*arguments, "--out", tmp_path / "q", "--overwrite")
    assert tqcompile.report(tqcompile.load(tmp_path / "q")).config["scheme"] == "rtn-w4a8"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a tqcompile checkpoint, so it is not replaced"):
        run(*arguments, "--out", tmp_path / "other", "--overwrite")
    with pytest.raises(CheckpointError, match="not a tqcompile checkpoint, so it is not replaced"):
        run(*arguments, "--out", tmp_path / "other" / "thesis.txt", "--overwrite")
    with pytest.raises(CheckpointError, match="the model's own directory"):
        run(*arguments, "--out", demo.MODEL_DIR, "--overwrite")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"


def test_too_little_memory_is_said_before_the_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: 10**8)
    arguments = ["quantize", demo.MODEL_DIR, "--calib", "stdlib", "--out", tmp_path / "q", *QUICK]
    with pytest.raises(ModelError, match=r"takes about 0\.\d+ GB \(weights .* and 0\.10 GB are free.*--force"):
        run(*arguments)
    assert not (tmp_path / "q").exists()
    run(*arguments, "--force")
    assert (tmp_path / "q" / "tqcompile.json").is_file()


def test_the_estimate_by_hand(tmp_path):
    model = tiny("Llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    settings = files.read_settings(tmp_path)
    config = Config(samples=3, seq_len=5, group_size=64)
    found = memory.estimate(tmp_path, files.weight_files(tmp_path), settings, config, "float32")
    parameters = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    assert found.model == 4 * parameters
    assert found.copy == int(inner * (4 + 16 / 64) / 8 * 1.15)
    block = inner // 2
    without = memory.estimate(tmp_path, files.weight_files(tmp_path), settings, config.replace(tune=0), "float32")
    assert found.work - without.work == 4 * 10 * block
    assert found.data == 6 * 3 * 5 * 128 * 4
    budget = config.replace(scheme="gptq-w3a16", bits_budget=3.0)
    compared = memory.estimate(tmp_path, files.weight_files(tmp_path), settings, budget, "float32")
    assert compared.copy == int(inner * (2 + 3 + 4 + 16 / 64) / 8 * 1.15)
    stored = memory.estimate(tmp_path, files.weight_files(tmp_path), settings, config, "auto")
    assert (stored.model, stored.data) == (2 * parameters, found.data // 2)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(CheckpointError, match="damaged or not complete"):
        memory.estimate(tmp_path, files.weight_files(tmp_path), settings, config, "auto")


def test_free_memory_is_plausible():
    free = memory.available()
    assert free is None or 10**7 < free < 10**14
    assert 10**7 < memory.peak() < 10**13


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    files.write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(target, "new \ud800")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tune_writes_its_times(monkeypatch, tmp_path):
    from tqcompile import tuner

    problem = tuner.Problem(256, 128)
    outcome = tuner.Outcome(problem, 4, {"BLOCK_M": 16}, 12.5, 14.0, 3, 1)
    monkeypatch.setattr(tuner, "run", lambda known, tokens, export: [outcome for _ in tokens])
    run("tune", "--shapes", "256x128", "--tokens", "4,8", "--json", tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text())["outcomes"]
    assert len(found) == 2
    assert found[0]["us"] == 12.5
    assert found[0]["problem"]["operand"] == "torch.int8"


def test_errors_end_in_one_line_and_a_code():
    command = [sys.executable, "-m", "tqcompile", "report", str(demo.MODEL_DIR)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("tqcompile: ")
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*command[:3], "quantize"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2


def test_quantize_takes_overrides_and_a_budget(tmp_path):
    mixed = ["--scheme", "gptq-w3a16", "--bits-budget", "3.4", "--override", "v_proj scheme=gptq-w2a16"]
    arguments = ["quantize", demo.MODEL_DIR, "--calib", "stdlib", "--out", tmp_path / "q", *QUICK, *mixed]
    run(*arguments, "--json", tmp_path / "q.json")
    report = json.loads((tmp_path / "q.json").read_text())["report"]
    assert report["bits_per_weight"] <= 3.4
    schemes = {layer["name"].rpartition(".")[2]: layer["scheme"] for layer in report["layers"]}
    assert schemes["v_proj"] == "gptq-w2a16"
    assert schemes["q_proj"] == schemes["k_proj"]
    assert len(report["choices"]) == 3
    assert tqcompile.load(tmp_path / "q").model.layers[0].self_attn.v_proj.spec.weight_bits == 2
