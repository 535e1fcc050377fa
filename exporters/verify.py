"""Does an exported file compute what the model computes? Checked with onnx, ONNX Runtime and the eager model.

ONNX Runtime rounds activations of a fused 4-bit product to 8 bits unless ``ACCURACY_LEVEL`` is set, which is an error
of its own of about 1 %. Every session here is opened by :func:`session`, which sets it.

What may differ, and how much. Two correct float32 programs differ in their last bits, and where activations are
rounded to 8 or 4 bits such a difference now and then tips a value to the next step. A tip shows at few positions and
may be large there; a wrong weight shows everywhere. So two numbers are held against a tolerance, both relative to the
largest value of the output: the typical difference (median over positions of the largest difference at a position)
and the worst one. Each may reach ``MARGIN`` times the model's own sensitivity: how far the eager model's output moves
when every linear's output is moved by a relative ``NUDGE``, more than the rounding of a matrix product. Since the few
tips of a short probe are luck, ``FLOORS`` says what is always allowed, and ``CEILING`` what never is.
"""

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tqcompile.errors import ExportError
from tqcompile.modules import TwinLinear

ACCURACY_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
NUDGE = 2.0**-20
PROBES, MARGIN, CEILING = 3, 4.0, 0.1
FLOORS = {16: (1e-4, 1e-4), 8: (1e-3, 1 / 127), 4: (1e-3, 5e-2)}  # activation bits: (typical, worst)
PROMPT, DECODE_STEPS = 11, 8


@dataclasses.dataclass
class Verification:
    """What was found out about an exported file. Usable as its path.

    peak: largest absolute value of the eager output. Relative to it: difference, the largest between ONNX Runtime
    and the eager model; typical, the median over positions of the largest at a position; tolerance and
    typical_tolerance, what was allowed; sensitivity and typical_sensitivity, the eager model's own reaction to noise
    in the last bits. max_difference is the largest absolute difference.
    positions: tokens (or rows) compared; agreeing: those with the same most probable token, or -1 where the output
    is not logits. bytes: model and external data. ops: nodes by ``domain::op``. stored: elements of initializers by
    type name. provider: the execution provider that ran.
    """

    path: Path
    peak: float
    difference: float
    typical: float
    tolerance: float
    typical_tolerance: float
    sensitivity: float
    typical_sensitivity: float
    positions: int
    agreeing: int
    bytes: int
    ops: dict[str, int]
    stored: dict[str, int]
    provider: str

    @property
    def max_difference(self) -> float:
        return self.difference * self.peak

    def __fspath__(self) -> str:
        return str(self.path)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def require(*modules: str) -> None:
    """Raise ExportError naming the extra to install when one of the modules cannot be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"ONNX export needs {name}, which cannot be imported ({error}). pip install 'tqcompile[onnx]'"
            ) from error


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is a Hugging Face causal language model (it generates, and has no separate encoder)."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    return bool(config is not None and generates and generates() and not config.is_encoder_decoder)


def session(path, *, optimize: bool = True):
    """An ONNX Runtime CPU session that keeps activations in float32 inside fused 4-bit products."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*ACCURACY_LEVEL)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def verify(
    path, model: nn.Module, *, example: Mapping[str, torch.Tensor] | None = None, steps: int = DECODE_STEPS
) -> Verification:
    """Check a file and compare it with the model that it was exported from.

    The file must pass the onnx checker and strict shape inference. A causal model is then run over a prompt in which
    one row is padded on the left and, where the file has a cache, over ``steps`` greedy tokens chosen by the eager
    model, each program with its own cache; any other model over two batches of different length.

    Args:
        path: an ``.onnx`` file of :func:`tqcompile.exporters.onnx.export_onnx`, its external data beside it.
        model: the quantized eager model, float32 on the CPU. example: as for ``export_onnx``. steps: decode steps.
    Raises:
        ExportError: the file is invalid, ONNX Runtime refuses it, or the difference exceeds the tolerance.
    """
    require("onnx", "onnxruntime")
    path = Path(path)
    proto = _check_file(path)
    try:
        runtime = session(path)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load {path.name}: {_first_line(error)}. Install a newer onnxruntime, or export with "
            "a lower opset."
        ) from error
    with inference(model), torch.no_grad():
        if is_causal_lm(model):
            steps = steps if "position_ids" in {value.name for value in runtime.get_inputs()} else 0
            results = _compare_causal(runtime, model, _prompt(model, example), steps)
        else:
            results = _compare_plain(runtime, model, example)
    expected, actual, *nudged = results
    peak = float(np.abs(expected).max())
    typical, worst = _differences(expected, actual)
    reactions = [_differences(expected, other) for other in nudged]
    sensitivity = [max(values) for values in zip(*reactions, strict=True)]
    bits = min((m.spec.act_bits for m in model.modules() if isinstance(m, TwinLinear)), default=16)
    allowed = [min(max(floor, MARGIN * value), CEILING) for floor, value in zip(FLOORS[bits], sensitivity, strict=True)]
    if not (typical <= allowed[0] and worst <= allowed[1]):  # also when one is NaN
        raise ExportError(
            f"{path.name} does not reproduce {type(model).__name__}. Relative to the largest output, {peak:.3g}, it "
            f"differs by {worst:.3g} at worst ({allowed[1]:.3g} allowed) and by {typical:.3g} at a typical position "
            f"({allowed[0]:.3g} allowed; float32 noise alone moves the model by {sensitivity[0]:.3g}). Do not use this "
            "file: try another opset, and report the model if that fails too."
        )
    logits = is_causal_lm(model)
    return Verification(
        path=path,
        peak=peak,
        difference=worst,
        typical=typical,
        tolerance=allowed[1],
        typical_tolerance=allowed[0],
        sensitivity=sensitivity[1],
        typical_sensitivity=sensitivity[0],
        positions=len(expected),
        agreeing=int((expected.argmax(-1) == actual.argmax(-1)).sum()) if logits else -1,
        bytes=sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()),
        ops=dict(Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in proto.graph.node)),
        stored=_stored(proto),
        provider=runtime.get_providers()[0],
    )


def _differences(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """(typical, worst) difference of two (positions, features) arrays, relative to the largest expected value."""
    difference = np.abs(expected - actual).max(-1) / max(float(np.abs(expected).max()), 1e-30)
    return float(np.median(difference)), float(difference.max())


def _check_file(path: Path):
    """The model without its external data, after the full check by path and strict shape inference."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        proto = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ExportError(f"{path.name} is not a valid ONNX model: {_first_line(error)}") from error
    return proto


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _stored(proto) -> dict[str, int]:
    import onnx

    stored: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        stored[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims, dtype=np.int64))
    return dict(stored)


@contextmanager
def _nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, every linear's output is off by a relative NUDGE of random sign."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(module, arguments, output):
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + NUDGE * signs)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear | TwinLinear)]
    hooks = [module.register_forward_hook(nudge) for module in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _prompt(model: nn.Module, example: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    if example is not None and "input_ids" in example:
        return example["input_ids"]
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def _compare_causal(runtime, model: nn.Module, prompt: torch.Tensor, steps: int) -> tuple[np.ndarray, ...]:
    """Logits (positions, vocabulary) of the eager model, of the file, and of every nudged model."""
    mask = torch.ones_like(prompt)
    if len(prompt) > 1 and prompt.shape[1] > 2:
        mask[-1, :2] = 0
    expected, tokens = _run_steps(_eager_step(model), prompt, mask, steps)
    actual, _ = _run_steps(_runtime_step(runtime), prompt, mask, steps, tokens)
    nudged = []
    for seed in range(PROBES):
        with _nudged(model, seed):
            nudged.append(_run_steps(_eager_step(model), prompt, mask, steps, tokens)[0])
    return expected, actual, *nudged


def _run_steps(
    step: Callable, prompt: torch.Tensor, mask: torch.Tensor, steps: int, forced: list[torch.Tensor] | None = None
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Prefill with ``prompt``, then ``steps`` single tokens: ``forced``, or the most probable ones.

    Returns the logits (positions, vocabulary) of every position that is not padding, and the tokens fed.
    """
    logits = step(prompt, mask)
    rows, tokens = [logits[mask.bool()]], []
    for index in range(steps):
        tokens.append(forced[index] if forced else logits[:, -1:].argmax(-1))
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits = step(tokens[-1], mask)
        rows.append(logits[:, 0])
    return torch.cat(rows).numpy(), tokens


def _positions(mask: torch.Tensor, new: int) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]


def _run(runtime, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return runtime.run(None, feed)
    except Exception as error:
        shapes = {name: array.shape for name, array in feed.items()}
        raise ExportError(f"ONNX Runtime failed on inputs {shapes}: {_first_line(error)}") from error


def _eager_step(model: nn.Module) -> Callable:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def step(ids, mask):
        positions = _positions(mask, ids.shape[1])
        output = model.forward(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits

    return step


def _runtime_step(runtime) -> Callable:
    names = [value.name for value in runtime.get_outputs()]
    shapes = {v.name: v.shape for v in runtime.get_inputs() if v.name.startswith("past_key_values.")}
    wanted = {value.name for value in runtime.get_inputs()}
    cache: dict[str, np.ndarray] = {}

    def step(ids, mask):
        if not cache:
            cache.update({n: np.zeros((len(ids), s[1], 0, s[3]), np.float32) for n, s in shapes.items()})
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        feed = {name: tensor.numpy() for name, tensor in given.items() if name in wanted}
        output = dict(zip(names, _run(runtime, feed | cache), strict=True))
        cache.update({name: output[name.replace("past_key_values", "present", 1)] for name in cache})
        return torch.from_numpy(output["logits"])

    return step


def _compare_plain(runtime, model: nn.Module, example: Mapping[str, torch.Tensor] | None) -> tuple[np.ndarray, ...]:
    """The first output as (rows, features): of the eager model, of the file, of every nudged model."""
    if example is None:
        ids = _prompt(model, None)
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        batches = [{"input_ids": ids, "attention_mask": mask}]
        batches.append({name: tensor[:1, :-3].contiguous() for name, tensor in batches[0].items()})
    else:
        batches = [dict(example), {name: tensor[:1].contiguous() for name, tensor in example.items()}]

    def eager(batch):
        output = model.forward(**batch)
        return output if isinstance(output, torch.Tensor) else output[0]

    def rows(run):
        return torch.cat([output.reshape(-1, output.shape[-1]) for output in map(run, batches)]).numpy()

    def file(batch):
        return torch.from_numpy(_run(runtime, {name: tensor.numpy() for name, tensor in batch.items()})[0])

    expected, actual = rows(eager), rows(file)
    nudged = []
    for seed in range(PROBES):
        with _nudged(model, seed):
            nudged.append(rows(eager))
    return expected, actual, *nudged
