"""The files of a checkpoint, read without trusting them: JSON, the index of shards, safetensors headers and checksums.

Every size is compared with the file before anything is allocated, no path leaves the directory, and whatever is wrong
is a CheckpointError that names the file or tensor.
"""

import hashlib
import json
import math
import typing
from pathlib import Path
from typing import Any

from tqcompile.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
MAX_SIZE = 1 << 40  # of one dimension
_CHUNK = 1 << 24
_ELEMENT = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_ELEMENT |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises CheckpointError on text that is not UTF-8, not JSON, or nested without end."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged.") from error


def check_directory(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse what would make transformers read outside of the directory, or fetch anything.

    Raises:
        CheckpointError: an index names a file elsewhere; the settings name other weights or code from the Hub; or there
            is an adapter, which stands for another model.
    """
    for path in sorted(directory.glob("*.index.json")):
        index = read_json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{path} maps no tensors to files; the checkpoint is damaged.")
        for name in sorted(set(files.values())):
            # Both separators, whatever this machine's is; the names of our shards have none.
            if "/" in name or "\\" in name or name in ("", ".", ".."):
                raise CheckpointError(f"{path}: the file {name!r} leaves the checkpoint's directory; it is not opened.")
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} holds no .safetensors file; other formats are never opened.")
    if settings.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{directory / 'config.json'} sets transformers_weights; a checkpoint names no other file."
        )
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory} holds an adapter_config.json, which stands for another model; remove it.")
    _refuse_kernels(settings, directory / "config.json")


def _refuse_kernels(value: Any, path: Path) -> None:
    """Attention and expert implementations of the form owner/name are code that transformers would download."""
    pending = [("", value)]
    while pending:
        key, found = pending.pop()
        if isinstance(found, dict):
            pending += [(name if "implementation" not in key else key, part) for name, part in found.items()]
        elif isinstance(found, list):
            pending += [(key, part) for part in found]
        elif isinstance(found, str) and "implementation" in key and "/" in found:
            raise CheckpointError(f"{path}: {key} {found!r} is code from the Hub, which is never run.")


def tensor_shapes(files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape), read from the headers alone. Raises CheckpointError on a damaged header."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    part = opened.get_slice(name)
                    found[name] = (part.get_dtype(), part.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); it is damaged or not complete.") from error
    return found


def hash_tensors(file: Path) -> dict[str, dict]:
    """Tensor name -> {"dtype", "shape", "sha256"} of a safetensors file, read without building tensors."""
    size = file.stat().st_size
    entries = {}
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file.name} is truncated: its header does not fit in {size} bytes.")
        if length > MAX_HEADER:
            raise CheckpointError(f"{file.name} has a damaged header ({length} bytes long).")
        for name, info, begin, end in _entries(file.name, stream.read(length), size - 8 - length):
            stream.seek(8 + length + begin)
            digest, left = hashlib.sha256(), end - begin
            while left > 0:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{file.name} is truncated: tensor {name} ends after the end of the file.")
                digest.update(chunk)
                left -= len(chunk)
            entries[name] = {"dtype": info["dtype"], "shape": info["shape"], "sha256": digest.hexdigest()}
    return entries


def _entries(file: str, text: bytes, room: int) -> list[tuple[str, dict, int, int]]:
    """(name, entry, begin, end) of a header in the file's order, checked against each other and the file's size."""
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error!r}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged header (no object).")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} has a damaged header (__metadata__ {metadata!r}).")
    found = [(name, info, *_extent(file, name, info, room)) for name, info in header.items()]
    found.sort(key=lambda entry: entry[2:])
    end_before = 0
    for name, _, begin, end in found:
        if begin < end_before:
            raise CheckpointError(f"{file} has a damaged header (tensor {name} overlaps the one before it).")
        end_before = end
    return found


def _extent(file: str, name: str, info: Any, room: int) -> tuple[int, int]:
    """(begin, end) of a tensor in the bytes after the header."""
    info = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    element = _ELEMENT.get(dtype) if isinstance(dtype, str) else None
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape)
    places = isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)
    if element is None or not sizes or not places or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file} has a damaged header (tensor {name}: {info!r}).")
    begin, end = offsets
    if not 0 <= begin <= end or end - begin != math.prod(shape) * element:
        raise CheckpointError(f"{file} has a damaged header (tensor {name}: {dtype} {shape} at {offsets}).")
    if end > room:
        raise CheckpointError(f"{file} is truncated: tensor {name} ends after the end of the file.")
    return begin, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of JSON pairs. Of a name given twice, readers do not agree which to take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def check_types(record: Any) -> Any:
    """A dataclass instance made of JSON, as it is. Raises TypeError naming a field whose value is not of its type."""
    for name, wanted in typing.get_type_hints(type(record)).items():
        value, kinds = getattr(record, name), typing.get_args(wanted) or (wanted,)
        if typing.get_origin(wanted) is tuple:
            fits = isinstance(value, tuple) and [type(part) for part in value] == list(kinds)
        else:
            fits = type(value) in kinds or (float in kinds and type(value) is int)
        if not fits:
            raise TypeError(f"{name} is {value!r}")
    return record
