"""Names the implementation of every op of ours: the one place where that decision can be read.

In: ``quantize_activation`` and ``twin_linear`` nodes with example values.
Out: the same graph; ``gm.meta["lower"]`` maps node name -> "triton" or "reference: <reason>". The op itself
dispatches by the same predicate when it runs. On CUDA a reference is logged, once per op and reason.
Must hold after: every node of ours has an entry.
"""

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.ops.dispatch import kernel_or_reason, reason_unsupported
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import example_value


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
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        values = []
        for argument in node.target._schema.arguments:
            value = given.get(argument.name, argument.default_value)
            if isinstance(value, torch.fx.Node):
                value = example_value(value)
                if value is None:
                    raise self.fail(f"argument {argument.name} has no example value; trace with example inputs", node)
            values.append(value)
        device = values[0].device.type
        if device != "cuda":
            return f"reference: there is no kernel for device {device}"
        reason = reason_unsupported(op, *values)
        if reason is None:
            return "triton"
        kernel_or_reason(op, *values)  # says so in the log, once for this op and reason
        return f"reference: {reason}"
