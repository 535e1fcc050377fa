"""Finished blocks of a run, kept on disk, so that an interrupted run goes on behind the last of them.

A folder holds ``run.json``, what the run was started with, and one ``<block>.safetensors`` a finished block: its
quantized layers, its vectors (gains and biases of norms), and as metadata what the report says of it. Files are written
under another name, flushed and renamed, so whatever has its name is whole. Hidden states are not stored: a resumed run
pushes the data through the finished blocks again, and every later block sees what it would have seen.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqcompile import __version__, distributed
from tqcompile.calibration import Unit, device_of
from tqcompile.checkpoint import PARTIAL
from tqcompile.config import Config
from tqcompile.data import Batch
from tqcompile.errors import CheckpointError, ConfigError
from tqcompile.methods.components import LinearSpec
from tqcompile.modules import QUANTIZED, empty_layer
from tqcompile.passes.correct_norm_mean import ShiftedNorm, insert_shift
from tqcompile.quantize_unit import Job
from tqcompile.reporting import Report

RUN = "run.json"
_RECORDS = ("layers", "blocks", "notes", "spreads")


class FinishedBlocks:
    """The folder of one run. Raises ConfigError when it holds blocks of another one, naming what differs."""

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        batches: list[Batch],
        config: Config,
        state: Mapping[str, torch.Tensor],
    ):
        """state: the model's ``state_dict()``, or what stands for it where the model is not in memory."""
        self._folder = Path(folder)
        started = fingerprint(model, batches, config, state)
        distributed.require_same(started)
        if distributed.first():
            self._prepare(started)
        distributed.check()
        changed = _differences(started, self._folder / RUN)
        if changed:
            raise ConfigError(
                f"{folder} holds the blocks of another run: {', '.join(changed)} changed. Start it as it was started "
                "then, or delete the folder."
            )

    def _prepare(self, started: dict[str, Any]) -> None:
        folder = self._folder
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"{PARTIAL}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            if not (self._folder / RUN).is_file():
                if any(self._folder.iterdir()):
                    raise ConfigError(
                        f"{folder} holds files but no {RUN}; it is not the folder of a run. Name another."
                    )
                self._write(RUN, lambda path: path.write_text(json.dumps(started, indent=1) + "\n"))
        except OSError as error:
            raise ConfigError(f"finished blocks cannot be kept in {folder}: {error}. Name another folder.") from error

    def restore(self, job: Job, unit: Unit) -> bool:
        """Put a block in place as it was when it was finished; False if it was not.

        Raises:
            CheckpointError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._folder / f"{unit.name}.safetensors"
        if not distributed.same(path.is_file()):
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            data = json.loads(metadata["block"])
            specs = {name: LinearSpec(**spec) for name, spec in data["specs"].items()}
            records = Report.from_dict({"config": {}, "skipped": {}, **data["records"]})
            if _digest(tensors) != data["sha256"]:
                raise ValueError("its tensors are not those that were written")
            self._fill(job, unit.name, specs, data["shifted"], tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}). Delete it; its block is then done again.") from error
        for name in _RECORDS:
            getattr(job.report, name).extend(getattr(records, name))
        job.corrected += data["corrected"]
        for site in unit.sites:
            job.bar.advance(site.name)
        return True

    @staticmethod
    def _fill(job: Job, block: str, specs: dict, shifted: list[str], tensors: dict[str, torch.Tensor]) -> None:
        for name, spec in specs.items():
            device = job.model.get_submodule(name).weight.device
            job.journal.replace(name, empty_layer(spec, device=device))
        for name in shifted:
            insert_shift(job.model, name, job.journal)
        inside = job.model.get_submodule(block)
        expected = _state(inside)
        if expected.keys() != tensors.keys():
            raise ValueError(f"other tensors: {sorted(expected.keys() ^ tensors.keys())[:4]}")
        for module in inside.modules():
            if not isinstance(module, QUANTIZED):
                job.journal.remember(module)
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
            expected[name].copy_(tensor)
        for name in specs:
            job.model.get_submodule(name).rebuild()

    def save(self, job: Job, unit: Unit, before: dict[str, int]) -> None:
        """Write a block that was just finished, if this is the first process. before: :func:`counts` when it was begun.

        Raises:
            CheckpointError: the file cannot be written; the blocks before it stay.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not distributed.first():
            return
        block = job.model.get_submodule(unit.name)
        modules = {f"{unit.name}.{name}": module for name, module in block.named_modules()}
        records = {name: getattr(job.report, name)[before[name] :] for name in _RECORDS}
        data = {
            "specs": {name: module.spec.to_dict() for name, module in modules.items() if isinstance(module, QUANTIZED)},
            "shifted": [name for name, module in modules.items() if isinstance(module, ShiftedNorm)],
            "records": {k: [dataclasses.asdict(r) if k != "notes" else r for r in v] for k, v in records.items()},
            "corrected": job.corrected[before["corrected"] :],
        }
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _state(block).items()}
        data["sha256"] = _digest(tensors)
        name, metadata = f"{unit.name}.safetensors", {"block": json.dumps(data)}
        try:
            self._write(name, lambda path: save_file(tensors, path, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._folder / name} cannot be written: {error}. Free some space and resume; the blocks before "
                f"{unit.name} are kept."
            ) from error

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        partial = self._folder / f"{PARTIAL}{name}"
        try:
            write(partial)
            _flush(partial)
            partial.replace(self._folder / name)
            _flush(self._folder)
        finally:
            partial.unlink(missing_ok=True)


def counts(job: Job) -> dict[str, int]:
    """How many records a run has so far, for :meth:`FinishedBlocks.save`."""
    return {name: len(getattr(job.report, name)) for name in _RECORDS} | {"corrected": len(job.corrected)}


def _state(block: nn.Module) -> dict[str, torch.Tensor]:
    """What quantizing may change in a block: everything of its quantized layers, and vectors."""
    quantized = {name: module for name, module in block.named_modules() if isinstance(module, QUANTIZED)}
    found = {f"{n}.{key}": value for n, m in quantized.items() for key, value in m.state_dict(keep_vars=True).items()}
    outside = (p for p in block.named_parameters() if not any(p[0].startswith(f"{name}.") for name in quantized))
    return found | {name: parameter for name, parameter in outside if parameter.dim() == 1}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(
    model: nn.Module, batches: list[Batch], config: Config, state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What decides every byte of the result: settings, data, weights, versions, and what sums in which order."""
    import transformers

    device = torch.device(config.device or device_of(model))
    versions = {"tqcompile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "settings": json.loads(json.dumps(config.to_dict())),
        "calibration data": [_digest(batch) for batch in batches],
        "model": _digest(state),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "number of threads": torch.get_num_threads(),
        **{f"version of {name}": version for name, version in versions.items()},
        "version of python": platform.python_version(),
    }


def _digest(values: Mapping[str, Any]) -> str:
    """sha256 of named tensors and other values, in the order of their names; one is looked up at a time."""
    digest = hashlib.sha256()
    for name in sorted(values):
        _update(digest, name, values[name])
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    for part in value.detach().reshape(-1).split(1 << 24):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())


def _differences(started: dict[str, Any], path: Path) -> list[str]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Delete the folder to begin anew.") from error
    if not isinstance(kept, dict):
        raise ConfigError(f"{path} is damaged. Delete the folder to begin anew.")
    found = []
    for name in {**started, **kept}:
        ours, theirs = started.get(name), kept.get(name)
        if ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        else:
            found.append(name)
    return found
