"""The ops' plain-torch references as small FX graphs: what is inlined, and what is searched for.

A reference graph has one placeholder per tensor argument that is present, named like the argument. As the
references themselves are traced, there is one definition of correctness, and no copy of it for the compiler.
"""

import functools
from collections.abc import Callable

import torch.fx

from tqcompile.ops.quantize_activation import quantize_activation_reference, transform_activation
from tqcompile.ops.twin_linear import twin_linear_reference

TRANSFORM_TENSORS = ("x", "input_scale", "rotation")
TWIN_TENSORS = (
    "x",
    "x_scale",
    "residual",
    "residual_scale",
    "down",
    "down_scale",
    "up",
    "up_scale",
    "bias",
)


def trace(function: Callable, present: tuple[str, ...], **arguments) -> torch.fx.Graph:
    """FX graph of ``function`` called with ``arguments`` and a placeholder per name in ``present``."""
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    proxies = {name: torch.fx.Proxy(graph.placeholder(name), tracer) for name in present}
    graph.output(tracer.create_arg(function(**proxies, **arguments)))
    return graph


@functools.cache
def transform_graph(present: tuple[str, ...]) -> torch.fx.Graph:
    """Of ``transform_activation``; ``present`` is a part of TRANSFORM_TENSORS. Output: x transformed."""
    return trace(transform_activation, present, **_absent(TRANSFORM_TENSORS, present))


@functools.cache
def quantize_graph(present: tuple[str, ...]) -> torch.fx.Graph:
    """Of ``quantize_activation_reference``. Output: (x_q, x_scale)."""
    return trace(quantize_activation_reference, present, **_absent(TRANSFORM_TENSORS, present))


@functools.cache
def twin_graph(present: tuple[str, ...], act_ratio: float, dtype: torch.dtype) -> torch.fx.Graph:
    """Of ``twin_linear_reference``; ``present`` is a part of TWIN_TENSORS. Output: y."""
    absent = _absent(TWIN_TENSORS, present)
    return trace(twin_linear_reference, present, act_ratio=act_ratio, dtype=dtype, **absent)


def _absent(names: tuple[str, ...], present: tuple[str, ...]) -> dict[str, None]:
    return {name: None for name in names if name not in present}


def inline(
    into: torch.fx.Graph, graph: torch.fx.Graph, tensors: dict[str, torch.fx.Node], meta: dict
) -> torch.fx.Node | tuple[torch.fx.Node, ...]:
    """Copy a reference graph to the insertion point of ``into``.

    Args:
        tensors: argument name -> the node that takes the placeholder's place.
        meta: written to the metadata of every copied node.
    Returns:
        the node, or nodes, of the graph's output.
    """
    known = {node: tensors[node.target] for node in graph.find_nodes(op="placeholder")}
    inputs = set(known)
    output = into.graph_copy(graph, known)
    for node, copy in known.items():
        if node not in inputs:
            copy.meta = dict(meta)
    return output
