"""Names the implementation of every op of ours: the one place where that decision can be read.

In: nodes of ours with example values.
Out: the same graph; ``gm.meta["lower"]`` maps node name -> "triton", "triton: <form>" where an op has kernels of
several forms and the graph fixes the number of tokens, or "reference: <reason>". The op itself dispatches by the same
predicates when it runs. On CUDA a reference is logged, once per op and reason.
Must hold after: every node of ours has an entry.
"""

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.ops.dispatch import kernel_form, kernel_or_reason, reason_unsupported
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import example_value, op_arguments


def op_name(node: torch.fx.Node) -> str | None:
    """The name of the op, such as "twin_linear", when it is one of ours; None for any other node."""
    target = node.target
    is_ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "tqcompile"
    return target._schema.name.split("::")[1] if is_ours else None


class Lower(Pass):
    name = "lower"

    def call(self, gm: torch.fx.GraphModule) -> bool:
        gm.meta[self.name] = {node.name: self._decide(node, op) for node in gm.graph.nodes if (op := op_name(node))}
        return False

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if op_name(node) and node.name not in gm.meta[self.name]:
                raise self.fail("no implementation was chosen", node)

    def _decide(self, node: torch.fx.Node, op: str) -> str:
        for name, argument in op_arguments(node).items():
            if isinstance(argument, torch.fx.Node) and example_value(argument) is None:
                raise self.fail(f"argument {name} has no example value; trace with example inputs", node)
        chosen = implementation(node)
        if chosen.startswith("reference") and _values(node)[0].device.type == "cuda":
            kernel_or_reason(op, *_values(node))  # says so in the log, once for this op and reason
        return chosen


def implementation(node: torch.fx.Node) -> str:
    """What runs a node of ours whose arguments have example values: see the module's docstring."""
    values = _values(node)
    device = values[0].device.type
    if device != "cuda":
        return f"reference: there is no kernel for device {device}"
    reason = reason_unsupported(op_name(node), *values)
    if reason is not None:
        return f"reference: {reason}"
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    form = kernel_form(op_name(node), *values) if all(isinstance(size, int) for size in sizes) else None
    return f"triton: {form}" if form else "triton"


def _values(node: torch.fx.Node) -> list:
    return [example_value(a) if isinstance(a, torch.fx.Node) else a for a in op_arguments(node).values()]
