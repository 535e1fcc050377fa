"""``tqcompile eval``: perplexity of a checkpoint, or of the original model to compare with."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tqcompile import demo
from tqcompile.commands import files
from tqcompile.errors import CalibrationError, ConfigError, ModelError
from tqcompile.evaluate import perplexity


def run(
    directory: Path,
    text: str,
    windows: int,
    seq_len: int,
    dtype: str = "auto",
    device: str = "cpu",
    json: Path | None = None,
) -> dict[str, Any]:
    """Perplexity over the first ``windows`` windows of ``seq_len`` tokens of a text, or of the held-out modules.

    Raises:
        ModelError: not a causal language model. CalibrationError: the text is shorter than one window.
        ConfigError: windows that are empty or longer than the model's positions.
    """
    settings = files.read_settings(directory)
    check_causal(settings, directory)
    if windows < 1 or seq_len < 2:
        raise ConfigError(f"--windows must be positive and --seq-len at least 2, got {windows}, {seq_len}")
    longest = files.longest(settings)
    if longest is not None and seq_len > longest:
        raise ConfigError(f"--seq-len {seq_len} is longer than the model's {longest} positions")
    files.check_file(json, "--json")
    tokenizer = files.load_tokenizer(directory)
    if text == files.STDLIB:
        ids = demo.held_out_windows(tokenizer, windows, seq_len)
    else:
        ids = demo.windows(tokenizer, files.read_texts(text, "--text"), windows, seq_len)
    if not len(ids):
        raise CalibrationError(
            f"--text {text} is shorter than one window of {seq_len} tokens; use a smaller --seq-len."
        )
    model = files.load_model(directory, dtype, device)
    top = int(ids.max())
    if top >= model.get_input_embeddings().weight.shape[0]:
        raise ModelError(f"token id {top} is outside the model's vocabulary; the tokenizer is of another model.")
    began = time.perf_counter()
    value = perplexity(model, ids)
    seconds = time.perf_counter() - began
    result = {
        "model": str(directory),
        "quantized": files.is_quantized(settings),
        "text": text,
        "windows": len(ids),
        "seq_len": seq_len,
        "perplexity": value,
        "seconds": seconds,
        "device": device,
        "torch": torch.__version__,
    }
    Console().print(f"perplexity {value:.4f} on {len(ids)} windows of {seq_len} tokens ({text})", highlight=False)
    files.write_json(json, result)
    return result


def check_causal(settings: dict[str, Any], directory: Path) -> None:
    """Raise ModelError when a model directory holds no causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = settings["architectures"][0]
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(f"{directory} holds a {name}; this command is for causal language models.")
