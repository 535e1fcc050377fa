"""``tqcompile bench``: tokens per second of a checkpoint, or of the original model, on this machine."""

import importlib
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tqcompile.commands import files
from tqcompile.commands.evaluate import check_causal
from tqcompile.errors import ConfigError

REPEATS = 3


def run(
    directory: Path,
    prompt: int,
    new: int,
    batch: int,
    compiled: bool,
    dtype: str = "auto",
    device: str = "cpu",
    json: Path | None = None,
) -> dict[str, Any]:
    """Median over REPEATS of a prefill of ``batch`` prompts of random tokens, and of greedy decoding behind it.

    compiled: with ``torch.compile(backend="twinquant")``; compilation is not counted. Returns what ``--json`` holds.

    Raises:
        ModelError: no causal language model. ConfigError: sizes that are not positive or beyond the model's positions.
    """
    settings = files.read_settings(directory)
    check_causal(settings, directory)
    if min(prompt, new, batch) < 1:
        raise ConfigError(f"--prompt, --new and --batch must be positive, got {prompt}, {new}, {batch}")
    longest = files.longest(settings)
    if longest is not None and prompt + new > longest:
        raise ConfigError(f"--prompt {prompt} and --new {new} are more than the model's {longest} positions")
    files.check_file(json, "--json")
    model = files.load_model(directory, dtype, device)
    weights = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    if compiled:
        importlib.import_module("tqcompile.backend")  # a checkout that is not installed has no entry point
        model.compile(backend="twinquant", dynamic=True, options={"quantize": False})
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    measure(model, ids, new)  # compiles, and warms up
    timed = [measure(model, ids, new) for _ in range(REPEATS)]
    prefill, decode = (statistics.median(column) for column in zip(*timed, strict=True))
    result = {
        "model": str(directory),
        "quantized": files.is_quantized(settings),
        "compiled": compiled,
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "prefill_tokens_per_second": batch * prompt / prefill,
        "decode_tokens_per_second": batch * new / decode,
        "weight_bytes": sum(t.numel() * t.element_size() for t in weights),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    speeds = [f"{name} {result[f'{name}_tokens_per_second']:.1f} tokens/s" for name in ("prefill", "decode")]
    how = "compiled" if compiled else "eager"
    Console().print(f"{', '.join(speeds)} ({how}, batch {batch}, {prompt} + {new} tokens)", highlight=False)
    files.write_json(json, result)
    return result


@torch.no_grad()
def measure(model: nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds of a prefill of (B, S) ``ids``, and of decoding ``new`` tokens behind it, greedily and one at a time."""
    began = _now(ids.device)
    out = model(input_ids=ids, use_cache=True)
    middle = _now(ids.device)
    for _ in range(new):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return middle - began, _now(ids.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
