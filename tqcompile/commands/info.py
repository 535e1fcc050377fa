"""``tqcompile info``: what this machine can run, and why not the rest."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import tqcompile
from tqcompile import ops
from tqcompile.commands import files, memory
from tqcompile.kernels import tuning
from tqcompile.ops import dispatch

EXTRAS = {"gpu": ("triton",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def collect() -> dict[str, Any]:
    """The facts of ``tqcompile info``. A reason that is None means: it runs here."""
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    free = memory.available()
    return {
        "tqcompile": tqcompile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers")[0],
        "cpu_cores": os.cpu_count(),
        "memory_available_bytes": free,
        "gpus": gpus,
        "gpu_reason": None if gpus else _why_no_gpu(),
        "kernels": {op: _why_no_kernel(op, bool(gpus)) for op in kernels()},
        "extras": {name: _why_no_extra(modules) for name, modules in EXTRAS.items()},
        "tuning": _tuning(),
    }


def run(json: Path | None = None) -> dict[str, Any]:
    """Print what :func:`collect` finds."""
    files.check_file(json, "--json")
    found = collect()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for key in ("tqcompile", "python", "torch", "transformers"):
        console.print(f"{key} {found[key]}")
    free = found["memory_available_bytes"]
    console.print(
        f"cpu: {found['cpu_cores']} cores, {'unknown' if free is None else f'{free / 1e9:.1f} GB'} free memory"
    )
    for gpu in found["gpus"]:
        console.print(f"gpu: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB")
    if found["gpu_reason"]:
        console.print(f"gpu: none; {found['gpu_reason']}")
    for op, reason in found["kernels"].items():
        console.print(f"kernel {op}: {reason or 'runs'}")
    for name, reason in found["extras"].items():
        console.print(f"extra {name}: {reason or 'installed'}")
    console.print(f"tuning: {found['tuning']}")
    files.write_json(json, found)
    return found


def kernels() -> list[str]:
    """Names of the ops that have a kernel module of their name."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return [name for name in names if importlib.util.find_spec(f"tqcompile.kernels.{name}")]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory}


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; models run on the CPU as plain torch"
    return "torch finds no NVIDIA GPU (torch.cuda.is_available() is False); models run on the CPU as plain torch"


def _why_no_kernel(op: str, gpu: bool) -> str | None:
    """The reason for the op as a whole; the backend names what a layer's shapes rule out."""
    missing = dispatch.missing(op)
    if missing is not None or not gpu:
        return missing or "no GPU: plain torch runs instead"
    return importlib.import_module("tqcompile.kernels.twin_linear").device_reason(torch.device("cuda", 0))


def _why_no_extra(modules: tuple[str, ...]) -> str | None:
    missing = [reason for _, reason in map(_version, modules) if reason]
    return "; ".join(missing) or None


def _version(name: str) -> tuple[str | None, str | None]:
    """(version, None) of an installed package that can be imported, else (None, reason)."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a package may fail at import in any way, e.g. for a missing shared library
        return None, f"{name} cannot be imported ({error})"
    return getattr(module, "__version__", None) or importlib.metadata.version(name), None


def _tuning() -> str:
    file = tuning.cache_file()
    return f"measured configurations in {file}" if file.is_file() else f"none measured here ({file} does not exist)"
