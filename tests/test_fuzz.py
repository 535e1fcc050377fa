"""Damaged and hostile checkpoints and packed bytes: a named error or a model that runs, and nothing else.

TQCOMPILE_FUZZ sets the number of cases of each property (a few hundred without it).
"""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import SETTINGS, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import ops
from tqcompile.checkpoint import MANIFEST, verify_files
from tqcompile.errors import CheckpointError
from tqcompile.ops.packing import MAX_MULTIPLE, dequantize_int4, integer_scales, pack_int4, unpack_int4

CASES = int(os.environ.get("TQCOMPILE_FUZZ", "150"))
FEW = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="TQCOMPILE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
CONFIG, TENSORS = "config.json", "model.safetensors"


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """File name -> bytes of a small checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    tqcompile.save(tqcompile.compile(plain(), rank=8, group_size=32, progress=False, backend=None), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lay(folder: Path, content: dict[str, bytes]) -> Path:
    for file in folder.iterdir():
        file.unlink()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def load_or_refuse(folder: Path) -> nn.Module | None:
    """The model, if it loads; None if it is refused with the error for that. Anything else fails the test."""
    fresh = plain()
    before = {name: id(module) for name, module in fresh.named_modules()}
    try:
        model = tqcompile.load(folder, model=fresh)
    except CheckpointError:
        assert {name: id(module) for name, module in fresh.named_modules()} == before
        return None
    assert model(torch.ones(3, 64)).shape == (3, 16)
    assert tqcompile.report(model).to_dict()
    str(tqcompile.report(model))
    return model


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 140),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["../../x", "/etc/passwd", "F32", "float32", "load", "__class__", "0", "3", "0.weight", "3.down"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def change_somewhere(data: st.DataObject, tree: object) -> object:
    """The tree with one value replaced, dropped, renamed or doubled, at any depth."""
    if not isinstance(tree, dict | list) or not tree or data.draw(st.integers(0, 9)) == 0:
        return data.draw(values)
    keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
    key = data.draw(st.sampled_from(list(keys)))
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    action = data.draw(st.sampled_from(["into", "into", "into", "drop", "rename"]))
    if action == "into":
        changed[key] = change_somewhere(data, tree[key])
    elif action == "drop":
        del changed[key]
    elif isinstance(changed, dict):
        changed[data.draw(st.text(max_size=8) | st.sampled_from(list(keys)))] = changed.pop(key)
    else:
        changed.append(data.draw(values))
    return changed


@FEW
@given(st.data())
def test_changed_json(tmp_path, original, data):
    content = dict(original)
    if data.draw(st.booleans()):
        del content[MANIFEST]
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([n for n in (CONFIG, MANIFEST, TENSORS) if n in content]))
        if name == TENSORS:
            header, body = split(content[name])
            content[name] = join(change_somewhere(data, header), body)
        else:
            content[name] = json.dumps(change_somewhere(data, json.loads(content[name]))).encode()
    load_or_refuse(lay(tmp_path, content))


@FEW
@given(st.data())
def test_changed_bytes(tmp_path, original, data):
    content = dict(original)
    whole = MANIFEST in content and data.draw(st.booleans())
    if not whole:
        del content[MANIFEST]
    name = data.draw(st.sampled_from(sorted(content)))
    changed = bytearray(content[name])
    # Half of the changes fall into the first bytes: lengths and headers.
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed)) | st.integers(0, min(400, len(changed))))
        action = data.draw(st.sampled_from(["set", "insert", "cut"]))
        if action == "cut":
            del changed[place : place + data.draw(st.integers(1, 64))]
        elif action == "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=16))
        elif place < len(changed):
            changed[place] = data.draw(st.integers(0, 255))
        changed = changed or bytearray(b"\0")
    content[name] = bytes(changed)
    model = load_or_refuse(lay(tmp_path, content))
    if model is not None and whole and name == TENSORS:
        # Only what carries no tensor can have changed.
        expected = tqcompile.load(lay(tmp_path, original), model=plain())
        assert torch.equal(model(torch.ones(2, 64)), expected(torch.ones(2, 64)))


@FEW
@given(st.binary(max_size=300))
def test_any_bytes_as_tensors(tmp_path, original, data):
    content = {**original, TENSORS: data}
    assert load_or_refuse(lay(tmp_path, content)) is None


@FEW
@given(st.data())
def test_headers_that_lie(tmp_path, original, data):
    """Offsets and shapes at random: a description that does not fit its file is refused before tensors are made."""
    header, body = split(original[TENSORS])
    name = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    sizes = st.integers(-2, 200) | st.sampled_from([2**31, 2**62, 2**64])
    entry = dict(header[name])
    if data.draw(st.booleans()):
        entry["data_offsets"] = data.draw(st.lists(sizes, min_size=1, max_size=3))
    if data.draw(st.booleans()):
        entry["shape"] = data.draw(st.lists(sizes, max_size=4))
    if data.draw(st.booleans()):
        entry["dtype"] = data.draw(st.sampled_from(["F32", "F64", "BOOL", "U8", "I64", "BF16", "F8_E4M3", "NOPE", ""]))
    assume(entry != header[name])
    content = {**original, TENSORS: join({**header, name: entry}, body)}
    assert load_or_refuse(lay(tmp_path, content)) is None
    del content[MANIFEST]
    load_or_refuse(lay(tmp_path, content))


@FEW
@given(st.data())
def test_packed_bytes(data):
    rows, columns = data.draw(st.integers(1, 5)), 2 * data.draw(st.integers(1, 9))
    raw = np.frombuffer(data.draw(st.binary(min_size=rows * columns // 2, max_size=rows * columns // 2)), np.uint8)
    packed = torch.from_numpy(raw.reshape(rows, columns // 2).copy())
    found = unpack_int4(packed)
    expected = np.stack([(raw & 15), raw >> 4], -1).astype(np.int8).reshape(rows, columns)
    expected = np.where(expected > 7, expected - 16, expected)
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(pack_int4(found), packed)
    bits = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=rows, max_size=rows))
    scale = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)[:, None]
    wanted = torch.from_numpy(expected).double() * scale.double()
    assert torch.equal(dequantize_int4(packed, scale).double().nan_to_num(1.5), wanted.float().double().nan_to_num(1.5))


@FEW
@given(st.data())
def test_any_scales_have_an_exact_integer_form_or_none(data):
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    patterns = st.integers(0, 2**16 - 1) | st.integers(0x3C00, 0x3C40)
    bits = data.draw(st.lists(patterns, min_size=rows * groups, max_size=rows * groups))
    scale = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(rows, groups)
    found = integer_scales(scale)
    if found is not None:
        c, m = found
        assert 1 <= int(m.min()) <= int(m.max()) <= MAX_MULTIPLE
        assert torch.equal(c.double()[:, None] * m.double(), scale.double())


@FEW
@given(st.data())
def test_a_layer_of_any_bytes_computes_or_refuses(data):
    n, k, r = 2 * data.draw(st.integers(1, 4)), 32 * data.draw(st.integers(1, 3)), 8
    seed = data.draw(st.integers(0, 2**32))
    g = torch.Generator().manual_seed(seed)

    def packed(rows, columns):
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g)

    def scales(rows, groups):
        return torch.randint(-(2**15), 2**15, (rows, groups), generator=g, dtype=torch.int16).view(torch.bfloat16)

    x, xs = torch.randint(-128, 128, (3, k), generator=g, dtype=torch.int8), torch.rand(3, 1, generator=g)
    weights = (packed(n, k), scales(n, k // 32), packed(r, k), scales(r, k // 32), packed(n, r), scales(n, 1))
    y = ops.twin_linear(x, xs, *weights, None, 0.0, torch.float32)
    assert y.shape == (3, n)
    assert y.dtype == torch.float32


# Hand-made evil files. Each is refused fast, with the reason, and without the memory that it asks for.


@pytest.fixture(scope="module")
def model():
    return tqcompile.compile(tiny("Qwen3"), tokens(), **{**SETTINGS, "scheme": "rtn-w4a8"})


@pytest.fixture
def saved(model, tmp_path):
    tqcompile.save(model, tmp_path / "m")
    return tmp_path / "m"


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def index_to(name: str):
    """A checkpoint whose index sends every tensor to another file, which is moved there."""

    def change(folder: Path) -> None:
        # An absolute path must exist to be stolen from; one inside of the test's folder does.
        target = f"{folder.parent}{name}" if name.startswith("/") else name
        place = folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        header, _ = split((folder / TENSORS).read_bytes())
        (folder / TENSORS).rename(place)
        names = [name for name in header if name != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def huge_header(folder: Path) -> None:
    with (folder / TENSORS).open("wb") as stream:
        stream.write((10**9).to_bytes(8, "little"))
        stream.truncate(8 + 10**9 + 10)  # sparse: takes no room on the disk


EVIL = {
    "index to the folder above": (index_to("../stolen.safetensors"), "leaves the checkpoint"),
    "index to an absolute path": (index_to("/stolen/x.safetensors"), "leaves the checkpoint"),
    "index into a folder": (index_to("inner/x.safetensors"), "leaves the checkpoint"),
    "index that is no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "model.safetensors.index.json is not valid JSON",
    ),
    "index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "model.safetensors.index.json maps no tensors",
    ),
    "weights by another name": (
        lambda d: edit(d / CONFIG, lambda c: c.update(transformers_weights="../x.safetensors")),
        "transformers_weights",
    ),
    "a kernel from the Hub": (
        lambda d: edit(d / CONFIG, lambda c: c.update(attn_implementation="evil/kernel")),
        "attn_implementation",
    ),
    "a kernel from the Hub, underscored": (
        lambda d: edit(d / CONFIG, lambda c: c.update(_attn_implementation_internal="evil/kernel")),
        "attn_implementation",
    ),
    "a header of a gigabyte": (huge_header, "header"),
    "deep config": (lambda d: deep(d / CONFIG), "is not valid JSON"),
    "deep manifest": (lambda d: deep(d / MANIFEST), "is not valid JSON"),
    "config of broken text": (lambda d: (d / CONFIG).write_bytes(b'{"a": "\xff"}'), "is not valid JSON"),
    "manifest of broken text": (lambda d: (d / MANIFEST).write_bytes(b'{"a": "\xff"}'), "is not valid JSON"),
    "a pickle beside": (
        lambda d: ((d / TENSORS).unlink(), (d / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")),
        "holds no .safetensors file",
    ),
    "an adapter of another model": (
        lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}'),
        "adapter_config.json",
    ),
}


@pytest.mark.parametrize("case", EVIL)
def test_evil_checkpoints_are_refused(saved, case, monkeypatch):
    def connect(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    change, message = EVIL[case]
    change(saved)
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        tqcompile.load(saved)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("case", [case for case in EVIL if "index to" in case or "index into" in case])
def test_from_pretrained_stays_in_the_directory_too(saved, case):
    from transformers import AutoModelForCausalLM

    EVIL[case][0](saved)
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_code_beside_a_checkpoint_is_not_run(saved):
    (saved / "evil.py").write_text("raise SystemExit('ran')\n")
    (saved / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    edit(saved / CONFIG, lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}))
    ids = tokens(2, 5)
    tqcompile.load(saved).generate(ids, max_new_tokens=2, do_sample=False)


def test_patterns_in_a_checkpoint_are_not_matched(saved):
    pattern = "re:(a+)+$"
    edit(saved / CONFIG, lambda c: c["quantization_config"]["config"].update(ignore=[pattern]))
    began = time.perf_counter()
    tqcompile.load(saved)
    assert time.perf_counter() - began < 5


def test_truncated_anywhere(tmp_path, original):
    file = tmp_path / TENSORS
    data = original[TENSORS]
    for end in [*range(64), *range(64, len(data), max(1, len(data) // 50))]:
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            verify_files([file])
