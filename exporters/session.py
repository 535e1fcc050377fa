"""Running an exported file in ONNX Runtime: the options that matter, and a greedy ``generate`` to try it out."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tqcompile.errors import ExportError

# Without it ONNX Runtime rounds the activations of a product that it merges with DequantizeLinear to 8 bits.
ACCURACY_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
PAST, PRESENT = "past_key_values.", "present."


def require(*modules: str) -> None:
    """Raise ExportError naming the extra to install when one of the modules cannot be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"ONNX export needs {name}, which cannot be imported ({error}). pip install 'tqcompile[onnx]'"
            ) from error


def ort_session(
    path: str | os.PathLike,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimize: bool = True,
    threads: int = 0,
):
    """Open an exported file in ONNX Runtime so that it computes what the model computes.

    Activations stay float32 in products that the runtime merges from the portable and inlined forms; in the ``ort``
    form the file itself says what becomes of them.

    Args:
        path: the ``.onnx`` file, its external data beside it.
        providers: execution providers, the preferred one first.
        optimize: False runs the graph as it is written.
        threads: inside one operator; 0 leaves the number to ONNX Runtime.
    Returns:
        ``onnxruntime.InferenceSession``.
    Raises:
        ExportError: onnxruntime is missing, the file or its data cannot be loaded, or the preferred provider does
            not run here (ONNX Runtime alone would quietly go on with another one).
    """
    require("onnxruntime")
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} is not a file. Export a model there first: tqcompile.export_onnx(model, path).")
    return open_session(str(path), path.name, providers=providers, optimize=optimize, threads=threads)


def open_session(
    model: str | bytes,
    name: str,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimize: bool = True,
    threads: int = 0,
    folder: Path | None = None,
    profile: Path | None = None,
):
    """As :func:`ort_session`, for a path or a serialized model whose external data lies in ``folder``.

    name: for messages. profile: prefix of a file to write a profile to. Threads then do not wait for work in a busy
    loop, which would take the cores from torch in the same process.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*ACCURACY_LEVEL)
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_DATA, str(folder))
    if profile is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {first_line(error)} Is its .data file beside "
            "it? Otherwise install a newer onnxruntime, or export with a lower opset."
        ) from error
    first = next(iter(providers))
    if session.get_providers()[0] != first:
        raise ExportError(
            f"{first} does not run here, ONNX Runtime would use {session.get_providers()[0]}. Install "
            "what it needs (see the messages above), or pass providers=['CPUExecutionProvider']."
        )
    return session


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def empty_cache(session, batch: int) -> dict[str, np.ndarray]:
    """The key/value inputs of a decoder before its first token: (batch, heads, 0, d) float32 by input name."""
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith(PAST)}
    return {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def generate(session, input_ids: np.ndarray, max_new_tokens: int = 32, eos_token_id: int | None = None) -> np.ndarray:
    """Greedy decoding with the cache, for a first try; a serving library does it better.

    Args:
        session: an ``InferenceSession`` of an exported decoder.
        input_ids: (b, s) int64, without padding. max_new_tokens: how many tokens to add at most.
        eos_token_id: stop when every row has produced it.
    Returns:
        (b, s + new) int64: the prompt and what follows.
    Raises:
        ExportError: the file is not a decoder with its cache.
    """
    cache = empty_cache(session, len(input_ids))
    if not cache:
        raise ExportError("generate needs a decoder exported with with_past=True; this file has no cache inputs.")
    names = [value.name for value in session.get_outputs()]
    ids = new = np.asarray(input_ids, np.int64)
    done = np.zeros(len(ids), bool)
    for _ in range(max_new_tokens):
        positions = np.arange(ids.shape[1] - new.shape[1], ids.shape[1])[None].repeat(len(ids), 0)
        feed = {"input_ids": new, "attention_mask": np.ones_like(ids), "position_ids": positions}
        outputs = dict(zip(names, session.run(None, feed | cache), strict=True))
        cache = {name: outputs[name.replace(PAST, PRESENT, 1)] for name in cache}
        new = outputs["logits"][:, -1:].argmax(-1)
        ids = np.concatenate((ids, new), 1)
        done |= new[:, 0] == eos_token_id
        if done.all():
            break
    return ids
