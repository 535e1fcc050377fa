"""The table of launch configurations, the cache file, the command that fills it; on a CPU, with a made-up kernel."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import SETTINGS, tiny, tokens
from typer.testing import CliRunner

import tqcompile
from tqcompile import cli, ops, tuner
from tqcompile.errors import CheckpointError, ConfigError
from tqcompile.kernels import tuning
from tqcompile.tuner import Problem

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
FORM = "int8-grid-r64"


@pytest.fixture(autouse=True)
def _own_files(tmp_path, monkeypatch):
    """A cache folder and a shipped table of the test's own."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.6.0")
    tuning.forget()
    yield
    tuning.forget()


def key(**changes) -> tuning.TuneKey:
    return tuning.TuneKey(
        **{"op": "f", "gpu": H200, "triton": "3.6.0", "form": FORM, "n": 28672, "k": 4096, "t": 16} | changes
    )


def ship(entries: dict, **more) -> None:
    tuning.SHIPPED.write_text(json.dumps({"version": 1, "entries": entries, **more}))
    tuning.forget()


def test_nothing_is_known_without_files():
    assert tuning.config_for("f", H200, 4096, 4096, 1, FORM) is None


def test_what_is_stored_is_found_for_this_gpu_version_form_and_shape_only():
    path = tuning.store({key(): {"config": {"bn": 64, "splits": 4}, "us": 12.5}})
    assert path == tuning.cache_file()
    assert tuning.lookup(key()) == {"bn": 64, "splits": 4}
    assert tuning.config_for("f", H200, 28672, 4096, 16, FORM) == {"bn": 64, "splits": 4}
    for other in ({"gpu": H100}, {"triton": "3.7.0"}, {"form": "int8-g128-r64"}, {"n": 28000}, {"op": "g"}):
        assert tuning.lookup(key(**other)) is None, other


def test_a_stored_configuration_survives_other_stores_and_processes():
    tuning.store({key(): {"config": {"bn": 64}, "us": 1}})
    tuning.store({key(t=1): {"config": {"bn": 32}, "us": 2}, key(op="g"): {"config": {"bn": 16}, "us": 3}})
    tuning.forget()
    assert [tuning.lookup(k)["bn"] for k in (key(), key(t=1), key(op="g"))] == [64, 32, 16]


@pytest.mark.parametrize(
    ("asked", "found"), [(1, 1), (2, None), (8, 16), (16, 16), (17, None), (256, 512), (512, 512), (8192, None)]
)
def test_the_next_larger_tuned_number_of_tokens_counts_if_it_is_near(asked, found):
    tuning.store({key(t=t): {"config": {"tuned": t}, "us": 1} for t in (1, 16, 512)})
    expected = None if found is None else {"tuned": found}
    assert tuning.lookup(key(t=asked)) == expected
    assert tuning.config_for("f", H200, 28672, 4096, asked, FORM) == expected


def test_the_shipped_table_serves_a_class_of_gpus_and_shapes_and_is_overruled_by_what_was_measured():
    shape = tuning.shape_class(28672, 4096)
    ship({"H200": {"f": {FORM: {shape: {"16": {"config": {"bn": 128}, "us": 20}}}}}})
    assert tuning.lookup(key()) == {"bn": 128}
    assert tuning.lookup(key(gpu="NVIDIA GH200 480GB", n=24576, triton="9.9")) == {"bn": 128}
    assert tuning.lookup(key(gpu=H100)) is None
    assert tuning.lookup(key(n=4096)) is None
    tuning.store({key(): {"config": {"bn": 64}, "us": 15}})
    assert tuning.lookup(key()) == {"bn": 64}
    assert tuning.lookup(key(n=24576)) == {"bn": 128}


def test_classes():
    assert [tuning.gpu_class(name) for name in (H200, H100, "NVIDIA H100 NVL", "NVIDIA GH200 480GB")] == [
        *("H200", "H100", "H100", "H200")
    ]
    assert tuning.gpu_class("NVIDIA A100-SXM4-80GB") == "NVIDIA A100-SXM4-80GB"
    assert tuning.shape_class(28672, 4096) == tuning.shape_class(24576, 4096) == "2^15x2^12"
    assert tuning.shape_class(4096, 14336) != tuning.shape_class(14336, 4096)
    assert tuning.form_of(torch.int8, True, 128, 64) == FORM
    assert tuning.form_of(torch.bfloat16, False, 128, 0) == "bfloat16-g128-r0"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 2, "entries": {}}', '{"version": 1}', '{"version": 1, "entries": {"a": 3}}',
     '{"version": 1, "entries": {"a": {"config": {"bn": [1]}}}}', '{"version": 1, "entries": {"a": {"config": 3}}}'],
)  # fmt: skip
def test_a_damaged_cache_file_is_ignored_with_a_warning_and_replaced(content, caplog):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(content)
    with caplog.at_level(logging.WARNING, "tqcompile"):
        assert tuning.config_for("f", H200, 4096, 4096, 1, FORM) is None
    assert str(tuning.cache_file()) in caplog.text
    assert "tqcompile tune" in caplog.text
    tuning.store({key(): {"config": {"bn": 64}, "us": 1}})
    assert tuning.lookup(key()) == {"bn": 64}


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    tuning.store({key(): {"config": {"bn": 64}, "us": 1}})
    before = tuning.cache_file().read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        tuning.store({key(t=1): {"config": {"bn": 32}, "us": 1}})
    assert tuning.cache_file().read_bytes() == before
    assert [file.name for file in tuning.cache_file().parent.iterdir()] == ["tuning.json"]


def test_a_reader_never_sees_half_a_file():
    tuning.store({key(): {"config": {"bn": 64}, "us": 1}})
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(json.loads(tuning.cache_file().read_text())["version"])

    reader = threading.Thread(target=read)
    reader.start()
    for t in range(1, 40):
        tuning.store({key(t=t): {"config": {"bn": t}, "us": 1}})
    stop.set()
    reader.join()
    assert seen
    assert set(seen) == {1}


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT, "/some/folder")
    assert tuning.cache_file() == Path("/some/folder/tuning.json")
    monkeypatch.delenv(tuning.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setattr(sys, "platform", "linux")
    assert tuning.cache_file() == Path("/xdg/tqcompile/tuning.json")


def test_looking_up_is_a_dictionary_lookup_after_the_first_time(monkeypatch):
    tuning.config_for("f", H200, 28672, 4096, 100, FORM)

    def no(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(tuning, "_read", no)
    monkeypatch.setattr(tuning, "lookup", no)
    for t in (97, 100, 112):
        assert tuning.config_for("f", H200, 28672, 4096, t, FORM) is None


def test_between_two_powers_of_two_are_four_numbers_of_tokens():
    tuning.store({key(t=t): {"config": {"bn": t}, "us": 9} for t in (64, 80, 128, 320, 512)})
    expected = {3: None, 33: 64, 64: 64, 65: 80, 80: 80, 81: 128, 128: 128, 257: 320, 320: 320, 321: 512, 513: None}
    for t, bn in expected.items():
        found = tuning.config_for("f", H200, 28672, 4096, t, FORM)
        assert (found and found["bn"]) == bn, t


def test_the_shipped_table_is_valid_and_made_from_measurements():
    tuning.store({key(): {"config": {"bn": 64}, "us": 9}, key(n=24576, t=1): {"config": {"bn": 32}, "us": 8}})
    table = tuning.to_shipped(H200, "3.6.0")
    assert table["entries"] == {"H200": {"f": {FORM: {"2^15x2^12": {"16": {"config": {"bn": 64}, "us": 9.0}}}}}}
    content = json.loads((Path(tuning.__file__).parent / "tuning_table.json").read_text())
    assert content["version"] == tuning.VERSION
    assert tuning._fault(content["entries"]) is None


def test_importing_the_table_does_not_import_triton():
    code = "import sys, tqcompile.kernels.tuning; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "False", found.stderr


# -------------------------------------------------------------------------------------------------------- the tuner


class Kernel:
    """launch() computes the op; a configuration says how long it takes, or what is wrong with it."""

    def __init__(self):
        self.asked = []

    def launch(self, *arguments, config=None):
        self.asked.append(config)
        config = config or {"us": 50.0}
        if config.get("fails"):
            raise RuntimeError("out of resource: shared memory\nmore")
        y = ops.twin_gemm_reference(*arguments)
        if config.get("wrong"):
            y[0, 0] += y.abs().mean()
        return y[:-1] if config.get("short") else y


def clock(call, copies) -> float:
    call(copies[0])
    return call.args[1]["us"] if call.args[1] else 50.0


def test_times_are_taken_in_turns():
    order, clock_of_gpu = [], iter(range(10**6))

    def slower_and_slower(name, ms):
        def once():
            order.append(name)
            return ms * (1 + next(clock_of_gpu) / 100)

        return once

    found = tuner.times_in_turns({"one": (slower_and_slower("one", 2.0), 4), "two": (slower_and_slower("two", 1.0), 1)})
    assert order == ["one", "two"] * (len(order) // 2)
    assert len(order) >= 16  # one round that does not count, and seven
    assert 2 * found["one"] == pytest.approx(found["two"], rel=0.02)  # whatever the clock did, both saw it
    assert found["two"] > 1000


def test_alone_only_the_second_half_counts(monkeypatch):
    taken = []
    monkeypatch.setattr(tuner.time, "perf_counter", lambda: 0.01 * len(taken))

    def once():
        taken.append(len(taken))
        return 5.0 if len(taken) <= 15 else 2.0

    assert tuner.times_alone({"one": (once, 4)}, seconds=0.395) == {"one": 2.0 * 1e3 / 4}
    assert len(taken) == 41
    one = {"one": (lambda: taken.append(0) or 3.0, 1)}
    assert tuner.times_alone(one, seconds=0.0) == {"one": 3000.0}


def test_alone_after_a_pause_every_round_begins_rested(monkeypatch):
    events = []
    monkeypatch.setattr(tuner.time, "sleep", lambda seconds: events.append(seconds))

    def timer(name, values):
        return (lambda: events.append(name) or values.pop(0), 2)

    timers = {"one": timer("one", [1.0, 9.0, 2.0]), "two": timer("two", [4.0, 3.0, 8.0])}
    assert tuner.times_alone(timers, 0.0, pause=0.5, rounds=3) == {"one": 1000.0, "two": 2000.0}
    assert events == [0.5, "one", 0.5, "two"] * 3


def tuned(candidates, problem=None, t=5) -> tuner.Outcome:
    problem, kernel = problem or Problem(48, 256, 8), Kernel()

    def make(tokens, seed):
        return tuner.twin_gemm_arguments(problem, tokens, seed, "cpu")

    return tuner.tune(problem, t, candidates, kernel.launch, ops.twin_gemm_reference, make, clock)


def test_the_fastest_correct_candidate_wins():
    candidates = [{"us": 30.0}, {"us": 20.0}, {"us": 1.0, "wrong": True}, {"us": 2.0, "fails": True}, {"us": 25.0}]
    outcome = tuned([*candidates, {"us": 3.0, "short": True}])
    assert (outcome.config, outcome.us, outcome.rule_us) == ({"us": 20.0}, 20.0, 50.0)
    assert (outcome.tried, outcome.dropped) == (3, 3)
    assert tuner.describe(outcome) == "20.0 us, the rule's 50.0 us, 3 tried, 3 dropped"


def test_no_correct_candidate_is_said_with_the_reason():
    outcome = tuned([{"us": 2.0, "fails": True}])
    assert outcome.config is None
    assert "no candidate is correct" in tuner.describe(outcome)
    assert "out of resource: shared memory" in tuner.describe(outcome)


@pytest.mark.parametrize(
    "problem", [Problem(48, 256, 0), Problem(33, 128, 16, 64, torch.bfloat16), Problem(20, 128, 8, 32)]
)
def test_arguments_are_legal_and_differ_by_seed(problem):
    first, again, other = (tuner.twin_gemm_arguments(problem, 3, seed, "cpu") for seed in (0, 0, 1))
    assert torch.ops.tqcompile.twin_gemm(*first).shape == (3, problem.n)
    assert torch.equal(first[3], again[3])
    assert not torch.equal(first[3], other[3])
    if first[5] is not None:  # the promise that comes with a channel scale
        m = first[4].double() / first[5].double()[:, None]
        assert torch.equal(m, m.round())
        assert 1 <= m.min() <= m.max() <= 16


def test_a_sum_in_another_order_is_no_difference_and_a_lost_product_is():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 4096, generator=g), torch.randn(64, 4096, generator=g)
    exact = (x.double() @ w.double().T).bfloat16()
    halves = (x[:, :2048] @ w[:, :2048].T + x[:, 2048:] @ w[:, 2048:].T).bfloat16()
    assert tuner.difference(halves, exact) is None
    lost = (x[:, :-32] @ w[:, :-32].T).bfloat16()
    assert "values are wrong" in tuner.difference(lost, exact)
    assert tuner.difference(exact * float("nan"), exact) is not None


def test_problems_of_a_checkpoint_are_those_of_the_compiled_graph(tmp_path):
    model = tiny("Qwen3")
    tqcompile.compile(model, tokens(), scheme="twin-w4a8", lm_head="w8a16", **SETTINGS)
    tqcompile.save(model, tmp_path / "m")
    found = tuner.problems_of_checkpoint(tmp_path / "m")
    # q + k + v, o, gate + up, down; equal in both layers
    assert [(p.n, p.k) for p in found] == [(256, 128), (128, 128), (384, 128), (128, 192)]
    assert {(p.rank, p.group_size, p.operand, p.grid) for p in found} == {(16, 64, torch.int8, True)}
    with pytest.raises(CheckpointError, match=r"nothing.tqcompile\.json cannot be read"):
        tuner.problems_of_checkpoint(tmp_path / "nothing")


def test_shapes_on_the_command_line():
    assert tuner.problems("96x256,96x256,10x128", 16, 64, "int8") == [
        Problem(96, 256, 16, 64),
        Problem(10, 128, 16, 64),
    ]
    for text in ("", "96", "96x", "ax2", "96x-256"):
        with pytest.raises(ConfigError, match="--shapes must look like"):
            tuner.problems(text, 16, 64, "int8")
    with pytest.raises(ConfigError, match="group size 64 does not divide 100"):
        tuner.problems("96x100", 16, 64, "int8")
    with pytest.raises(ConfigError, match="--activations must be one of int8, bfloat16"):
        tuner.problems("96x256", 16, 64, "int4")
    with pytest.raises(ConfigError, match="--tokens must be positive integers"):
        tuner.numbers("1,x", "--tokens")


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["tune", "--shapes", "96x256"])
    assert isinstance(result.exception, ConfigError)
    assert "NVIDIA GPU" in str(result.exception)


def test_the_command_stores_what_it_found(monkeypatch, tmp_path, capsys):
    """All of run() but the launch: on a machine where torch says that it has a GPU."""
    module = type(sys)("tqcompile.kernels.twin_gemm")
    module.launch, module.candidates = Kernel().launch, lambda n, k, t, form: [{"us": 10.0 * t}, {"us": 11.0}]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200)
    monkeypatch.setattr(tuner, "graph_time", clock)
    make = tuner.twin_gemm_arguments
    monkeypatch.setattr(tuner, "twin_gemm_arguments", lambda p, t, seed: make(p, t, seed, "cpu"))
    problem = Problem(96, 256, 16)
    outcomes = tuner.run([problem], [1, 4], tmp_path / "table.json")
    assert [(o.config, o.us) for o in outcomes] == [({"us": 10.0}, 10.0), ({"us": 11.0}, 11.0)]
    assert tuning.config_for("twin_gemm", H200, 96, 256, 1, problem.form) == {"us": 10.0}
    assert tuning.config_for("twin_gemm", H200, 96, 256, 3, problem.form) == {"us": 11.0}
    shipped = json.loads((tmp_path / "table.json").read_text())["entries"]["H200"]["twin_gemm"][problem.form]
    assert shipped["2^7x2^8"]["4"]["config"] == {"us": 11.0}
    out = capsys.readouterr().out
    assert "96x256 int8-grid-r16 T=4: 11.0 us, the rule's 50.0 us, 2 tried, 0 dropped" in out
    monkeypatch.delattr(module, "candidates")
    with pytest.raises(ConfigError, match="no candidates to choose from"):
        tuner.run([problem], [1])
