"""Saving and loading: bit-equal outputs, whole checkpoints or none, and a named error for every damage."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SETTINGS, as_bfloat16, logits, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import checkpoint
from tqcompile.checkpoint import MANIFEST, verify_files
from tqcompile.errors import CheckpointError, ModelError
from tqcompile.modules import TwinLinear

ROOT = Path(__file__).parents[1]


def quantize(model, scheme="rtn-w4a8", **changes):
    return tqcompile.compile(model, tokens(), **{**SETTINGS, "scheme": scheme, **changes})


@pytest.fixture(scope="module")
def model():
    return quantize(tiny("Qwen2"), "twin-w4a4")


@pytest.fixture
def saved(model, tmp_path):
    tqcompile.save(model, tmp_path / "model")
    return tmp_path / "model"


def files_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("Qwen2", "twin-w4a4"), ("Qwen3", "svdquant-w4a8"), ("Bert", "twin-w4a16"), ("Llama", "rtn-w4a8")],
)
def test_a_reloaded_model_is_bit_equal(tmp_path, name, scheme, dtype):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = quantize(tiny(name) if dtype == torch.float32 else as_bfloat16(tiny(name)), scheme)
    expected = logits(model)
    tqcompile.save(model, tmp_path / "a")
    auto = AutoModelForSequenceClassification if name == "Bert" else AutoModelForCausalLM
    for reloaded in (tqcompile.load(tmp_path / "a"), auto.from_pretrained(tmp_path / "a")):
        assert same_state(reloaded, model)
        assert torch.equal(logits(reloaded), expected)
        assert expected.dtype == dtype
        assert not reloaded.training
        assert not any(parameter.requires_grad for parameter in reloaded.parameters())
        assert tqcompile.report(reloaded) == tqcompile.report(model)
    tqcompile.save(reloaded, tmp_path / "b")
    assert files_of(tmp_path / "b")["model.safetensors"] == files_of(tmp_path / "a")["model.safetensors"]
    again = tqcompile.load(tmp_path / "b")
    assert torch.equal(logits(again), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_generate_works_after_loading(saved, model):
    ids = tokens(2, 5)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(tqcompile.load(saved).generate(ids, **options), model.generate(ids, **options))


def test_a_model_that_is_cast_after_quantizing_can_be_saved(tmp_path):
    for name, scheme in (("Qwen2", "twin-w4a8"), ("Llama", "svdquant-w4a8")):
        model = quantize(tiny(name), scheme)
        for module in model.modules():
            if "Rotary" not in type(module).__name__:
                module._apply(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, recurse=False)
        tqcompile.save(model, tmp_path / name)
        reloaded = tqcompile.load(tmp_path / name)
        assert same_state(reloaded, model)
        assert torch.equal(logits(reloaded), logits(model))


class Plain(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 64, bias=False)
        self.register_buffer("shift", torch.arange(64).float())
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.b(torch.tanh(self.a(self.embed(ids) + self.shift)))))


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_module(tmp_path, tied):
    torch.manual_seed(0)
    model = Plain(tied)
    fresh, ids = copy.deepcopy(model), torch.arange(12).reshape(3, 4)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    data = [{"ids": torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(s))} for s in range(4)]
    tqcompile.compile(model, data, group_size=32, rank=8, steps=3, tune=2, progress=False, backend=None)
    assert len(tqcompile.report(model).layers) == (2 if tied else 3)
    tqcompile.save(model, tmp_path / "plain")
    reloaded = tqcompile.load(tmp_path / "plain", model=fresh)
    assert reloaded is fresh
    assert same_state(reloaded, model)
    assert torch.equal(reloaded(ids), model(ids))
    assert tqcompile.report(reloaded) == tqcompile.report(model)
    tqcompile.save(reloaded, tmp_path / "plain")
    torch.manual_seed(1)
    assert torch.equal(tqcompile.load(tmp_path / "plain", model=Plain(tied))(ids), model(ids))
    with pytest.raises(CheckpointError, match="pass the module to fill as model="):
        tqcompile.load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="dtype cannot be combined with model="):
        tqcompile.load(tmp_path / "plain", model=Plain(tied), dtype=torch.float16)


def test_saving_over_its_own_checkpoint(saved, model):
    reloaded = tqcompile.load(saved)
    before = files_of(saved)
    (saved / "left over").write_text("from an older version")
    tqcompile.save(reloaded, saved)
    assert set(files_of(saved)) == set(before)
    assert torch.equal(logits(tqcompile.load(saved)), logits(model))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_directory_that_is_not_ours_is_not_touched(model, tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "one.jpg").write_bytes(b"123")
    file = tmp_path / "file"
    file.write_text("text")
    for target in (foreign, file):
        with pytest.raises(CheckpointError, match="exists and is not a tqcompile checkpoint"):
            tqcompile.save(model, target)
    assert files_of(foreign) == {"one.jpg": b"123"}
    assert file.read_text() == "text"
    empty = tmp_path / "new" / "empty"
    empty.mkdir(parents=True)
    tqcompile.save(model, empty)
    assert (empty / MANIFEST).is_file()


def test_a_model_that_is_not_quantized_cannot_be_saved(tmp_path):
    with pytest.raises(ModelError, match=r"call tqcompile\.compile first"):
        tqcompile.save(tiny("Llama"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


class Interrupted(BaseException):
    pass


def fail(*_args, **_kwargs):
    raise Interrupted


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("where", ["tensors", "manifest", "move away", "move in"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(monkeypatch, model, tmp_path, exists, where):
    target = tmp_path / "model"
    if exists:
        tqcompile.save(model, target)
    before = files_of(target) if exists else None
    if where == "tensors":
        real = model.save_pretrained

        def partly(directory, **options):
            real(directory, **options)
            raise Interrupted

        monkeypatch.setattr(model, "save_pretrained", partly)
    elif where == "manifest":
        monkeypatch.setattr(checkpoint, "hash_tensors", fail)
    else:
        if where == "move away" and not exists:
            pytest.skip("nothing to move away")
        real_rename = Path.rename

        def rename(self, to):
            if (self.name == "model") if where == "move away" else (self.name == "new"):
                raise Interrupted
            return real_rename(self, to)

        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Interrupted):
        tqcompile.save(model, target)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if exists else [])
    if exists:
        assert files_of(target) == before
    tqcompile.save(model, target)
    assert torch.equal(logits(tqcompile.load(target)), logits(model))


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensors(file, header, body):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


LAYER = "model.layers.1.mlp.up_proj"
PACKED = f"{LAYER}.residual.weight_packed"


def truncate(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def truncate_header(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_file(d):
    (d / "model.safetensors").write_bytes(b"")


def flip(d):
    file = d / "model.safetensors"
    header, body = header_of(file)
    body = bytearray(body)
    body[header[PACKED]["data_offsets"][0] + 5] ^= 1
    write_tensors(file, header, bytes(body))


def drop(d):
    file = d / "model.safetensors"
    header, body = header_of(file)
    del header[PACKED]
    write_tensors(file, header, body)


def rename(d):
    file = d / "model.safetensors"
    header, body = header_of(file)
    header[f"{PACKED}_old"] = header.pop(PACKED)
    write_tensors(file, header, body)


def reshape(d):
    file = d / "model.safetensors"
    header, body = header_of(file)
    header[PACKED]["shape"].reverse()
    write_tensors(file, header, body)


def no_tensors(d):
    (d / "model.safetensors").unlink()


def layer_of(d, **changes):
    edit_json(d / "config.json", lambda c: c["quantization_config"]["modules"][LAYER].update(changes))


def quantization(d, change):
    edit_json(d / "config.json", lambda c: change(c["quantization_config"]))


def unverified(d, damage):
    """The same damage in a checkpoint without a manifest."""
    (d / MANIFEST).unlink()
    damage(d)


def rename_layer(q):
    q["modules"]["model.layers.7.mlp.up_proj"] = q["modules"].pop(LAYER)


DAMAGES = {
    "truncated": (truncate, "model.safetensors is truncated: tensor "),
    "truncated header": (truncate_header, "model.safetensors is truncated: its header"),
    "empty file": (empty_file, "model.safetensors is truncated"),
    "flipped bit": (flip, f"tensor {PACKED} differs from {MANIFEST}"),
    "missing tensor": (drop, f"tensor {PACKED} is missing"),
    "renamed tensor": (rename, f"tensor {PACKED}_old is not in {MANIFEST}"),
    "reshaped tensor": (reshape, f"tensor {PACKED} differs from {MANIFEST}"),
    "unverified missing tensor": (lambda d: unverified(d, drop), f"tensor {PACKED} is missing"),
    "unverified shape": (
        lambda d: unverified(d, reshape),
        f"tensor {PACKED} is U8 [64, 192], but its layer needs U8 [192",
    ),
    "manifest is no JSON": (lambda d: (d / MANIFEST).write_text("{"), f"{MANIFEST} is not valid JSON"),
    "manifest is a list": (lambda d: (d / MANIFEST).write_text("[]"), f"{MANIFEST} lists no tensors"),
    "other shape": (
        lambda d: layer_of(d, out_features=194),
        f"{LAYER}: the checkpoint describes a layer of shape (194, 128)",
    ),
    "other rank": (lambda d: layer_of(d, rank=8), f"tensor {LAYER}.down.weight_packed is U8 [16, 64]"),
    "odd rank": (lambda d: layer_of(d, rank=7), f"{LAYER}: impossible layer description"),
    "other group size": (
        lambda d: layer_of(d, group_size=32),
        f"tensor {LAYER}.residual.weight_scale is BF16 [192, 2]",
    ),
    "group size zero": (lambda d: layer_of(d, group_size=0), f"{LAYER}: impossible layer description"),
    "text as rank": (lambda d: layer_of(d, rank="16"), f"{LAYER}: impossible layer description"),
    "unknown width": (lambda d: layer_of(d, act_bits=5), f"{LAYER}: impossible layer description"),
    "no ratio": (lambda d: layer_of(d, act_ratio=0.0), f"{LAYER}: impossible layer description"),
    "signs of another block": (lambda d: layer_of(d, rotation_signs="0f"), f"{LAYER}: impossible layer description"),
    "code as signs": (
        lambda d: layer_of(d, rotation_signs="__import__('os')"),
        f"{LAYER}: impossible layer description",
    ),
    "plausible ratio": (lambda d: layer_of(d, act_ratio=0.07), f"{LAYER}: its description in config.json differs"),
    "plausible signs": (
        lambda d: layer_of(d, rotation_signs="0123456789abcdef" * 2),
        f"{LAYER}: its description in config.json differs",
    ),
    "code as dtype": (lambda d: layer_of(d, bias_dtype="load"), f"{LAYER}: impossible layer description"),
    "unknown field": (lambda d: layer_of(d, extra=1), f"{LAYER}: malformed layer description"),
    "other layer": (lambda d: quantization(d, rename_layer), "model.layers.7.mlp.up_proj: no linear layer"),
    "newer format": (lambda d: quantization(d, lambda q: q.update(format_version=2)), "checkpoint format 2 is not 1"),
    "no modules": (lambda d: quantization(d, lambda q: q.update(modules=None)), "describes no modules"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_every_damage_is_named(saved, damage, way):
    from transformers import AutoModelForCausalLM

    change, message = DAMAGES[damage]
    change(saved)
    read = tqcompile.load if way == "load" else AutoModelForCausalLM.from_pretrained
    with pytest.raises(CheckpointError) as caught:
        read(saved)
    assert message in str(caught.value)


FOREIGN = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "has quant_method None"),
    "not quantized": (
        lambda d: edit_json(d / "config.json", lambda c: c.pop("quantization_config")),
        "quant_method None",
    ),
    "another method": (lambda d: quantization(d, lambda q: q.update(quant_method="awq")), "has quant_method 'awq'"),
    "no architecture": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=[])),
        "names no transformers architecture",
    ),
    "a function": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=["pipeline"])),
        "has no model class 'pipeline'",
    ),
    "no tensors": (no_tensors, None),
    "report": (lambda d: edit_json(d / MANIFEST, lambda m: m["report"].pop("layers")), "holds no readable report"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_directories_are_named(saved, case):
    change, message = FOREIGN[case]
    change(saved)
    with pytest.raises((CheckpointError, OSError) if message is None else CheckpointError) as caught:
        tqcompile.load(saved)
    assert (message or "safetensors") in str(caught.value)


def test_a_failed_load_leaves_a_plain_module_unchanged(tmp_path):
    torch.manual_seed(0)
    model = Plain()
    tqcompile.compile(model, group_size=32, rank=8, progress=False, backend=None)
    tqcompile.save(model, tmp_path / "plain")
    edit_json(tmp_path / "plain" / "config.json", lambda c: c["quantization_config"]["modules"]["head"].update(rank=10))
    fresh = Plain()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match=r"tensor head\.down\.weight_packed"):
        tqcompile.load(tmp_path / "plain", model=fresh)
    assert not any(isinstance(module, TwinLinear) for module in fresh.modules())
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())


def test_no_single_altered_byte_of_a_file_passes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4))
    tqcompile.compile(model, scheme="rtn-w4a16", group_size=32, progress=False, backend=None)
    tqcompile.save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    header, _ = header_of(file)
    expected = verify_files([file])
    length = int.from_bytes(data[:8], "little")
    for index in range(len(data)):
        for bit in (1, 0x20, 0x80):
            changed = bytearray(data)
            changed[index] ^= bit
            file.write_bytes(changed)
            try:
                found = verify_files([file])
            except CheckpointError:
                continue
            # Only what carries no tensor may change: the header's padding and its free-text metadata.
            assert found == expected
            assert 8 <= index < 8 + length
            assert header_of(file)[0].keys() - {"__metadata__"} == header.keys() - {"__metadata__"}


LOAD = """
import sys
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[1, 5, 9, 2]])
with torch.no_grad():
    out = model(input_ids=ids).logits
print(type(model.model.layers[0].mlp.up_proj).__name__, out.double().sum().item().hex())
"""
IMPORTS = {
    "before": "import tqcompile\nfrom transformers import AutoModelForCausalLM",
    "after": "from transformers import AutoModelForCausalLM\nimport tqcompile",
}


def run_python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.parametrize("order", IMPORTS)
def test_from_pretrained_in_a_fresh_process(saved, model, order):
    kind, total = run_python(LOAD.format(imports=IMPORTS[order]), saved).split()
    assert kind == "TwinLinear"
    assert float.fromhex(total) == logits(model, torch.tensor([[1, 5, 9, 2]])).double().sum().item()


def test_importing_tqcompile_loads_nothing_heavy():
    heavy = ["torch", "triton", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "networkx", "rich"]
    code = f"""
import sys, tqcompile
print([m for m in {heavy!r} + ["safetensors", "tqcompile.hf"] if m in sys.modules])
tqcompile.Config()
print("torch" in sys.modules)
"""
    assert run_python(code).split("\n")[:2] == ["[]", "False"]
