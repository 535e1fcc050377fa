"""Does an exported file compute what the model computes? Checked with onnx, ONNX Runtime and the eager model.

What may differ, and how much. Two correct float32 programs differ in their last bits. Where activations are rounded
to 8 or 4 bits, such a difference now and then tips a value to the next step, and in a deep model one tip can move the
logits by percents: the end-to-end difference then says nothing about the file. So the comparison is made in two
parts, neither of which a tip can disturb or a wrong weight pass. The file also gives out its quantized activations.
The eager model quantizes the same inputs, where the two may differ by one step in at most 0.5 % of a layer's
values, and then goes on with the values of the file; its output must equal that of the file to ``TOLERANCE``, relative
to the largest value of the output. Without quantized activations this is the plain comparison.

The ``ort`` form leaves 8-bit rounding to ONNX Runtime. There the same comparison is made with that rounding switched
off on both sides, which proves weights and graph; the file as it is must then stay near the model (``NEAR``).
"""

import dataclasses
import inspect
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tqcompile.errors import ExportError
from tqcompile.exporters.portable import SOURCE
from tqcompile.exporters.replay import Replay, dense_weights
from tqcompile.exporters.session import PAST, PRESENT, empty_cache, first_line, open_session, require
from tqcompile.modules import QUANTIZED
from tqcompile.passes.capture import eval_mode

TOLERANCE = 1e-4
NEAR = 0.2  # of the output's root mean square; a wrong kernel or a lost scale gives about 1
PROMPT, DECODE_STEPS = 11, 32
FORM = "tqcompile.form"
_CODES = re.compile(r"(?P<layer>.*)\.x_q(?P<number>(\.\d+)?)")


@dataclasses.dataclass
class Verification:
    """What was found out about an exported file. Usable as its path; ``print`` shows a summary.

    form: "portable", "ort" or "inlined". peak: largest absolute value of the eager output; the differences are
    relative to it. difference: the largest with the file's quantized activations in the eager model (``ort`` form:
    with 8-bit activations left unrounded in both), at most ``tolerance``. free_difference: the largest when both run
    on their own, as a user runs them. tipped: the share of quantized activations, in the layer with most of them,
    that the two round to different steps. max_difference: ``difference`` in absolute terms.
    positions: tokens (or rows) compared, steps: of them in cached decoding; agreeing: those with the same most
    probable token, or -1 where the output is not logits. bytes: model and external data. layer_bytes: weights,
    scales, biases and transforms of the quantized layers; fp16_bytes: what their weights would take in float16.
    ops: nodes by ``domain::op``. stored: elements of initializers by type name. provider: the execution provider of
    the session; ran: kernels that ran in one pass by provider, from ONNX Runtime's own profile.
    skipped: linear layers that stay in floating point -> the reason, from the model's report.
    """

    path: Path
    form: str
    peak: float
    difference: float
    free_difference: float
    tipped: float
    tolerance: float
    positions: int
    steps: int
    agreeing: int
    bytes: int
    layer_bytes: int
    fp16_bytes: int
    ops: dict[str, int]
    stored: dict[str, int]
    provider: str
    ran: dict[str, int]
    skipped: dict[str, str]

    @property
    def max_difference(self) -> float:
        return self.difference * self.peak

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        custom = ", ".join(f"{name} {count}" for name, count in sorted(self.ops.items()) if name[:8] != "ai.onnx:")
        lines = [
            f"{self.path}: {self.form} form, {self.bytes / 1e6:.1f} MB; quantized layers "
            f"{self.layer_bytes / max(self.fp16_bytes, 1):.3f} of their size in fp16",
            f"nodes: {sum(self.ops.values())}{', of them ' if custom else ''}{custom}",
            f"ran on {', '.join(f'{name} ({count} kernels)' for name, count in self.ran.items())}",
            f"largest difference from the model: {self.difference:.2g} of the largest output (allowed: "
            f"{self.tolerance:g}), {self.free_difference:.2g} when both run on their own",
        ]
        if self.agreeing >= 0:
            lines.append(f"same most probable token at {self.agreeing} of {self.positions} positions")
            lines[-1] += f", {self.steps} steps decoded with the cache" if self.steps else ""
        lines += [f"not quantized: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is a Hugging Face causal language model (it generates, and has no separate encoder)."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    return bool(config is not None and generates and generates() and not config.is_encoder_decoder)


def usual_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs (b, s) int64 that a tokenizer gives a Hugging Face model; token types where the model has several."""
    given = {"input_ids": ids, "attention_mask": mask}
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes and getattr(model.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = (ids.cumsum(-1) > ids.sum(-1, keepdim=True) // 2).long()
    return given


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
    form = next((entry.value for entry in proto.metadata_props if entry.key == FORM), "portable")
    replay = Replay(model, unrounded=form == "ort")
    with eval_mode(model), torch.no_grad(), dense_weights(model):
        runtime = _Runtime(path, proto, exact=True)
        expected, actual, replayed = _compare(runtime, model, replay, example, steps)
        peak = max(float(np.abs(expected).max()), 1e-30)
        difference = float(np.abs(replayed - actual).max()) / peak
        tipped = replay.check(path.name)
        if not difference <= TOLERANCE:  # also when it is NaN
            raise ExportError(
                f"{path.name} does not reproduce {type(model).__name__}: its output differs by {difference:.3g} of the "
                f"largest value, {peak:.3g}, where {TOLERANCE:g} is allowed. Do not use this file: try another opset, "
                "and report the model if that fails too."
            )
        if form == "ort":
            del runtime  # two sessions of a large model need not be in memory at once
            runtime = _Runtime(path, proto)
            expected, actual, _ = _compare(runtime, model, None, example, steps)
            distance = float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))
            if not distance <= NEAR:
                raise ExportError(
                    f"{path.name}: with activations rounded by ONNX Runtime the output is {distance:.2g} of its root "
                    f"mean square away from that of {type(model).__name__}, where {NEAR:g} is allowed. Export "
                    'form="portable" instead.'
                )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}
    causal = is_causal_lm(model)
    return Verification(
        path=path,
        form=form,
        peak=peak,
        difference=difference,
        free_difference=float(np.abs(expected - actual).max()) / peak,
        tipped=tipped,
        tolerance=TOLERANCE,
        positions=len(expected),
        steps=steps if _has_cache(proto) else 0,
        agreeing=int((expected.argmax(-1) == actual.argmax(-1)).sum()) if causal else -1,
        bytes=sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()),
        layer_bytes=_layer_bytes(proto, set(layers)),
        fp16_bytes=sum(2 * layer.in_features * layer.out_features for layer in layers.values()),
        ops=dict(Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in proto.graph.node)),
        stored=_stored(proto),
        provider=runtime.session.get_providers()[0],
        ran=runtime.ran,
        skipped=_skipped(model),
    )


def _check_file(path: Path):
    """The model without its external data, after the full check by path and strict shape inference."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        proto = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ExportError(f"{path.name} is not a valid ONNX model: {first_line(error)}") from error
    return proto


def _stored(proto) -> dict[str, int]:
    import onnx

    stored: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        stored[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims, dtype=np.int64))
    return dict(stored)


def _sources(node) -> list[str]:
    return next((entry.value for entry in node.metadata_props if entry.key == SOURCE), "").split(",")


def _layer_bytes(proto, layers: set[str]) -> int:
    """Bytes of the initializers that nodes of these layers read; integers of 64 bits are shapes, not weights."""
    import onnx_ir as ir

    read = {name for node in proto.graph.node if layers.issuperset(_sources(node)) for name in node.input}
    weights = [t for t in proto.graph.initializer if t.name in read and t.data_type != ir.DataType.INT64]
    return sum(math.ceil(ir.DataType(t.data_type).itemsize * math.prod(t.dims)) for t in weights)


def _skipped(model: nn.Module) -> dict[str, str]:
    """Linear layers in floating point, with the reason where the model has a report."""
    reasons = dict(getattr(getattr(model, "tqcompile_report", None), "skipped", {}))
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return reasons | {name: reasons.get(name, "not quantized") for name in linears}


def _has_cache(proto) -> bool:
    return any(value.name.startswith(PAST) for value in proto.graph.input)


class _Runtime:
    """The file in ONNX Runtime, giving out the quantized activations of every layer beside its outputs.

    exact: products of the ``ort`` form keep their activations in float32. ran: after the first call, how many
    kernels each execution provider ran in it, according to ONNX Runtime's profile.
    """

    def __init__(self, path: Path, proto, *, exact: bool = False):
        import onnx

        asked = onnx.ModelProto()
        asked.CopyFrom(proto)
        self.codes: dict[str, list[tuple[str, str]]] = {}
        for node in asked.graph.node:
            for found in filter(None, map(_CODES.fullmatch, node.output)):
                pair = found[0], f"{found['layer']}.x_scale{found['number']}"
                for layer in _sources(node):
                    self.codes.setdefault(layer, []).append(pair)
                for name, dtype in zip(pair, (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT), strict=True):
                    asked.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
            for attribute in node.attribute:
                if exact and attribute.name == "accuracy_level":
                    attribute.i = 1
        self.ran: dict[str, int] = {}
        self.scratch = tempfile.TemporaryDirectory()
        self.session = open_session(
            asked.SerializeToString(),
            path.name,
            folder=path.absolute().parent,
            profile=Path(self.scratch.name) / "run",
        )
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, for those of ``feed`` that the file takes."""
        arrays = {name: tensor.numpy() for name, tensor in feed.items() if name in self.inputs}
        try:
            results = self.session.run(None, arrays)
        except Exception as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ExportError(f"ONNX Runtime failed on inputs {shapes}: {first_line(error)}") from error
        if not self.ran:
            events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
            providers = (event.get("args", {}).get("provider") for event in events)
            self.ran = dict(Counter(filter(None, providers)))
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, results, strict=True)}

    def quantized(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """(x_q, x_scale) of each use of each layer, by the layer's name."""
        return {name: [(outputs[q], outputs[s]) for q, s in pairs] for name, pairs in self.codes.items()}


def _compare(runtime: _Runtime, model: nn.Module, replay: Replay | None, example, steps: int) -> list[np.ndarray]:
    """Outputs (rows, features) of the eager model, of the file, and of the model replaying the file (where asked)."""
    if is_causal_lm(model):
        return _compare_causal(runtime, model, replay, _prompt(model, example), steps)
    return _compare_plain(runtime, model, replay, _batches(model, example))


def _prompt(model: nn.Module, example: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    if example is not None and "input_ids" in example:
        return example["input_ids"]
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def _compare_causal(
    runtime: _Runtime, model: nn.Module, replay: Replay | None, prompt: torch.Tensor, steps: int
) -> list[np.ndarray]:
    """As :func:`_compare`: logits (positions, vocabulary).

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
        with replay.using(codes, valid) if replay else nullcontext():
            replayed = forced(ids, mask) if replay else expected
        for kept, logits in zip(rows, (expected, actual, replayed), strict=True):
            kept.append(logits[valid])
        ids, mask = expected[:, -1:].argmax(-1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return [torch.cat(kept).numpy() for kept in rows]


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
    cache: dict[str, torch.Tensor] = {}

    def step(ids, mask):
        if not cache:
            cache.update({n: torch.from_numpy(a) for n, a in empty_cache(runtime.session, len(ids)).items()})
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        outputs = runtime(feed | cache)
        cache.update({name: outputs[name.replace(PAST, PRESENT, 1)] for name in cache})
        return outputs["logits"], runtime.quantized(outputs)

    return step


def _batches(model: nn.Module, example: Mapping[str, torch.Tensor] | None) -> list[dict[str, torch.Tensor]]:
    """Two batches of different size for a model that is no decoder."""
    if example is not None:
        return [dict(example), {name: tensor[:1].contiguous() for name, tensor in example.items()}]
    ids = _prompt(model, None)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    batch = usual_inputs(model, ids, mask)
    return [batch, {name: tensor[:1, :-3].contiguous() for name, tensor in batch.items()}]


def _compare_plain(
    runtime: _Runtime, model: nn.Module, replay: Replay | None, batches: list[dict[str, torch.Tensor]]
) -> list[np.ndarray]:
    """As :func:`_compare`: the first output."""

    def eager(batch):
        output = model._call_impl(**batch)
        return output if isinstance(output, torch.Tensor) else output[0]

    rows: tuple[list, list, list] = ([], [], [])
    for batch in batches:
        outputs, expected = runtime(batch), eager(batch)
        with replay.using(runtime.quantized(outputs)) if replay else nullcontext():
            replayed = eager(batch) if replay else expected
        for kept, output in zip(rows, (expected, outputs[runtime.outputs[0]], replayed), strict=True):
            kept.append(output.reshape(-1, output.shape[-1]))
    return [torch.cat(kept).numpy() for kept in rows]
