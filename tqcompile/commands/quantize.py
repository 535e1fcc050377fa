"""``tqcompile quantize``: a model directory in, a checkpoint and its report out."""

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import tqcompile
from tqcompile import distributed, streaming
from tqcompile.api import compile_streamed
from tqcompile.commands import files, memory
from tqcompile.config import Config
from tqcompile.errors import ConfigError, ModelError

BLOCKS = ".blocks"


def run(
    model_dir: Path,
    calib: str,
    out: Path,
    config: Config,
    dtype: str = "auto",
    overwrite: bool = False,
    force: bool = False,
    json: Path | None = None,
    resume: bool = False,
    stream: bool = False,
) -> dict[str, Any]:
    """Quantize the model in ``model_dir`` and save it, with its tokenizer, to ``out``.

    stream: one block at a time is in memory, not the whole model; the checkpoint holds the same tensors.

    Everything that can be refused is refused before the weights are read; ``out`` is written whole or not at all.
    Finished blocks are kept in a folder beside it until then: ``resume`` goes on behind the last of an interrupted run.
    Started by ``torchrun``, its processes share the work; the first of them alone prints and writes.
    Returns what ``--json`` holds: the report, where the checkpoint lies, seconds, estimated and peak bytes.
    """
    with distributed.launched(config.device), distributed.together():
        return _run(model_dir, calib, out, config, dtype, overwrite, force, json, resume, stream)


def _run(
    model_dir: Path,
    calib: str,
    out: Path,
    config: Config,
    dtype: str,
    overwrite: bool,
    force: bool,
    json: Path | None,
    resume: bool,
    stream: bool,
) -> dict[str, Any]:
    first = distributed.first()
    console = Console(quiet=not first)
    if not first:
        _silence()
    settings = files.read_settings(model_dir)
    if files.is_quantized(settings):
        raise ModelError(f"{model_dir} is already quantized by tqcompile. Start from the original weights.")
    weights = files.weight_files(model_dir)
    blocks = out.with_name(f"{out.name}{BLOCKS}")
    if first:
        # A run killed between its last two steps has put its checkpoint in place, and not yet removed its blocks.
        files.check_target(out, model_dir, overwrite or (resume and blocks.exists()))
        files.check_file(json, "--json")
    if first and blocks.exists() and not resume:
        raise ConfigError(f"{blocks} holds the finished blocks of an interrupted run. Pass --resume, or delete it.")
    if config.device is not None:
        files.check_device(config.device)
    files.check_dtype(dtype)
    if stream:
        streaming.check_config(config)
    needed = memory.estimate(model_dir, weights, settings, config, dtype, stream, distributed.local_size())
    console.print(f"memory, estimated: {needed}", highlight=False)
    if not force:
        memory.require(needed, stream)
    distributed.check()
    tokenizer = files.load_tokenizer(model_dir)
    texts = files.calibration_texts(calib, config.samples, config.seq_len)
    device = config.device or "cpu"
    if stream:
        source = streaming.StreamedModel(files.architecture(settings), model_dir, settings, dtype, device)
    else:
        model = files.load_model(model_dir, dtype, device)
    began = time.perf_counter()
    try:
        if stream:
            model = compile_streamed(source, texts, config=config, tokenizer=tokenizer, resume=blocks)
        else:
            tqcompile.compile(model, texts, config=config, tokenizer=tokenizer, backend=None, resume=blocks)
    except BaseException:
        if first and not any(blocks.glob("*.safetensors")):
            shutil.rmtree(blocks, ignore_errors=True)  # refused before anything was done
        raise
    seconds = time.perf_counter() - began
    report = tqcompile.report(model)
    peak = memory.peak()
    report.notes.append(f"quantized in {seconds:.0f} s, peak memory of the process {peak / 1e9:.2f} GB")
    if first:
        if stream:
            source.save(out, blocks, tokenizer)
        else:
            tqcompile.save(model, out, tokenizer=tokenizer)
        for file in blocks.glob("*.safetensors"):
            file.unlink()  # first: without run.json nothing could be resumed
        shutil.rmtree(blocks)
        print(report)
    console.print(f"saved to {out}", highlight=False)
    result = {
        "model": str(model_dir),
        "out": str(out),
        "seconds": seconds,
        "processes": distributed.size(),
        "estimated_bytes": needed.total,
        "peak_bytes": peak,
        "report": report.to_dict(),
    }
    if first:
        files.write_json(json, result)
    return result


def _silence() -> None:
    """No progress bars and warnings of transformers in a process beside the first."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
