"""The FX graph as a networkx DiGraph, and the questions the analysis passes ask it.

One vertex a node, in graph order, with ``fx`` (the node), ``kind`` (see :func:`kind`) and ``fqn`` (of a
parameter, a buffer, or the module of a linear, else None); one edge a value read. Only aten-level graphs are
classified.
"""

from collections.abc import Callable

import networkx as nx
import torch
import torch.fx

from tqcompile.passes.find_linears import is_linear, linear_module_name

_aten = torch.ops.aten
VIEWS = {_aten.view.default, _aten._unsafe_view.default}
SHAPES = VIEWS | {
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.movedim.int,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.expand.default,
    _aten.repeat_interleave.self_int,
    _aten.slice.Tensor,
    _aten.select.int,
}
CASTS = {
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.to.device,
    _aten.to.other,
    _aten._to_copy.default,
    _aten.type_as.default,
}
COPIES = {_aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.detach.default}
SILENT = {_aten._assert_tensor_metadata.default, _aten.sym_size.int}


def to_networkx(gm: torch.fx.GraphModule) -> nx.DiGraph:
    parameters = gm.meta.get("parameters", {})
    graph = nx.DiGraph()
    for node in gm.graph.nodes:
        fqn = linear_module_name(node) if is_linear(node) else parameters.get(node.name)
        graph.add_node(node.name, fx=node, kind=kind(node), fqn=fqn)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def kind(node: torch.fx.Node) -> str:
    """What a node does.

    "linear"; "same": its first argument's values, up to a cast between floating dtypes; "shape": its first
    argument's elements rearranged, repeated or dropped, none combined; "silent": reads no values; "op":
    anything else that is called; otherwise the node's own op ("placeholder", "output").
    """
    if is_linear(node):
        return "linear"
    if node.op != "call_function":
        return node.op
    target = node.target
    if target in SILENT:
        return "silent"
    if target in COPIES or (target is _aten.dropout.default and (not node.args[2] or node.args[1] == 0)):
        return "same"
    if target in CASTS:
        return "same" if all(n.meta["val"].is_floating_point() for n in (node, node.args[0])) else "op"
    if target is _aten.slice.Tensor and sizes(node) is not None and sizes(node) == sizes(node.args[0]):
        return "same"
    return "shape" if target in SHAPES else "op"


def origin(node: torch.fx.Node) -> tuple[torch.fx.Node, list[torch.fx.Node]]:
    """The node whose elements ``node`` holds, and the ops between them that move elements, in graph order."""
    path = []
    while kind(node) in ("same", "shape"):
        path.append(node)
        node = node.args[0]
    return node, path[::-1]


def other_reader(graph: nx.DiGraph, producer: torch.fx.Node, accepts: Callable) -> torch.fx.Node | None:
    """The first node not accepted of those that read ``producer``, directly or behind moves of its elements.

    ``accepts(reader, via)`` judges a reader and the (moved) value it reads.
    """
    pending = [producer]
    while pending:
        via = pending.pop()
        for name in graph.successors(via.name):
            reader, what = graph.nodes[name]["fx"], graph.nodes[name]["kind"]
            if what in ("same", "shape"):
                if reader.args[0] is via:  # else it only gives a size or a dtype
                    pending.append(reader)
            elif what != "silent" and not accepts(reader, via):
                return reader
    return None


def move(elements: torch.Tensor, path: list[torch.fx.Node]) -> torch.Tensor:
    """``elements`` after the moves of ``path``: run on channel numbers, it shows where each channel goes."""
    for node in path:
        if kind(node) == "shape":
            # What is a view of the captured strides may need a copy here.
            target = _aten.reshape.default if node.target in VIEWS else node.target
            args, kwargs = torch.fx.map_arg((node.args[1:], node.kwargs), lambda n: _hint(n.meta["val"]))
            elements = target(elements, *args, **kwargs)
    return elements


def sizes(node: torch.fx.Node) -> tuple[int, ...] | None:
    """The shape of a node at the captured example; None where it depends on data."""
    shape = tuple(_hint(size) for size in node.meta["val"].shape)
    return None if None in shape else shape


def _hint(size) -> int | None:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def describe(graph: nx.DiGraph, node: torch.fx.Node) -> str:
    """A node in words, for reasons: a parameter's or a linear's name, else the op and its module."""
    if node.op == "output":
        return "the model's output"
    called = node.target if node.op == "call_function" else node.op
    called = str(called).split(".")[1] if isinstance(called, torch._ops.OpOverload) else called
    module = linear_module_name(node)
    where = f" in {module}" if module else ""
    return graph.nodes[node.name]["fqn"] or f"{getattr(called, '__name__', called)}{where} (node {node.name})"
