"""``bench`` and ``eval --tasks``: what they measure, what they hand over, and every refusal."""

import json
import sys
import types

import pytest
from typer.testing import CliRunner

from tqcompile import demo
from tqcompile.cli import app
from tqcompile.commands import bench, tasks
from tqcompile.errors import ConfigError


def test_bench_writes_both_speeds(tmp_path):
    arguments = ["bench", str(demo.MODEL_DIR), "--prompt", "16", "--new", "4", "--batch", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "b.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["prefill_tokens_per_second"] > found["decode_tokens_per_second"] > 0
    assert (found["quantized"], found["compiled"], found["batch"], found["dtype"]) == (False, False, 2, "bfloat16")
    assert f"decode {found['decode_tokens_per_second']:.1f} tokens/s" in result.output
    weights = demo.load_model()
    assert found["weight_bytes"] >= 2 * sum(p.numel() for p in weights.parameters())


def test_bench_decodes_what_generate_does():
    model, seen = demo.load_model(), []
    ids = demo.held_out_windows(demo.load_tokenizer(), 1, 24)
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 24:].tolist()
    handle = model.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["input_ids"]), with_kwargs=True)
    bench.measure(model, ids, 6)
    handle.remove()
    assert [ids.shape[1] for ids in seen] == [24, *[1] * 6]
    assert [int(ids) for ids in seen[1:]] == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 4, 1), "must be positive"), ((1000, 100, 1), "are more than the model's 1024 positions")],
)
def test_bench_refuses_sizes_before_it_loads(sizes, message, monkeypatch):
    monkeypatch.setattr(bench.files, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        bench.run(demo.MODEL_DIR, *sizes, compiled=False)


def test_tasks_without_the_harness_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        tasks.run(demo.MODEL_DIR, ["arc_easy"], None)


@pytest.fixture
def harness(monkeypatch):
    """A stand-in with the part of lm-eval's interface that is used; it records what it was given."""
    given = {}
    package, models = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models")
    module = types.ModuleType("lm_eval.models.huggingface")
    registry = types.ModuleType("lm_eval.tasks")
    registry.TaskManager = lambda: types.SimpleNamespace(match_tasks=lambda names: set(names) & {"arc_easy", "piqa"})
    package.__version__ = "0"
    module.HFLM = lambda **kwargs: given.setdefault("lm", kwargs)

    def simple_evaluate(model, tasks, limit, task_manager):
        given.update(model=model, tasks=tasks, limit=limit)
        return {"results": {task: {"alias": task, "acc,none": 0.25} for task in tasks}}

    package.simple_evaluate = simple_evaluate
    package.__spec__ = types.SimpleNamespace(name="lm_eval")
    for stub in (package, models, module, registry):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return given


def test_tasks_go_to_the_harness_with_model_and_tokenizer(harness, tmp_path):
    arguments = ["eval", str(demo.MODEL_DIR), "--tasks", "arc_easy, piqa", "--limit", "5"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "t.json")])
    assert result.exit_code == 0, (result.output, result.exception)
    assert (harness["tasks"], harness["limit"]) == (["arc_easy", "piqa"], 5)
    assert type(harness["lm"]["pretrained"]).__name__ == "Qwen3ForCausalLM"
    assert harness["lm"]["tokenizer"].vocab_size > 0
    assert "piqa: acc,none 0.2500" in result.output
    assert json.loads((tmp_path / "t.json").read_text())["results"]["piqa"]["acc,none"] == 0.25


def test_tasks_must_have_names(harness):
    with pytest.raises(ConfigError, match="names no task"):
        tasks.run(demo.MODEL_DIR, ["arc_easy", ""], None)
    assert not harness


def test_an_unknown_task_is_refused_before_the_model_is_read(harness, monkeypatch):
    monkeypatch.setattr(tasks.files, "load_model", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(ConfigError, match="no task no_such_task"):
        tasks.run(demo.MODEL_DIR, ["piqa", "no_such_task"], None)
    assert not harness
