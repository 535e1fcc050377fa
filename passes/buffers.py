"""Tensors of a graph: attaching new ones, and reading what is known about a node's value."""

import torch
import torch.fx


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

    Dynamo records it as ``example_value``, torch.export as ``val``; a ``get_attr`` is its own example.
    """
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return attribute(node.graph.owning_module, node.target)
    return None
