"""Streamed runs: the same tensors as in memory, one block at a time, and every refusal before any work."""

import contextlib
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import as_bfloat16, tiny, tokens
from torch import nn
from typer.testing import CliRunner

import tqcompile
from tqcompile import api, demo
from tqcompile.calibration import _BlockDriver
from tqcompile.cli import app
from tqcompile.commands import files, memory
from tqcompile.commands import quantize as command
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ConfigError, ModelError
from tqcompile.modules import QUANTIZED
from tqcompile.streaming import OUTSIDE, StreamedModel, check_config

SETTINGS = {"group_size": 64, "rank": 16, "steps": 2, "tune": 2}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def saved(folder: Path, model: nn.Module, shard: str = "150KB") -> Path:
    model.save_pretrained(folder / "source", max_shard_size=shard, save_original_format=False)
    return folder / "source"


def opened(source: Path, dtype: str = "auto") -> StreamedModel:
    settings = files.read_settings(source)
    return StreamedModel(files.architecture(settings), source, settings, dtype)


def stream(source: Path, out: Path, config: Config, dtype: str = "auto", resume: Path | None = None) -> nn.Module:
    found, blocks = opened(source, dtype), resume or out.with_suffix(".blocks")
    model = api.compile_streamed(found, tokens(), config=config, resume=blocks, progress=False)
    found.save(out, blocks)
    return model


def in_memory(source: Path, out: Path, config: Config, dtype: str = "auto", resume: Path | None = None) -> nn.Module:
    model = files.load_model(source, dtype)
    tqcompile.compile(model, tokens(), config=config, backend=None, progress=False, resume=resume)
    tqcompile.save(model, out)
    return model


def manifest(out: Path) -> dict:
    return json.loads((out / "tqcompile.json").read_text())


@pytest.mark.parametrize(
    ("name", "changes", "scheme", "dtype"),
    [
        ("Qwen3", {"tie_word_embeddings": True}, "twin-w4a8", "auto"),
        ("Llama", {}, "d2-w3a16", "bfloat16"),
        ("Qwen2", {}, "unisvq-w2a16", "auto"),
        ("OPT", {"ffn_dim": 192}, "twin-w4a16", "auto"),
        ("Qwen3Moe", MOE, "rtn-w4a8", "auto"),
    ],
)
def test_a_streamed_run_writes_the_tensors_of_a_run_in_memory(tmp_path, name, changes, scheme, dtype):
    source = saved(tmp_path, as_bfloat16(tiny(name, num_hidden_layers=3, **changes)))
    assert len(list(source.glob("*.safetensors"))) > 2
    config = Config(scheme=scheme, **SETTINGS)
    reference = in_memory(source, tmp_path / "memory", config, dtype)
    streamed = stream(source, tmp_path / "out", config, dtype)
    expected, found = manifest(tmp_path / "memory"), manifest(tmp_path / "out")
    assert found["tensors"] == expected["tensors"]
    assert found["modules"] == expected["modules"]
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((tmp_path / "memory" / file).read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found["tensors"].keys()
    assert len(set(index["weight_map"].values())) == 4
    assert torch.equal(tqcompile.load(tmp_path / "out")(tokens()).logits, reference(tokens()).logits)
    for records in ("layers", "blocks"):
        for record in (*expected["report"][records], *found["report"][records]):
            record.pop("seconds")
        assert found["report"][records] == expected["report"][records]
    assert "streamed: 3 blocks" in str(streamed.tqcompile_report.notes)


def test_the_command_on_the_embedded_model(tmp_path):
    """Two of six blocks are quantized; the others are copied."""
    options = [
        "--calib",
        "stdlib",
        "--scheme",
        "twin-w4a8",
        "--ignore",
        r"re:model\.layers\.[0235]\..*",
        "--ignore",
        "mlp",
    ]
    options += ["--steps", "2", "--tune", "2", "--samples", "16", "--seq-len", "32"]
    for out, more in (("memory", []), ("streamed", ["--stream", "--json", str(tmp_path / "json")])):
        arguments = ["quantize", str(demo.MODEL_DIR), "--out", str(tmp_path / out), *options, *more]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.exception
    expected, found = manifest(tmp_path / "memory"), manifest(tmp_path / "streamed")
    assert found["tensors"] == expected["tensors"]
    assert len(found["modules"]) == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["json", "memory", "streamed"]
    assert json.loads((tmp_path / "json").read_text())["report"] == found["report"]
    assert (
        files.load_tokenizer(tmp_path / "streamed")("def f")["input_ids"] == demo.load_tokenizer()("def f")["input_ids"]
    )


def stored_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel() > 1)


def test_one_block_is_in_memory_at_a_time(monkeypatch, tmp_path):
    source = saved(tmp_path, tiny("Qwen3", num_hidden_layers=4))
    plain, seen, originals = api.quantize_unit, [], []

    def spy(job, unit, statistics):
        sizes = [stored_bytes(block) for block in job.model.model.layers]
        resident = [index for index, size in enumerate(sizes) if size > 2000]
        assert sizes[resident[0]] == 4 * sum(p.numel() for p in job.model.get_submodule(unit.name).parameters())
        seen.append(resident)
        gc.collect()
        assert not [name for name, linear in originals if linear() is not None]  # nothing holds a block that is done
        linears = [(name, module) for name, module in job.model.get_submodule(unit.name).named_modules()]
        originals[:] = [(f"{unit.name}.{name}", weakref.ref(m)) for name, m in linears if type(m) is nn.Linear]
        assert len(originals) == 7
        del linears
        return plain(job, unit, statistics)

    monkeypatch.setattr(api, "quantize_unit", spy)
    model = stream(source, tmp_path / "out", Config(**{**SETTINGS, "tune": 0}))
    assert seen == [[0], [1], [2], [3]]
    assert all(stored_bytes(block) < 4000 for block in model.model.layers)
    assert sum(isinstance(module, QUANTIZED) for module in model.modules()) == 28


def test_hidden_states_of_a_streamed_run_are_in_files():
    model = tiny("Qwen3")
    batches = [{"input_ids": ids} for ids in tokens().split(8)]
    for sparing in (False, True):
        driver = _BlockDriver.record(model, "model.layers", 2, batches, sparing)
        assert driver._hidden._mapped is driver._exact._mapped is sparing


def test_what_lies_outside_of_the_blocks_is_named(tmp_path):
    source = saved(tmp_path, tiny("Qwen3"))
    config = Config(ignore=(), **{**SETTINGS, "steps": 0, "tune": 0})
    model = stream(source, tmp_path / "out", config)
    assert tqcompile.report(model).skipped == {"lm_head": OUTSIDE}
    assert type(tqcompile.load(tmp_path / "out").lm_head) is nn.Linear


@pytest.mark.parametrize("streamed_first", [True, False])
def test_an_interrupted_run_goes_on(monkeypatch, tmp_path, streamed_first):
    """What was begun in memory may be resumed block by block: it is the same run."""
    source = saved(tmp_path, tiny("Qwen3", num_hidden_layers=3))
    config, blocks = Config(scheme="twin-w4a16", **SETTINGS), tmp_path / "out.blocks"
    in_memory(source, tmp_path / "memory", config)
    plain = api.quantize_unit

    def fail(job, unit, statistics):
        if unit.name.endswith(".1"):
            raise KeyboardInterrupt
        return plain(job, unit, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(api, "quantize_unit", fail)
        with pytest.raises(KeyboardInterrupt):
            (stream if streamed_first else in_memory)(source, tmp_path / "out", config, resume=blocks)
    assert [file.name for file in sorted(blocks.glob("*.safetensors"))] == ["model.layers.0.safetensors"]
    with monkeypatch.context() as patch:  # then a full disk while the checkpoint is written
        patch.setattr("tqcompile.streaming._write_index", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            stream(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    (blocks / ".partial-killed" / "new").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(api, "quantize_unit", None)
        stream(source, tmp_path / "out", config)
    assert manifest(tmp_path / "out")["tensors"] == manifest(tmp_path / "memory")["tensors"]
    assert not list(blocks.glob(".partial*"))
    changed = tiny("Qwen3", seed=1, num_hidden_layers=3)
    changed.save_pretrained(source, max_shard_size="150KB")
    with pytest.raises(ConfigError, match="another run: model changed"):
        stream(source, tmp_path / "out", config)


def test_a_run_killed_behind_its_checkpoint_ends_when_it_is_resumed(monkeypatch, tmp_path):
    source = saved(tmp_path, tiny("Qwen3"))
    monkeypatch.setattr(files, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(files, "calibration_texts", lambda *_: tokens())
    config = Config(**{**SETTINGS, "steps": 0, "tune": 0})
    with monkeypatch.context() as patch:
        patch.setattr(command.shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command.run(source, "stdlib", tmp_path / "out", config, stream=True)
    first = manifest(tmp_path / "out")["tensors"]
    assert (tmp_path / "out.blocks" / "run.json").exists()
    command.run(source, "stdlib", tmp_path / "out", config, stream=True, resume=True)
    assert manifest(tmp_path / "out")["tensors"] == first
    assert not (tmp_path / "out.blocks").exists()


def rewrite(source: Path, change) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def spoiled(tensors: dict) -> None:
    if "model.layers.1.mlp.up_proj.weight" in tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan


def narrowed(tensors: dict) -> None:
    if "model.layers.0.mlp.up_proj.weight" in tensors:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 128)


def renamed(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("mlp", "ffn")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (spoiled, ModelError, r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        (narrowed, ModelError, r"up_proj\.weight is \[7, 128\] in .*, \[192, 128\] in the model"),
        (renamed, ModelError, r"holds no tensor model\.layers\.0\.mlp\..*in memory"),
    ],
)
def test_weights_that_cannot_be_streamed_are_refused_at_once(monkeypatch, tmp_path, change, error, message):
    source = saved(tmp_path, tiny("Qwen3"), "10GB")
    rewrite(source, change)
    monkeypatch.setattr(api, "quantize_unit", None)
    with pytest.raises(error, match=message):
        stream(source, tmp_path / "out", Config(**SETTINGS))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_an_index_that_is_wrong_is_refused(tmp_path):
    source = saved(tmp_path, tiny("Qwen3"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    (source / last).write_bytes((source / first).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds no tensor .*which model\.safetensors\.index\.json says"):
        opened(source)
    (source / last).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened(source)


def test_tensors_that_the_model_has_no_place_for_are_named(tmp_path):
    source = saved(tmp_path, tiny("Qwen3"), "10GB")
    rewrite(source, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(3)}))
    model = stream(source, tmp_path / "out", Config(**{**SETTINGS, "steps": 0, "tune": 0}))
    assert "not in the model, left out: model.layers.0.extra, 1 tensors in all" in tqcompile.report(model).notes


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_beside_the_embeddings(tmp_path, equal):
    source = saved(tmp_path, tiny("Qwen3", tie_word_embeddings=True), "10GB")
    factor = 1 if equal else 2
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * factor}))
    config = Config(**{**SETTINGS, "steps": 0, "tune": 0})
    in_memory(source, tmp_path / "memory", config)
    stream(source, tmp_path / "out", config)
    assert manifest(tmp_path / "out")["tensors"] == manifest(tmp_path / "memory")["tensors"]
    assert ("lm_head.weight" in manifest(tmp_path / "out")["tensors"]) is not equal


def test_models_without_a_chain_of_blocks_of_linears_are_refused(monkeypatch, tmp_path):
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=97, n_positions=32)
    with pytest.raises(ModelError, match="is a Conv1D"):
        opened(saved(tmp_path / "gpt2", transformers.GPT2LMHeadModel(gpt2)))
    broken = opened(saved(tmp_path, tiny("Qwen3")))
    with pytest.raises(ConfigError, match="calib_data is None"):
        api.compile_streamed(broken, None, config=Config(**SETTINGS), resume=tmp_path / "blocks")
    monkeypatch.setattr(
        "tqcompile.streaming.StreamedModel._pass_through", lambda *_: lambda hidden, *args, **kwargs: hidden.clone() + 1
    )
    chain = type(broken.model.model.layers[0])
    monkeypatch.setattr(chain, "__call__", lambda self, h, *a, **k: nn.Module.__call__(self, h.clone(), *a, **k))
    with pytest.raises(ModelError, match="not every block feeds the next"):
        api.compile_streamed(broken, tokens(), config=Config(**SETTINGS), resume=tmp_path / "blocks", progress=False)


@pytest.mark.parametrize("setting", [{"rotate_stream": True}, {"bits_budget": 4.5}, {"lm_head": "w8a16"}])
def test_settings_that_need_the_whole_model_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* needs the whole model in memory"):
        check_config(Config(**setting))
    with pytest.raises(ConfigError, match="needs the whole model"):
        command.run(demo.MODEL_DIR, "stdlib", tmp_path / "out", Config(**setting), stream=True)
    assert not list(tmp_path.iterdir())


class Pair(nn.Module):
    """A block that gives a tuple, or what is no hidden state."""

    def __init__(self, form: str):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, hidden, scale):
        return (self.linear(hidden) * scale, scale) if self.form == "tuple" else hidden[..., :2]


@pytest.mark.parametrize("form", ["tuple", "narrow"])
def test_blocks_that_pass_through_keep_the_form_of_what_they_give(monkeypatch, form):
    source, read = StreamedModel.__new__(StreamedModel), []
    source.model, source.blocks = nn.ModuleList([Pair(form), Pair(form)]), ["0", "1"]
    monkeypatch.setattr(source, "resident", lambda name: read.append(name) or contextlib.nullcontext(), raising=False)
    hidden, scale = torch.randn(2, 3, 4), torch.ones(1)
    with source.passing_through():
        if form == "tuple":
            for block in source.model:
                found = block(hidden, scale=scale)
                assert found[0] is hidden
                assert found[1] is scale
        else:
            with pytest.raises(ModelError, match="does not give hidden states of the shape"):
                source.model[0](hidden, scale)
    assert read == ["0"]  # one of a kind is enough
    assert source.model[1](hidden, scale)[0] is not hidden


def test_the_estimate_is_of_one_block(tmp_path):
    source = saved(tmp_path, tiny("Qwen3", num_hidden_layers=12))
    settings, weights = files.read_settings(source), files.weight_files(source)
    whole, part = (memory.estimate(source, weights, settings, Config(), "auto", stream) for stream in (False, True))
    block = 4 * sum(p.numel() for p in tiny("Qwen3").model.layers[0].parameters())
    outside = 4 * (2 * 97 * 128 + 128)
    assert part.model == block + outside
    assert whole.model == 12 * block + outside
    assert part.copy == pytest.approx(whole.copy / 12, abs=1)
    with pytest.raises(ModelError, match="--stream"):
        memory.require(memory.Estimate(1 << 60, 0, 0, 0))
    with pytest.raises(ModelError, match="block by block"):
        memory.require(memory.Estimate(1 << 60, 0, 0, 0), stream=True)
