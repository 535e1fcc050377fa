"""``torch.compile(model, backend="twinquant")``: the graph passes, then Inductor.

A model quantized by ``tqcompile.compile`` already holds our ops; the passes merge and lower them. In any
other model each linear is quantized here: with the components attached to its weight (``tqcompile.recipes``),
else without calibration data. Loaded by torch through the entry point ``torch_dynamo_backends``.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable

import torch
import torch.fx
from torch._dynamo import list_backends, lookup_backend, register_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from tqcompile import recipes
from tqcompile.config import Config, Scheme, ignored_by
from tqcompile.errors import ConfigError
from tqcompile.methods import recipe
from tqcompile.methods.components import QuantizedLinear
from tqcompile.passes.base import run_passes
from tqcompile.passes.buffers import example_value
from tqcompile.passes.decompose_linear import DecomposeLinear, linear_operands
from tqcompile.passes.find_linears import is_linear, linear_module_name
from tqcompile.passes.fuse_prologue import FusePrologue
from tqcompile.passes.fuse_twin_linear import FuseTwinLinear
from tqcompile.passes.lower import Lower, op_name
from tqcompile.passes.merge_siblings import LATTICE, TWIN, MergeSiblings
from tqcompile.passes.share_activation_quant import ShareActivationQuant

log = logging.getLogger("tqcompile")

INNER = ("inductor", "aot_eager", "eager")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """What one call of the backend did, by module name (or node name, where torch gives no module).

    quantized: linear -> "attached" or "data-free". left: linear -> why it stays as it is. lowered: op node ->
    the implementation that runs. modified: pass -> whether it changed the graph.
    """

    quantized: dict[str, str]
    left: dict[str, str]
    lowered: dict[str, str]
    modified: dict[str, bool]


reports: collections.deque[GraphReport] = collections.deque(maxlen=32)
"""The latest calls of the backend, oldest first: one for each graph that torch.compile captured."""


def twinquant(
    gm: torch.fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend. Options: every field of ``Config``; ``quantize``, False to leave plain linears alone;
    ``inner`` ("inductor", "aot_eager" or "eager") is who compiles the rewritten graph; ``inductor`` is a dict of
    Inductor settings; ``lower``, True or False, whether the ops become the ones made for a GPU, with sibling linears
    merged (by default on CUDA only: elsewhere these ops run as plain torch). ``mode`` is one of Inductor's.

    A graph lowered this way belongs to the tensors it was compiled for: another model of the same class compiles again.

    Raises:
        ConfigError: an option is unknown, or a gradient would have to flow through a quantized linear.
    """
    config, quantize, lower, inner, patches = _settings(mode, options or {})
    placeholders = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    tensors = {node.name: value for node, value in placeholders.items() if isinstance(value, torch.Tensor)}
    if not quantize or any(op_name(node) for node in gm.graph.nodes):
        choose = _Choices(config, {}, why="the model was quantized before it was compiled")
    else:
        choose = _Choices(config, placeholders)
    _refuse_gradients(gm, choose)
    modified = run_passes(
        gm,
        [
            # Each plain linear becomes two 4-bit components, written out in plain torch.
            DecomposeLinear(choose),
            # Each written-out linear becomes quantize_activation + twin_linear.
            FuseTwinLinear(),
            # q, k and v quantize their input once; so do gate and up.
            ShareActivationQuant(tensors),
        ],
    )
    if _is_on_cuda(gm) if lower is None else lower:
        merge = MergeSiblings(tensors, _guard_identity)
        modified |= run_passes(
            gm,
            [
                # q, k and v become one linear; so do gate and up.
                merge,
                # Norm or gate, transform, quantization and down projection in one op, the products in another.
                FusePrologue(tensors, _guard_identity),
            ],
        )
        if merge.moved_inputs and inner != "eager":
            # AOTAutograd refuses inputs that lie elsewhere in memory than dynamo saw; dynamo looks again.
            raise TensorifyScalarRestartAnalysis(restart_reason="sibling weights were moved into one storage")
    # A kernel for each op, or the reason why plain torch runs.
    modified |= run_passes(gm, [Lower()])
    compiled = _compile(inner, gm, example_inputs, patches)
    # Only now: AOTAutograd may make dynamo start this graph again, once it knows which floats are dynamic.
    reports.append(GraphReport(choose.quantized, choose.left, gm.meta["lower"], modified))
    return compiled


def _compile(inner: str, gm: torch.fx.GraphModule, example_inputs: list, patches: dict) -> Callable:
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        return lookup_backend("aot_eager")(gm, example_inputs)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=patches)


def _is_on_cuda(gm: torch.fx.GraphModule) -> bool:
    values = [example_value(node) for node in gm.graph.nodes if node.target in (TWIN, LATTICE)]
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


def _guard_identity(node: torch.fx.Node) -> None:
    """Its tensor, or a part of it, is a constant of this graph: dynamo may not run the graph with another one."""
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _settings(mode: str | None, options: dict) -> tuple[Config, bool, bool | None, str, dict]:
    """(config, whether plain linears are quantized, whether to lower, inner compiler, Inductor settings)."""
    fields = [field.name for field in dataclasses.fields(Config)]
    own = ["quantize", "lower", "inner", "inductor"]
    unknown = sorted(set(options) - {*own, *fields})
    if unknown:
        raise ConfigError(
            f'backend "twinquant": unknown option {", ".join(map(repr, unknown))}; known options: '
            f"{', '.join([*own, *fields])}. Inductor's own go into options['inductor']"
        )
    inner, patches = options.get("inner", "inductor"), options.get("inductor") or {}
    quantize = options.get("quantize", True)
    if not isinstance(quantize, bool):
        raise ConfigError(f'backend "twinquant": option quantize must be True or False, got {quantize!r}')
    lower = options.get("lower")
    if lower not in (True, False, None):
        raise ConfigError(f'backend "twinquant": option lower must be True, False or None, got {lower!r}')
    if inner not in INNER:
        raise ConfigError(f'backend "twinquant": option inner must be one of {", ".join(INNER)}, got {inner!r}')
    if inner != "inductor" and (mode or patches):
        raise ConfigError(
            f'backend "twinquant": mode and options["inductor"] are for Inductor, but inner is '
            f"{inner!r}; leave one of them out"
        )
    if not isinstance(patches, dict):
        raise ConfigError(f'backend "twinquant": options["inductor"] must be a dict, got {patches!r}')
    if mode:
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ConfigError(f'backend "twinquant": unknown mode {mode!r}; known modes: {", ".join(modes)}')
        patches = {**modes[mode], **patches}
    if options.get("lm_head", "keep") != "keep":
        raise ConfigError('backend "twinquant": lm_head is a setting of tqcompile.compile, which replaces modules')
    for name in ("overrides", "bits_budget"):
        if options.get(name):
            raise ConfigError(f'backend "twinquant": {name} is a setting of tqcompile.compile, which knows the layers')
    config = Config().replace(**{name: options[name] for name in fields if name in options})
    return config, quantize, lower, inner, patches


_named = WeakTensorKeyDictionary()  # weights that cannot be quantized and are named in the log already


class _Choices:
    """Called with a linear node: its components, or the reason to leave it as it is."""

    def __init__(self, config: Config, placeholders: dict[torch.fx.Node, object], why: str | None = None):
        self._config, self._placeholders, self._why = config, placeholders, why
        self._warned = False
        self.quantized: dict[str, str] = {}
        self.left: dict[str, str] = {}

    def __call__(self, node: torch.fx.Node) -> QuantizedLinear | str:
        name, reason = linear_module_name(node) or node.name, self.reason(node)
        if reason is not None:
            self.left[name] = reason
            return reason
        operands = [operand for operand in linear_operands(node)[1:] if operand is not None]
        for operand in operands:
            # The components become constants of this graph, and dynamo would run it for any other layer with
            # the same code and shapes. With a guard on the identity of its parameters it compiles again.
            _guard_identity(operand)
        weight, bias = (*(self._placeholders[operand] for operand in operands), None)[:2]
        quantized = recipes.lookup(weight)
        self.quantized[name] = "data-free" if quantized is None else "attached"
        return quantized or recipes.remembered(weight, bias, self._config) or self._quantize(weight, bias)

    def reason(self, node: torch.fx.Node) -> str | None:
        """Why this linear is not quantized, or None."""
        if self._why is not None:
            return self._why
        name = linear_module_name(node) or node.name
        pattern = ignored_by(self._config.ignore, name)
        if pattern is not None:
            return f"ignored by {pattern!r}"
        _, weight, bias = (self._placeholders.get(operand) for operand in linear_operands(node))
        reason = self._unfit(weight, bias, has_bias=linear_operands(node)[2] is not None)
        if reason is not None and isinstance(weight, torch.Tensor) and weight not in _named:
            _named[weight] = True
            log.warning("%s stays as it is: %s", name, reason)
        return reason

    def _unfit(self, weight, bias, has_bias: bool) -> str | None:
        parameter = torch.nn.Parameter
        if not isinstance(weight, parameter) or (has_bias and not isinstance(bias, parameter)):
            return "its weight or bias is not a parameter, but computed or passed in"
        if isinstance(weight, FakeTensor) or weight.is_meta:
            return "its weight has no data"
        if weight.dim() != 2 or weight.dtype not in _FLOATS:
            return f"its weight must be 2-D float32, float16 or bfloat16, not {weight.dim()}-D {weight.dtype}"
        if recipes.lookup(weight) is not None:
            return None
        (n, k), rank, group = weight.shape, self._config.rank, self._config.group_size
        if k % group:
            return f"group_size {group} does not divide its {k} input features"
        if Scheme.parse(self._config.scheme).method in ("twin", "svdquant") and rank >= min(n, k):
            return f"rank {rank} is not below the smaller of its dimensions, {n} and {k}"
        return None

    def _quantize(self, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
        if not self._warned:
            self._warned = True
            log.warning(
                "no calibration data: linears are quantized to %s from their weights alone, which costs "
                "quality; tqcompile.compile(model, calib_data) does better",
                self._config.scheme,
            )
        # Components made under inference_mode would be inference tensors, which no later no_grad run can use.
        with torch.inference_mode(False), torch.no_grad():
            quantized = recipe.quantize_data_free(weight, bias, self._config)
        recipes.remember(weight, bias, self._config, quantized)
        return quantized


def _refuse_gradients(gm: torch.fx.GraphModule, choose: _Choices) -> None:
    for node in gm.graph.nodes:
        if op_name(node) or (is_linear(node) and choose.reason(node) is None):
            values = example_value(node)
            for value in values if isinstance(values, tuple) else (values,):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise ConfigError(
                        f'backend "twinquant": {linear_module_name(node) or node.name} would need '
                        "a gradient, and quantized linears have none. Run the model under torch.no_grad() or "
                        "torch.inference_mode(), or call model.requires_grad_(False)"
                    )


if "twinquant" not in list_backends(exclude_tags=()):
    # A checkout that is not installed has no entry point.
    register_backend(twinquant, name="twinquant")
