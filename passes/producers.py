"""What stands in front of a two-component linear and can be computed with it: transform, norm, gate.

The patterns are those of transformers' modules in a graph from dynamo; the transform is also found as the inlined
reference. A producer is found at the node whose value the linear reads.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.fx
from torch.nn.functional import silu

from tqcompile.passes.buffers import example_value, number
from tqcompile.passes.matcher import Match
from tqcompile.passes.reference_graphs import trace, transform_graph

# Literals that stand for any literal of their type; nothing in the patterns equals them.
_ANY_DTYPE, _ANY_BLOCK, _ANY_EPS = torch.complex32, 987654321, 3.0e33
_WILDCARDS = {_ANY_DTYPE: "dtype", _ANY_BLOCK: "block", _ANY_EPS: "eps"}


class Producer(NamedTuple):
    """Arguments of ``prologue`` that follow from what was found, and the matched calls, last first."""

    kind: str
    x: torch.fx.Node
    other: torch.fx.Node | None
    gain: torch.fx.Node | None
    eps: float
    inner: tuple[torch.fx.Node, ...]


def find_transform(anchor: torch.fx.Node) -> Match | None:
    """The on-line transform that ends at ``anchor``; its tensors are x, input_scale and rotation."""
    return next(filter(None, (Match(pattern, anchor, _WILDCARDS) for pattern in _transforms())), None)


def find_producer(anchor: torch.fx.Node, may_read: Callable[[torch.fx.Node], bool]) -> Producer | str:
    """The RMSNorm (with the addition before it) or the gated product that ends at ``anchor``.

    Args:
        may_read: whether a node may read the anchor, for more than its shape; the readers of all inner values must be
            part of the pattern.
    Returns:
        the producer, or the reason why there is none to fuse.
    """
    for kind, pattern in _producers():
        match = Match(pattern, anchor, _WILDCARDS)
        if not match:
            continue
        readers = [user for user in anchor.users if not reads_shape(user)]
        outside = match.read_outside() or (None if all(map(may_read, readers)) else anchor)
        if outside is not None:
            return f"the {kind} before it is read elsewhere, at {outside.name}"
        found = _gate(match) if kind == "silu_mul" else _norm(match)
        return found if _one_kind(found, anchor) else f"the {kind} before it mixes dtypes or shapes"
    return "no norm or gate before it"


def reads_shape(node: torch.fx.Node) -> bool:
    """Whether a node asks its first argument for its shape, dtype or device, and not for its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")


def _gate(match: Match) -> Producer:
    return Producer("silu_mul", match.tensors["x"], match.tensors["other"], None, 0.0, tuple(match.inner))


def _norm(match: Match) -> Producer:
    eps = number(match.tensors.get("eps", match.literals.get("eps")))
    x, other, inner = match.tensors["x"], None, tuple(match.inner)
    if x.target is operator.add and _is_plain_sum(x):
        # The sum is the residual stream: others may read it, the op returns it.
        (x, other), inner = x.args, (*inner, x)
    return Producer("rms_norm", x, other, match.tensors["gain"], eps, inner)


def _is_plain_sum(node: torch.fx.Node) -> bool:
    values = [example_value(a) if isinstance(a, torch.fx.Node) else None for a in node.args]
    return all(isinstance(v, torch.Tensor) for v in values) and _alike(values[0], values[1])


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def _one_kind(found: Producer, anchor: torch.fx.Node) -> bool:
    """Whether shapes and dtypes are those the op takes."""
    x, out = example_value(found.x), example_value(anchor)
    if x is None or out is None or not _alike(x, out) or x.shape[-1] % 2:
        return False
    if found.kind == "rms_norm":
        gain = example_value(found.gain)
        return gain is not None and gain.dtype == x.dtype and gain.shape == x.shape[-1:] and found.eps is not None
    other = example_value(found.other)
    return other is not None and _alike(x, other)


@functools.cache
def _transforms() -> tuple[torch.fx.Graph, ...]:
    # With input_scale first: the form without it would match the end of the form with it.
    forms = (("x", "input_scale", "rotation"), ("x", "input_scale"), ("x", "rotation"))
    return tuple(itertools.chain(*((trace(_transform, form), transform_graph(form)) for form in forms)))


def _transform(x, input_scale=None, rotation=None):
    """``transform_activation`` as dynamo sees it, dtypes and the block being constants."""
    if input_scale is not None:
        x = (x.float() * input_scale).to(_ANY_DTYPE)
    if rotation is not None:
        blocks = x.unflatten(-1, (-1, _ANY_BLOCK))
        x = torch.matmul(blocks, rotation.to(_ANY_DTYPE)).flatten(-2)
    return x


@functools.cache
def _producers() -> tuple[tuple[str, torch.fx.Graph], ...]:
    def norm(x, gain, eps=_ANY_EPS):
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return gain * (wide * torch.rsqrt(variance + eps)).to(_ANY_DTYPE)

    norms = [("rms_norm", trace(norm, form)) for form in (("x", "gain"), ("x", "gain", "eps"))]
    options = itertools.product(({}, {"inplace": False}), (False, True))
    return (*norms, *(("silu_mul", _gated(flags, swap)) for flags, swap in options))


def _gated(flags: dict, swap: bool) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    factors = (graph.call_function(silu, (x,), flags), other)
    graph.output(graph.call_function(operator.mul, factors[::-1] if swap else factors))
    return graph
