"""Interrupted runs: what is kept, what is refused, and that the result has the same bytes."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import SETTINGS, assert_unchanged, snapshot, tiny, tokens

import tqcompile
from tqcompile import api, demo, finished_blocks
from tqcompile.errors import CheckpointError, ConfigError

SETTINGS = {**SETTINGS, "tune": 2}


def quantize(folder, model=None, data=None, **changes):
    model = tiny("Qwen3", num_hidden_layers=3) if model is None else model
    return tqcompile.compile(model, tokens() if data is None else data, resume=folder, **{**SETTINGS, **changes})


def interrupted(monkeypatch, folder, block, **changes):
    """Quantize until ``block`` begins, and fail there; the model must be as before."""
    plain, model = api.quantize_unit, tiny("Qwen3", num_hidden_layers=3)
    before = snapshot(model)

    def fail(job, unit, statistics):
        if unit.name == block:
            raise KeyboardInterrupt
        return plain(job, unit, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(api, "quantize_unit", fail)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, model, **changes)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("scheme", "block"), [("twin-w4a8", 1), ("d2-w3a16", 2), ("unisvq-w2a16", 1), ("rtn-w4a16", 2)]
)
def test_a_resumed_run_gives_the_same_bytes(monkeypatch, tmp_path, scheme, block):
    expected = quantize(None, scheme=scheme)
    interrupted(monkeypatch, tmp_path / "run", f"model.layers.{block}", scheme=scheme)
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == block
    (tmp_path / "run" / ".partial-model.layers.2.safetensors").write_text("what a kill left behind")
    work, plain = [], api.quantize_unit
    monkeypatch.setattr(api, "quantize_unit", lambda *a: work.append(a[1].name) or plain(*a))
    found = quantize(tmp_path / "run", scheme=scheme)
    assert work == [f"model.layers.{i}" for i in range(block, 3)]
    state, reference = found.state_dict(), expected.state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[name], reference[name]) for name in reference)
    assert torch.equal(found(tokens()).logits, expected(tokens()).logits)

    def facts(model):
        report = tqcompile.report(model).to_dict()
        for record in [*report["layers"], *report["blocks"]]:
            record.pop("seconds")
        return report

    assert facts(found) == facts(expected)
    assert found.tqcompile_quantization == expected.tqcompile_quantization


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("rank", {"rank": 8}),
        ("seed, rotate_stream", {"seed": 3, "rotate_stream": True}),
        ("calibration data", {"data": tokens().roll(1)}),
        ("model", {"model": tiny("Qwen3", seed=1, num_hidden_layers=3)}),
    ],
)
def test_another_run_is_refused_and_damages_nothing(monkeypatch, tmp_path, what, changes):
    interrupted(monkeypatch, tmp_path / "run", "model.layers.1")
    files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match=f"another run: {what} changed"):
        quantize(tmp_path / "run", **changes)
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"no run\.json"):
        quantize(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b.replace(b"out_features", b"out_feature_"),
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
        lambda _: b"",
    ],
)
def test_a_damaged_block_is_named(monkeypatch, tmp_path, damage):
    interrupted(monkeypatch, tmp_path, "model.layers.1")
    path = tmp_path / "model.layers.0.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    model = tiny("Qwen3", num_hidden_layers=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.safetensors is damaged"):
        quantize(tmp_path, model)
    assert_unchanged(model, before)
    path.unlink()
    quantize(tmp_path)


def test_a_full_disk_leaves_what_was_finished(monkeypatch, tmp_path):
    expected = quantize(None).state_dict()
    plain, written = finished_blocks._flush, []

    def full(path):
        written.append(path)
        if len(written) > 4:  # run.json and its folder, the first block and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(finished_blocks, "_flush", full)
        with pytest.raises(CheckpointError, match=r"layers\.1\.safetensors cannot be written.*Free some space"):
            quantize(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.layers.0.safetensors", "run.json"]
    found = quantize(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_killed_at_any_moment_the_command_goes_on(tmp_path):
    """kill -9 at the start, and some time behind the second start's first new block; then to the end."""
    options = ["--calib", "stdlib", "--samples", "8", "--seq-len", "64", "--steps", "4", "--tune", "2"]

    def start(out, *more):
        command = [
            sys.executable,
            "-m",
            "tqcompile",
            "quantize",
            str(demo.MODEL_DIR),
            "--out",
            str(out),
            *options,
            *more,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment, cwd=Path(__file__).parents[1])

    def hashes(out):
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.iterdir() if f.name != "tqcompile.json"}

    assert start(tmp_path / "whole").wait() == 0
    assert not (tmp_path / "whole.blocks").exists()
    out, blocks = tmp_path / "out", tmp_path / "out.blocks"
    for finished in range(2):
        process = start(out, *(["--resume"] if finished else []))
        deadline = time.monotonic() + 120
        while len(list(blocks.glob("*.safetensors"))) < finished + (finished > 0) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1 * finished)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    assert start(out).wait() == 1  # without --resume
    assert start(out, "--resume").wait() == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not blocks.exists()
