"""Several processes that quantize one model: the bytes of one process, and errors that end all of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SETTINGS, tiny, tokens

import tqcompile
from tqcompile import demo, distributed
from tqcompile.commands import quantize
from tqcompile.config import Config
from tqcompile.errors import ConfigError, DistributedError
from tqcompile.methods.learn import Objective, flat_gradient

ROOT = Path(__file__).parents[1]
RUN = {**SETTINGS, "steps": 4, "tune": 2}


def environment(**more) -> dict:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **more}


def launch(script: str, *arguments, processes: int = 2) -> list[tuple[int, str, str]]:
    """Run Python source in every process of a gloo group, without torchrun, so that no one else ends a process.

    Returns (exit status, stdout, stderr) of each.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    source = "import os, sys, torch\nfrom torch import distributed as dist\ndist.init_process_group('gloo')\n" + script
    started = []
    for rank in range(processes):
        where = {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", source, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment(**where), **pipes))
    try:
        texts = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


SEVERAL = """
from safetensors.torch import save_file
from test_distributed import RUN
from tiny_models import tiny, tokens
import tqcompile
out, *schemes = sys.argv[1:]
for scheme in schemes:
    model = tqcompile.compile(tiny("Qwen3"), tokens(), scheme=scheme, resume=f"{out}/blocks-{scheme}", **RUN)
    save_file(model.state_dict(), f"{out}/{scheme}-{dist.get_rank()}.safetensors")
    print([note for note in tqcompile.report(model).notes if "processes" in note])
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("processes", "schemes"), [(2, ("twin-w4a4", "d2-w3a16")), (3, ("twin-w4a8",))])
def test_any_number_of_processes_gives_the_bytes_of_one(tmp_path, processes, schemes):
    for status, out, err in launch(SEVERAL, tmp_path, *schemes, processes=processes):
        assert status == 0, err[-3000:]
        assert out.count(f"quantized by {processes} processes, learning in 2 shards") == len(schemes)
    for scheme in schemes:
        alone = tqcompile.compile(tiny("Qwen3"), tokens(), scheme=scheme, **RUN).state_dict()
        for rank in range(processes):
            found = load_file(tmp_path / f"{scheme}-{rank}.safetensors")
            assert found.keys() == alone.keys()
            assert [name for name in alone if not torch.equal(found[name], alone[name])] == [], (scheme, rank)
    # What several processes finished, one goes on from.
    folder = tmp_path / f"blocks-{schemes[0]}"
    assert len(list(folder.glob("*.safetensors"))) == 2
    resumed = tqcompile.compile(tiny("Qwen3"), tokens(), scheme=schemes[0], resume=folder, **RUN).state_dict()
    finished = load_file(tmp_path / f"{schemes[0]}-0.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in finished.items())


def test_another_number_of_shards_gives_other_bytes():
    one, two = (tqcompile.compile(tiny("Qwen3"), tokens(), shards=n, **RUN).state_dict() for n in (1, 2))
    assert any(not torch.equal(one[name], two[name]) for name in one)


FAILING = """
from test_distributed import RUN
from tiny_models import assert_unchanged, snapshot, tiny, tokens
import tqcompile
from tqcompile import api
from tqcompile.errors import NumericError
from tqcompile.methods import learn, select
def fail(*_):
    raise NumericError("no good numbers")
def attempt(kind):
    data, settings, whole = tokens(), dict(RUN), (learn.Objective._read, api._mark)
    if dist.get_rank() == 1:
        if kind == "raises":
            learn.Objective._read = fail
        elif kind == "raises at the end":
            api._mark = fail
        elif kind == "ends":
            select.held_out_error = lambda *_: os._exit(7)
        elif kind == "other data":
            data[0, 0] = 96 - data[0, 0]
        elif kind == "other settings":
            settings["rank"] = 8
    model = tiny("Qwen3", num_hidden_layers=1)
    before = snapshot(model)
    try:
        tqcompile.compile(model, data, **settings)
    except Exception as error:
        print(kind, "|", type(error).__name__, error, flush=True)
        if kind != "raises at the end":
            assert_unchanged(model, before)
    learn.Objective._read, api._mark = whole
for kind in sys.argv[1:]:
    attempt(kind)
"""
TOLD = "DistributedError process 1 failed (NumericError: no good numbers)"
ERRORS = {
    "raises": (TOLD, "NumericError no good numbers"),
    "raises at the end": (TOLD, "NumericError no good numbers"),
    "other data": ("DistributedError process 1 failed", "process 0 does: calibration data differ. Start all"),
    "other settings": ("DistributedError process 1 failed", "what process 0 does: settings differ. Start all"),
    "ends": ("DistributedError another process ended, or did not answer within 30 minutes (", ""),
}


def test_an_error_in_one_process_ends_all_of_them():
    first, second, third = launch(FAILING, *ERRORS, processes=3)
    lines = [dict(line.split(" | ") for line in text.splitlines()) for _, text, _ in (first, second, third)]
    assert list(lines[0]) == list(lines[2]) == list(ERRORS), (first, third)
    for kind, messages in ERRORS.items():
        for found, message in zip(lines, (*messages, messages[0]), strict=True):
            assert message in found.get(kind, ""), (kind, found)
    assert (first[0], second[0], third[0]) == (0, 7, 0), first[2][-2000:]


def test_torchrun_and_the_command_line(tmp_path, capsys):
    out, settings = tmp_path / "several", {"steps": 2, "tune": 1, "samples": 4, "seq_len": 64}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tqcompile",
    ]
    command += ["quantize", str(demo.MODEL_DIR), "--calib", "stdlib", "--out", str(out), "--dtype", "float32"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("saved to") == found.stdout.count("each of 2 processes") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["several"]
    quantize.run(demo.MODEL_DIR, "stdlib", tmp_path / "alone", Config(**settings), dtype="float32")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "several"))
    assert one == two
    # The checkpoint is there now, and every process says so.
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode != 0
    assert f"tqcompile: --out {out} exists" in found.stderr
    assert "tqcompile: process 0 failed (CheckpointError: --out" in found.stderr


@pytest.mark.parametrize(("n", "t"), [(64, 24), (24, 64)])
@pytest.mark.parametrize("act_bits", [4, 16])
@pytest.mark.parametrize("count", [2, 3])
def test_the_terms_of_a_loss_add_up(n, t, act_bits, count):
    g = torch.Generator().manual_seed(n + count)
    w, x = (torch.randn(size, 32, generator=g, dtype=torch.float64) for size in (n, t))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0]
    objective = Objective(w, torch.rand(32, generator=g).double() + 0.5, rotation, None, 16, act_bits)
    p = objective.start(8, True, g)
    parameters = [value.requires_grad_(True) for value in vars(p).values()]
    whole = flat_gradient(objective(p, x), parameters)
    parts = [flat_gradient(loss, parameters) for loss in objective.losses(p, x, x @ w.t(), range(count), count)]
    assert len(parts) == count
    assert torch.allclose(sum(parts), whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))
    assert all(part[-1] > 0 for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_every_part_has_one_process(monkeypatch, size, count):
    owners = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_world", distributed._World(rank, size, None))
        owners += [rank] * len(distributed.own(count))
        assert all(distributed.owner(index, count) == rank for index in distributed.own(count))
        assert len(distributed.own(count)) <= -(-count // size)
    assert len(owners) == count


def test_one_process_needs_no_group():
    assert not distributed.active()
    assert distributed.first()
    assert distributed.numbers(lambda i: i / 2, 3) == [0.0, 0.5, 1.0]
    with distributed.together():
        distributed.require_same({"anything": object()})
        distributed.check()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DistributedError, match="process 1 of this host has no GPU: there are 1"):
        distributed.launched("cuda").__enter__()
    with pytest.raises(DistributedError, match="cuda:0 is one GPU for several processes"):
        distributed.launched("cuda:0").__enter__()


@pytest.mark.parametrize("shards", [0, 65, -1])
def test_shards_are_checked(shards):
    with pytest.raises(ConfigError, match="shards must be between 1 and 64"):
        Config(shards=shards)
