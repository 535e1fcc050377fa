"""Which launch configuration a kernel uses: what ``tqcompile tune`` measured here, else what ships, else nothing.

A kernel module that can be tuned offers ``candidates(n, k, t, form) -> list[dict]`` and takes ``config=`` in
``launch``. Its launcher asks :func:`config_for`; on None it follows its own rule. Nothing is tuned at a launch.
A configuration found for one shape may be handed to another of the same class, so a launcher checks what must
divide its shape. Measured results live in one JSON file, for one GPU name, Triton version and exact shape;
shipped ones in ``tuning_table.json``, for a class of GPUs and of shapes.
"""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

log = logging.getLogger("tqcompile")

VERSION = 1
SHIPPED = Path(__file__).with_name("tuning_table.json")
ENVIRONMENT = "TQCOMPILE_CACHE"
_LEVELS = ("gpu", "triton", "op", "form", "shape", "tokens")  # of the nested objects in the cache file


@dataclasses.dataclass(frozen=True)
class TuneKey:
    """What a configuration was measured for. gpu: full device name; form: see :func:`form_of`; t: tokens."""

    op: str
    gpu: str
    triton: str
    form: str
    n: int
    k: int
    t: int

    @staticmethod
    def here(op: str, gpu: str, n: int, k: int, t: int, form: str) -> "TuneKey":
        """The key on this machine: its Triton version is filled in."""
        return TuneKey(op, gpu, triton_version(), form, n, k, t)

    @property
    def path(self) -> tuple[str, ...]:
        """Where it stands in the cache file."""
        return (self.gpu, self.triton, self.op, self.form, f"{self.n}x{self.k}", str(self.t))


@functools.cache
def triton_version() -> str:
    """The installed Triton's version, "none" without one; Triton itself is not imported."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def gpu_name(index: int) -> str:
    """Name of a CUDA device."""
    return torch.cuda.get_device_name(index)


def form_of(operand: torch.dtype, grid: bool, group: int, rank: int) -> str:
    """The form of a matrix product: its operand's dtype, grid scales or the group size, and the rank (0: none)."""
    return f"{str(operand).removeprefix('torch.')}-{'grid' if grid else f'g{group}'}-r{rank}"


def gpu_class(gpu: str) -> str:
    """ "H100" or "H200" from a device name (a GH200 counts as an H200); any other GPU is a class of its own."""
    found = re.search(r"H[12]00", gpu)
    return found.group() if found else gpu


def shape_class(n: int, k: int) -> str:
    """Shapes whose sides round to the same powers of two: 28672 x 4096 and 24576 x 4096 are "2^15x2^12"."""
    return f"2^{round(math.log2(n))}x2^{round(math.log2(k))}"


def cache_file() -> Path:
    """The file of measured configurations: in the folder TQCOMPILE_CACHE, else in the user's cache folder."""
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT]) / "tuning.json"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tqcompile" / "tuning.json"


def config_for(op: str, gpu: str, n: int, k: int, t: int, form: str) -> Mapping | None:
    """The configuration to launch with, or None where none is known. Costs a dictionary look-up after the first call.

    Args:
        op: e.g. "twin_gemm". gpu: the device's name. n, k: the weight is (N, K). t: tokens. form: see form_of.
    """
    step = max(1, (1 << max(0, t - 1).bit_length()) // 8)  # four numbers of tokens between two powers of two
    return _config_for(op, gpu, n, k, -(-t // step) * step, form)


@functools.lru_cache(maxsize=4096)
def _config_for(op: str, gpu: str, n: int, k: int, t: int, form: str) -> Mapping | None:
    return lookup(TuneKey.here(op, gpu, n, k, t, form))


def lookup(key: TuneKey) -> Mapping | None:
    """Measured for this very shape, else shipped for its class. Of several numbers of tokens: the next larger, if
    it is at most twice as large."""
    *measured, _ = key.path
    found = _nearest(_descend(_measured(), measured), key.t)
    if found is None:
        shipped = (gpu_class(key.gpu), key.op, key.form, shape_class(key.n, key.k))
        found = _nearest(_descend(_shipped(), shipped), key.t)
    return None if found is None else MappingProxyType(found["config"])


def store(results: Mapping[TuneKey, Mapping]) -> Path:
    """Add results to the cache file: key -> {"config": dict, "us": microseconds}. Returns the file.

    The file is replaced as a whole, so a reader sees the old or the new one; a damaged one is replaced, with a warning.
    Raises:
        OSError: the folder cannot be written.
    """
    path = cache_file()
    entries = _read(path)
    for key, result in results.items():
        *above, last = key.path
        place = entries
        for part in above:
            place = place.setdefault(part, {})
        place[last] = {"config": dict(result["config"]), "us": float(result["us"])}
    write_json(path, {"version": VERSION, "levels": list(_LEVELS), "entries": entries})
    forget()
    return path


def forget() -> None:
    """Read the files again at the next look-up."""
    for cached in (_measured, _shipped, _config_for):
        cached.cache_clear()


def to_shipped(gpu: str, triton: str) -> dict:
    """What was measured on one GPU in the form of ``tuning_table.json``: by class of GPU and of shape.

    Of two shapes in one class the one with more weights stays.
    """
    table: dict = {}
    for op, forms in _descend(_measured(), (gpu, triton)).items():
        for form, shapes in forms.items():
            by_size = sorted(shapes, key=lambda text: math.prod(map(int, text.split("x"))))
            for text in by_size:
                place = table.setdefault(gpu_class(gpu), {}).setdefault(op, {}).setdefault(form, {})
                place[shape_class(*map(int, text.split("x")))] = shapes[text]
    return {"version": VERSION, "triton": triton, "entries": table}


def write_json(path: Path, content: dict) -> None:
    """Write beside the destination, then move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _measured() -> dict:
    return _read(cache_file())


@functools.cache
def _shipped() -> dict:
    return _read(SHIPPED)


def _read(path: Path) -> dict:
    """The entries of a file; {} where there is none, or, with a warning, where it cannot be used."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _ignored(path, f"it is not readable JSON ({error})")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return _ignored(path, f"it is not of version {VERSION}")
    entries = content.get("entries")
    fault = _fault(entries)
    return entries if fault is None else _ignored(path, fault)


def _fault(entries, where: str = "entries") -> str | None:
    """What is wrong in nested objects whose leaves hold a config and a time, or None."""
    if not isinstance(entries, dict):
        return f"{where} is not an object"
    if "config" in entries:
        config = entries["config"]
        plain = isinstance(config, dict) and all(isinstance(v, int | float | str | bool) for v in config.values())
        return None if plain else f"{where} has a config that is not an object of plain values"
    return next((fault for key, value in entries.items() if (fault := _fault(value, f"{where}/{key}"))), None)


def _ignored(path: Path, why: str) -> dict:
    log.warning("tuning: %s is ignored: %s. Delete it, or run `tqcompile tune` to write a new one.", path, why)
    return {}


def _descend(entries: dict, path: Iterable[str]) -> dict:
    for part in path:
        entries = entries.get(part)
        if not isinstance(entries, dict) or "config" in entries:
            return {}
    return entries


def _nearest(by_tokens: dict, t: int) -> dict | None:
    """The entry of the next larger number of tokens, at most twice as many: further away the best form is another."""
    tuned = sorted(int(text) for text, found in by_tokens.items() if text.isdigit() and "config" in found)
    near = [tokens for tokens in tuned if t <= tokens <= 2 * t]
    return by_tokens[str(near[0])] if near else None
