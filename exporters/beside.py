"""What lies beside the ``.onnx`` file: configuration, generation settings and tokenizer, as other tools expect them."""

import json
import os
from pathlib import Path

from torch import nn

from tqcompile.errors import ExportError


def write_beside(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files into an empty folder, where there are any.

    config.json is that of the model before quantization: what is quantized is in the graph, and a loader that reads
    the ``quantization_config`` of a checkpoint would look for packed tensors that an ONNX file does not have.

    Args:
        tokenizer: a transformers tokenizer, a folder that holds one, or None.
    Raises:
        ExportError: there is no readable tokenizer in the folder, or the object cannot be saved.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        settings = json.loads(config.to_json_string())
        settings.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError) as error:
            cause = str(error).strip().partition("\n")[0]
            raise ExportError(f"no tokenizer could be read from {tokenizer}: {cause} Pass tokenizer=None.") from error
    if tokenizer is not None:
        if not hasattr(tokenizer, "save_pretrained"):
            raise ExportError(
                f"tokenizer must be a transformers tokenizer or a folder, got {type(tokenizer).__name__}: it has no "
                "save_pretrained."
            )
        tokenizer.save_pretrained(folder)
