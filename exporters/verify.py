"""Does an exported file compute what the model computes? Checked with onnx, ONNX Runtime and the eager model.

ONNX Runtime rounds activations of a fused 4-bit product to 8 bits unless ``ACCURACY_LEVEL`` is set, which is an error
of its own of about 1 %. Every session here is opened by :func:`session`, which sets it.

What may differ, and how much. Two correct float32 programs differ in their last bits. Where activations are rounded
to 8 or 4 bits, such a difference now and then tips a value to the next step, and in a deep model one tip can move the
logits by percents: the end-to-end difference then says nothing about the file. So the comparison is made in two
parts, neither of which a tip can disturb or a wrong weight pass. The file also gives out its quantized activations.
The eager model quantizes the same inputs, where the two may differ by one step in at most ``TIPPED`` of a layer's
values, and then goes on with the values of the file; its output must equal that of the file to ``TOLERANCE``, relative
to the largest value of the output. Without quantized activations this is the plain comparison.
"""

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from tqcompile import ops
from tqcompile.errors import ExportError
from tqcompile.exporters.portable import DOMAIN
from tqcompile.modules import TwinLinear
from tqcompile.passes.capture import eval_mode

ACCURACY_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
TOLERANCE = 1e-4
TIPPED = 5e-3
PROMPT, DECODE_STEPS = 11, 8


@dataclasses.dataclass
class Verification:
    """What was found out about an exported file. Usable as its path.

    peak: largest absolute value of the eager output; the differences are relative to it. difference: the largest
    with the file's quantized activations in the eager model, at most ``tolerance``. free_difference: the largest when
    both run on their own. tipped: the share of quantized activations, in the layer with most of them, that the two
    round to different steps. max_difference: ``difference`` in absolute terms.
    positions: tokens (or rows) compared; agreeing: those with the same most probable token, or -1 where the output
    is not logits. bytes: model and external data. ops: nodes by ``domain::op``. stored: elements of initializers by
    type name. provider: the execution provider that ran.
    """

    path: Path
    peak: float
    difference: float
    free_difference: float
    tipped: float
    tolerance: float
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


def session(model: str | Path | bytes, *, optimize: bool = True, folder: str | Path | None = None):
    """An ONNX Runtime CPU session that keeps activations in float32 inside fused 4-bit products.

    Args:
        model: a path, or a serialized model whose external data lies in ``folder``.
        optimize: False runs the graph as it is written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*ACCURACY_LEVEL)
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_DATA, str(folder))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


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
        ExportError: the file is invalid, ONNX Runtime refuses it, or it does not compute what the model computes.
    """
    require("onnx", "onnxruntime")
    path = Path(path)
    proto = _check_file(path)
    runtime = _Runtime(path, proto)
    replay = _Replay(model)
    with eval_mode(model), torch.no_grad():
        if is_causal_lm(model):
            results = _compare_causal(runtime, model, replay, _prompt(model, example), steps)
        else:
            results = _compare_plain(runtime, model, replay, example)
    expected, actual, replayed = results
    peak = max(float(np.abs(expected).max()), 1e-30)
    difference = float(np.abs(replayed - actual).max()) / peak
    tipped = replay.check(path.name)
    if not difference <= TOLERANCE:  # also when it is NaN
        raise ExportError(
            f"{path.name} does not reproduce {type(model).__name__}: its output differs by {difference:.3g} of the "
            f"largest value, {peak:.3g}, where {TOLERANCE:g} is allowed. Do not use this file: try another opset, and "
            "report the model if that fails too."
        )
    logits = is_causal_lm(model)
    return Verification(
        path=path,
        peak=peak,
        difference=difference,
        free_difference=float(np.abs(expected - actual).max()) / peak,
        tipped=tipped,
        tolerance=TOLERANCE,
        positions=len(expected),
        agreeing=int((expected.argmax(-1) == actual.argmax(-1)).sum()) if logits else -1,
        bytes=sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()),
        ops=dict(Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in proto.graph.node)),
        stored=_stored(proto),
        provider=runtime.session.get_providers()[0],
    )


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


class _Runtime:
    """The file in ONNX Runtime, giving out the quantized activations of every layer beside its outputs."""

    def __init__(self, path: Path, proto):
        import onnx

        self.codes: dict[str, list[tuple[str, str]]] = {}
        for node in proto.graph.node:
            if node.domain == DOMAIN and "x_scale" in _inputs_of(proto, node):
                self.codes.setdefault(node.name, []).append(tuple(node.input[:2]))
        extra = dict.fromkeys(pair for pairs in self.codes.values() for pair in pairs)
        for x_q, x_scale in extra:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(x_q, onnx.TensorProto.INT8, None))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(x_scale, onnx.TensorProto.FLOAT, None))
        try:
            self.session = session(proto.SerializeToString(), folder=path.absolute().parent)
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot load {path.name}: {_first_line(error)}. Install a newer onnxruntime, or export "
                "with a lower opset."
            ) from error
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, for those of ``feed`` that the file takes."""
        arrays = {name: tensor.numpy() for name, tensor in feed.items() if name in self.inputs}
        try:
            results = self.session.run(None, arrays)
        except Exception as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ExportError(f"ONNX Runtime failed on inputs {shapes}: {_first_line(error)}") from error
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, results, strict=True)}

    def quantized(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """(x_q, x_scale) of each use of each layer, by the layer's name."""
        return {name: [(outputs[q], outputs[s]) for q, s in pairs] for name, pairs in self.codes.items()}


def _inputs_of(proto, node) -> list[str]:
    return next((list(f.input) for f in proto.functions if f.name == node.op_type and f.domain == node.domain), [])


class _Replay:
    """Runs the eager model with the quantized activations of the file, and compares them with its own."""

    def __init__(self, model: nn.Module):
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, TwinLinear)}
        self.seen: Counter[str] = Counter()
        self.tipped: Counter[str] = Counter()
        self.wrong: dict[str, int] = {}

    @contextmanager
    def using(
        self, codes: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]], valid: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Inside, every layer reads ``codes`` in place of what it would quantize itself.

        valid: (b, s) bool, the positions to compare; padding may hold anything.
        """
        queues = {name: iter(pairs) for name, pairs in codes.items()}
        original, current = ops.quantize_activation, []

        def quantize(x, input_scale=None, rotation=None):
            own, scale = original(x, input_scale, rotation)
            name = current[-1]
            if name not in queues:  # its output is not asked for: an encoder's pooler
                return own, scale
            given, given_scale = next(queues[name], (None, None))
            if given is None or given.shape != own.shape:
                raise ExportError(f"layer {name} of the model is not in the file with the same shape; export again.")
            steps = (own.int() - given.int()).abs()
            off = (scale - given_scale).abs() > 1e-3 * scale
            if valid is not None and own.shape[:-1] == valid.shape:
                steps, off = steps[valid], off[valid]
            self.seen[name] += steps.numel()
            self.tipped[name] += int((steps > 0).sum())
            self.wrong[name] = max(self.wrong.get(name, 0), int(steps.max()), 255 * int(off.any()))
            return given, given_scale

        hooks = []
        for name, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: current.append(name)))
        try:
            with mock.patch.object(ops, "quantize_activation", quantize):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def check(self, file: str) -> float:
        """The largest share of tipped values of a layer. Raises ExportError where it is not rounding."""
        shares = {name: self.tipped[name] / self.seen[name] for name in self.seen}
        for name, share in shares.items():
            if share > TIPPED or self.wrong[name] > 1:
                raise ExportError(
                    f"{file} does not quantize the input of {name} as the model does: {share:.2%} of the values "
                    f"differ, by up to {self.wrong[name]} steps; {TIPPED:.2%} by one step are rounding. Do not use "
                    "this file: try another opset, and report the model if that fails too."
                )
        return max(shares.values(), default=0.0)


def _prompt(model: nn.Module, example: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    if example is not None and "input_ids" in example:
        return example["input_ids"]
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def _compare_causal(
    runtime: _Runtime, model: nn.Module, replay: _Replay, prompt: torch.Tensor, steps: int
) -> tuple[np.ndarray, ...]:
    """Logits (positions, vocabulary) of the eager model, of the file, and of the model replaying the file.

    Prefill with ``prompt``, then ``steps`` tokens chosen by the eager model, one at a time; without padding.
    """
    first = torch.ones_like(prompt)
    if len(prompt) > 1 and prompt.shape[1] > 2:
        first[-1, :2] = 0
    steps = steps if "position_ids" in runtime.inputs else 0
    free, forced, file = _eager_step(model), _eager_step(model), _runtime_step(runtime)
    rows: tuple[list, list, list] = ([], [], [])
    ids, mask = prompt, first
    for _ in range(steps + 1):
        valid = first.bool() if ids is prompt else torch.ones_like(ids, dtype=torch.bool)
        expected = free(ids, mask)
        actual, codes = file(ids, mask)
        with replay.using(codes, valid):
            replayed = forced(ids, mask)
        for kept, logits in zip(rows, (expected, actual, replayed), strict=True):
            kept.append(logits[valid])
        ids, mask = expected[:, -1:].argmax(-1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return tuple(torch.cat(kept).numpy() for kept in rows)


def _positions(mask: torch.Tensor, new: int) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]


def _eager_step(model: nn.Module) -> Callable:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def step(ids, mask):
        positions = _positions(mask, ids.shape[1])
        # a call with its hooks, but never the compiled call that a model may carry
        output = model._call_impl(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits

    return step


def _runtime_step(runtime: _Runtime) -> Callable:
    shapes = {name: shape for name, shape in runtime.inputs.items() if name.startswith("past_key_values.")}
    cache: dict[str, torch.Tensor] = {}

    def step(ids, mask):
        if not cache:
            cache.update({name: torch.zeros(len(ids), shape[1], 0, shape[3]) for name, shape in shapes.items()})
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        outputs = runtime(feed | cache)
        cache.update({name: outputs[name.replace("past_key_values", "present", 1)] for name in cache})
        return outputs["logits"], runtime.quantized(outputs)

    return step


def _compare_plain(
    runtime: _Runtime, model: nn.Module, replay: _Replay, example: Mapping[str, torch.Tensor] | None
) -> tuple[np.ndarray, ...]:
    """The first output as (rows, features): of the eager model, of the file, of the model replaying the file."""
    if example is None:
        ids = _prompt(model, None)
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        batches = [{"input_ids": ids, "attention_mask": mask}]
        batches.append({name: tensor[:1, :-3].contiguous() for name, tensor in batches[0].items()})
    else:
        batches = [dict(example), {name: tensor[:1].contiguous() for name, tensor in example.items()}]

    def eager(batch):
        output = model._call_impl(**batch)
        return output if isinstance(output, torch.Tensor) else output[0]

    rows: tuple[list, list, list] = ([], [], [])
    for batch in batches:
        outputs = runtime(batch)
        with replay.using(runtime.quantized(outputs)):
            replayed = eager(batch)
        for kept, output in zip(rows, (eager(batch), outputs[runtime.outputs[0]], replayed), strict=True):
            kept.append(output.reshape(-1, output.shape[-1]))
    return tuple(torch.cat(kept).numpy() for kept in rows)
