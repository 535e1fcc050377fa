"""Capture: model and example inputs in, an aten-level FX graph out; for analysis only, never run.

Parameters and buffers are placeholders; ``gm.meta["parameters"]`` maps their node names to fully qualified
names, and ``gm.meta["tied"]`` every parameter's name to all names of that parameter. Attention is captured as
scaled_dot_product_attention, in eval mode, without a cache; afterwards the model is exactly as it was. Batch and
sequence length stay symbolic where the model allows it.
"""

import contextlib
import inspect
import io
import logging
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.fx
from torch import nn

from tqcompile.errors import PassError

ROWS, MIN_TOKENS, MAX_TOKENS = 2, 4, 8
_LIBRARY = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), __file__, "<")


def capture(model: nn.Module, example: Mapping) -> torch.fx.GraphModule:
    """The graph of ``model(**example)``.

    Raises:
        PassError: the model does not export; the message carries torch's reason and the line of the model.
    """
    inputs = _small(example, next((p.device for p in model.parameters()), None))
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    auto = torch.export.Dim.AUTO
    dynamic = {
        name: dict.fromkeys(range(min(value.ndim, 2)), auto) if isinstance(value, torch.Tensor) else None
        for name, value in inputs.items()
    }
    failure = None
    with eval_mode(model), _analysis_state(model), _quiet(), torch.no_grad():
        for shapes in (dynamic, None):
            try:
                program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
            except Exception as error:  # torch.export raises whatever the model's own code raises
                failure = error
            else:
                gm, signature = program.graph_module, program.graph_signature
                gm.meta["parameters"] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
                gm.meta["tied"] = _tied(model)
                return gm
    raise PassError(f"{type(model).__name__} does not export: {_reason(failure)}") from failure


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _small(example: Mapping, device: torch.device | None) -> dict:
    """The example on the model's device, with 2 rows and 4 to 8 tokens where all tensors share these sizes.

    The tracer takes sizes of 0 and 1 for constants; large ones only cost time.
    """
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in example.items()}
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.ndim}
    if len({v.shape[0] for v in tensors.values()}) == 1:
        tensors = {k: _resize(v, 0, ROWS, ROWS) for k, v in tensors.items()}
    if len({v.shape for v in tensors.values()}) == 1 and all(v.ndim == 2 for v in tensors.values()):
        tensors = {k: _resize(v, 1, MIN_TOKENS, MAX_TOKENS) for k, v in tensors.items() if not v.is_floating_point()}
    return {**inputs, **tensors}


def _resize(tensor: torch.Tensor, dim: int, low: int, high: int) -> torch.Tensor:
    size = tensor.shape[dim]
    if not size:
        return tensor
    length = min(max(size, low), high)
    return tensor.index_select(dim, torch.arange(length, device=tensor.device) % size)


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Eval mode inside; every module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _analysis_state(model: nn.Module):
    """sdpa attention inside; every flag as it was afterwards."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    configs: dict[int, tuple] = {}
    for module in model.modules():
        if getattr(module, "_supports_sdpa", False):
            pending = [getattr(module, "config", None)]
            while pending:
                config = pending.pop(0)
                if getattr(config, "_attn_implementation", None) is not None and id(config) not in configs:
                    configs[id(config)] = (config, config._attn_implementation)
                    pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    try:
        for config, _ in configs.values():
            config._attn_implementation = "sdpa"
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the linears of nn.TransformerEncoderLayer
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for config, before in configs.values():  # parents first: setting one also sets its sub-configs
            config._attn_implementation = before


@contextlib.contextmanager
def _quiet():
    """torch prints the partial graph of a failed export; the reason is in our error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARY)]
    where = f" (at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"
