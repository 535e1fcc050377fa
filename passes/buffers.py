"""Tensors of a graph: attaching new ones, and reading what is known about a node's value."""

import contextlib
import operator
from collections.abc import Mapping

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor

_VALUES = ("example_value", "val")  # where dynamo and torch.export record what a node evaluates to
_OPERATORS = "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_IN_PLACE = {operator.setitem, *(getattr(operator, f"i{name}") for name in _OPERATORS.split())}


def attach_buffer(gm: torch.fx.GraphModule, name: str, tensor: torch.Tensor) -> None:
    """Register ``tensor`` as buffer ``name`` of ``gm``, so that a ``get_attr`` node can read it.

    A graph from dynamo carries a private table of the origin of its parameters; AOTAutograd refuses a buffer
    that is not in it ("not found in param_name_to_source"), and takes one that is for a static input of CUDA
    graphs.
    """
    gm.register_buffer(name, tensor)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        from torch._dynamo.source import ConstantSource

        sources[name] = ConstantSource(name)


def attribute(gm: torch.fx.GraphModule, target: str) -> torch.Tensor:
    """The tensor that a ``get_attr`` node with this target reads."""
    module, _, name = target.rpartition(".")
    return getattr(gm.get_submodule(module), name)


def example_value(node: torch.fx.Node):
    """What the node evaluates to, for its shape, dtype and device only; None when the graph does not say.

    A ``get_attr`` is its own example.
    """
    for key in _VALUES:
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return attribute(node.graph.owning_module, node.target)
    return None


def real_tensor(
    gm: torch.fx.GraphModule, node: torch.fx.Node | None, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The tensor that holds the node's values, of a ``get_attr`` or of a placeholder named in ``tensors``; or None."""
    if node is None:
        return None
    tensor = attribute(gm, node.target) if node.op == "get_attr" else tensors.get(node.name)
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return None
    return tensor


def same_values(
    gm: torch.fx.GraphModule, a: torch.fx.Node | None, b: torch.fx.Node | None, tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Whether two operands are one node, or equal real tensors; nothing else is known to be equal."""
    if a is b:
        return True
    left, right = (real_tensor(gm, node, tensors) for node in (a, b))
    return (
        left is not None
        and right is not None
        and (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
        and torch.equal(left, right)
    )


def number(value) -> float | None:
    """A float argument as a number. Dynamo passes a float that may change as a node; asking for its value makes
    it a constant of this graph, with a guard."""
    if isinstance(value, torch.fx.Node):
        value = example_value(value)
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def call_op(graph: torch.fx.Graph, op, args: tuple, meta: dict) -> torch.fx.Node:
    """A call of ``op`` at the insertion point, with its example value where those of all its arguments are known.

    ``meta`` is that of the node it replaces.
    """
    node = graph.call_function(op, args)
    node.meta = {name: value for name, value in meta.items() if name not in (*_VALUES, "reference_of")}
    inputs = [example_value(a) for a in args if isinstance(a, torch.fx.Node)]
    if inputs and all(value is not None for value in inputs):
        fake = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        with fake or contextlib.nullcontext():
            set_example(node, op(*(_example(a, fake) for a in args)))
    return node


def get_item(result: torch.fx.Node, index: int, meta: dict) -> torch.fx.Node:
    """Element ``index`` of a node that returns several tensors, at the insertion point."""
    part = result.graph.call_function(operator.getitem, (result, index))
    part.meta = {name: value for name, value in meta.items() if name not in (*_VALUES, "reference_of")}
    values = example_value(result)
    if values is not None:
        set_example(part, values[index])
    return part


def set_example(node: torch.fx.Node, value) -> None:
    """Record what ``node`` evaluates to, as the tracer of its graph does."""
    exported = any("val" in placeholder.meta for placeholder in node.graph.find_nodes(op="placeholder"))
    node.meta["val" if exported else "example_value"] = value


def _example(argument, fake):
    if not isinstance(argument, torch.fx.Node):
        return argument
    value = example_value(argument)
    if fake is not None and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return fake.from_tensor(value, static_shapes=True)
    return value


def writes_in_place(node: torch.fx.Node) -> bool:
    """Whether the node may write to a tensor in place; dynamo's graphs are not functional."""
    if node.op == "call_method":
        return node.target.endswith("_") or node.target == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if getattr(node.target, "__module__", None) == "_operator":
        return node.target in _IN_PLACE
    # torch.relu_(x), F.silu(x, inplace=True) or F.silu(x, True), torch.add(x, y, out=z)
    flag = node.kwargs.get("inplace") or "out" in node.kwargs or any(arg is True for arg in node.args)
    return bool(flag) or getattr(node.target, "__name__", "").endswith("_")


def write_between(first: torch.fx.Node, last: torch.fx.Node) -> torch.fx.Node | None:
    """The earliest node from ``first`` on and before ``last``, which follows it, that may write in place; or None."""
    node = first
    while node is not last:
        if writes_in_place(node):
            return node
        node = node.next
    return None


def op_arguments(node: torch.fx.Node) -> dict[str, object]:
    """The arguments of a call of an operator by name, defaults included."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}
