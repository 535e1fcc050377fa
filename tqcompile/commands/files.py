"""Model directories and texts as the commands take them: checked before anything large is read."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tqcompile import checkpoint, demo
from tqcompile.errors import CalibrationError, CheckpointError, ConfigError, ModelError

STDLIB = "stdlib"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_settings(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        ModelError: there is no directory, no readable ``config.json``, or it names no architecture of transformers.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory. Models are read from disk; download the model first.")
    if not path.is_file():
        raise ModelError(f"{directory} holds no config.json; it is not the directory of a Hugging Face model.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}).") from error
    names = settings.get("architectures") if isinstance(settings, dict) else None
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ModelError(
            f"{path} names no architecture ({names!r}); load the model in Python and use tqcompile.compile."
        )
    return settings


def is_quantized(settings: dict[str, Any]) -> bool:
    """Whether the settings are those of a tqcompile checkpoint.

    Raises:
        ModelError: another tool quantized the model.
    """
    quantization = settings.get("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != checkpoint.QUANT_METHOD:
        raise ModelError(f"the model is quantized by {method!r}; only original weights and our checkpoints are read.")
    return True


def longest(settings: dict[str, Any]) -> int | None:
    """How many positions a model has; None where its settings do not say."""
    found = (settings.get("text_config") or settings).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ModelError where there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        why = (
            f"{pickled.name} is a pickle, which is never opened; convert it to safetensors" if pickled else "no weights"
        )
        raise ModelError(f"{directory} holds no .safetensors file ({why}).")
    return files


def load_model(directory: Path, dtype: str = "auto", device: str = "cpu"):
    """A plain model or a tqcompile checkpoint, in eval mode; code in the directory is never run.

    Raises:
        ModelError, CheckpointError: what is missing or damaged. ConfigError: ``dtype`` or ``device`` is unknown.
    """
    check_dtype(dtype)
    check_device(device)
    settings = read_settings(directory)
    weight_files(directory)
    if is_quantized(settings):
        return checkpoint.load(directory, dtype=dtype).to(device).eval()
    model = architecture(settings).from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def architecture(settings: dict[str, Any]) -> type:
    """The model class that settings name. Raises ModelError when transformers has none of that name."""
    import transformers

    name = settings["architectures"][0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        own = "; the code in the directory (auto_map) is never run" if "auto_map" in settings else ""
        raise ModelError(f"transformers {transformers.__version__} has no model class {name!r}{own}.")
    return found


def check_dtype(dtype: str) -> None:
    """Raise ConfigError unless ``dtype`` is one of DTYPES."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def check_device(device: str) -> None:
    """Raise ConfigError when torch knows no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def load_tokenizer(directory: Path):
    """The tokenizer of a model directory. Raises ModelError when it has none that is readable without its code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{directory} has no readable tokenizer ({str(error).splitlines()[0]}).") from error


def read_texts(source: str, option: str) -> list[str]:
    """Texts of a file: JSON lines with a field ``text`` where it ends in .jsonl, else the whole file as one text.

    Raises:
        CalibrationError: the file is missing, empty, not UTF-8, or a line has no text.
    """
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"{option} {source}: no such file. Pass a text or .jsonl file, or {STDLIB!r}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{option} {source} is not UTF-8 text ({error}).") from error
    if path.suffix != ".jsonl":
        texts = [text]
    else:
        texts = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(
                    f"{option} {source}, line {number}: no object with a 'text' ({error!r})."
                ) from error
            if not isinstance(texts[-1], str):
                raise CalibrationError(f"{option} {source}, line {number}: 'text' is no string.")
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{option} {source} holds no text.")
    return texts


def calibration_texts(source: str, samples: int, seq_len: int) -> list[str]:
    """Texts to calibrate on: a file, or modules of the running Python's standard library for ``stdlib``."""
    if source == STDLIB:
        return demo.calibration_texts(samples * seq_len * 8)  # eight characters a token are more than enough
    return read_texts(source, "--calib")


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint can be written to ``target``."""
    if target.resolve() == source.resolve():
        raise CheckpointError(f"--out {target} is the model's own directory. Choose another.")
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"--out {target} exists. Choose another directory, or pass --overwrite.")
    foreign = target.is_dir() and any(target.iterdir()) and not (target / checkpoint.MANIFEST).is_file()
    if target.is_file() or foreign:
        raise CheckpointError(f"--out {target} is not a tqcompile checkpoint, so it is not replaced.")
    parent = next(folder for folder in target.resolve().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--out {target}: {parent} is not writable.")


def check_file(path: Path | None, option: str) -> None:
    """Raise ConfigError unless a file can be written to ``path``, so that no result is lost at the end."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: {path.parent} is not a directory")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write ``data`` to the file of a ``--json`` option, where one was given; what JSON has no form for as its text."""
    if path is not None:
        write_text(path, json.dumps(data, indent=1, default=str) + "\n")
