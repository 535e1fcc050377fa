"""The written-out twin components -> one ``quantize_activation`` and one ``twin_linear`` op.

In: any graph. Out: the same graph; each subgraph with the structure of an op's reference became that op.
A subgraph whose inner values are read elsewhere is left alone, and named in
``gm.meta["fuse_twin_linear"]``; the quantized activation and its scale may have any number of readers.
Must hold after: nothing that decompose_linear wrote for an op is left, except in those subgraphs.
"""

import functools
import itertools
import operator

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import example_value
from tqcompile.passes.matcher import Match
from tqcompile.passes.reference_graphs import TRANSFORM_TENSORS, TWIN_TENSORS, quantize_graph, twin_graph

# Literals that stand for any ratio and any dtype in a pattern; nothing else in the references equals them.
_ANY_RATIO, _ANY_DTYPE = 3.0e33, torch.complex32
_WILDCARDS = {_ANY_RATIO: "act_ratio", _ANY_DTYPE: "dtype"}
_OPS = ("quantize_activation", "twin_linear")


class FuseTwinLinear(Pass):
    name = "fuse_twin_linear"

    def __init__(self):
        self._alone: set[torch.fx.Node] = set()

    def call(self, gm: torch.fx.GraphModule) -> bool:
        gm.meta[self.name] = {}
        self._alone.clear()
        erased: set[torch.fx.Node] = set()
        # From the end: the rank-R part of a twin linear looks like a small twin linear of its own.
        for anchor in reversed(gm.graph.find_nodes(op="call_method", target="to")):
            if anchor in erased or anchor in self._alone:
                continue
            match = next(filter(None, (Match(pattern, anchor, _WILDCARDS) for pattern in _patterns())), None)
            if match is None:
                continue
            outside = match.read_outside()
            if outside is not None:
                gm.meta[self.name][anchor.name] = f"inner value {outside.name} is read elsewhere"
                self._alone.update(match.inner)
                continue
            match.replace(_insert_quantize(match) if len(match.outputs) == 2 else _insert_twin(match))
            erased.update(match.inner)
        return bool(erased)

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            ours = node.meta.get("reference_of") in _OPS and node.target in (torch.matmul, torch.round)
            if ours and node not in self._alone:
                raise self.fail("a part of a decomposed linear is left without its op", node)


@functools.cache
def _patterns() -> tuple[torch.fx.Graph, ...]:
    low_rank = ("down", "down_scale", "up", "up_scale")
    forms = itertools.product(((), ("x_scale",)), ((), low_rank), ((), ("bias",)), (_ANY_RATIO, 0.0))
    twin = [
        twin_graph(("x", *scale, "residual", "residual_scale", *rank, *bias), ratio, _ANY_DTYPE)
        for scale, rank, bias, ratio in forms
        if scale or ratio == 0.0
    ]
    # With input_scale first: the form without it would match the inner part of the form with it.
    transforms = itertools.product((("input_scale",), ()), (("rotation",), ()))
    return (*twin, *(quantize_graph(("x", *scale, *rotation)) for scale, rotation in transforms))


def _insert_twin(match: Match) -> list[torch.fx.Node]:
    (anchor,) = match.outputs
    args = [match.tensors.get(name) for name in TWIN_TENSORS]
    args += [match.literals.get("act_ratio", 0.0), match.literals["dtype"]]
    with anchor.graph.inserting_before(anchor):
        op = anchor.graph.call_function(torch.ops.tqcompile.twin_linear.default, tuple(args))
    op.meta = _unmarked(anchor.meta)
    return [op]


def _insert_quantize(match: Match) -> list[torch.fx.Node]:
    quantized, scale = match.outputs
    args = tuple(match.tensors.get(name) for name in TRANSFORM_TENSORS)
    with scale.graph.inserting_before(scale):
        op = scale.graph.call_function(torch.ops.tqcompile.quantize_activation.default, args)
        parts = [scale.graph.call_function(operator.getitem, (op, i)) for i in range(2)]
    for node in (op, *parts):
        node.meta = _unmarked(quantized.meta)
    x = example_value(args[0])
    if x is not None:
        # No node had this value before. Shapes and dtypes follow from x alone.
        key = "val" if "val" in args[0].meta else "example_value"
        values = torch.ops.tqcompile.quantize_activation.default(x)
        for node, value in zip((op, *parts), (values, *values), strict=True):
            node.meta[key] = value
    return parts


def _unmarked(meta: dict) -> dict:
    return {key: value for key, value in meta.items() if key != "reference_of"}
