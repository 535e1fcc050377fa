"""Find linears: any FX graph in (dynamo or export), the same graph out.

meta["find_linears"]: linear node name -> fully qualified name of the module that made it, in graph order.
meta["unnamed_linears"]: names of linear nodes whose module is not recorded in the graph.
"""

import re

import torch
import torch.fx

from tqcompile.passes.base import Pass

LINEARS = (torch.ops.aten.linear.default, torch._C._nn.linear, torch.nn.functional.linear)
_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_PART = re.compile(r"[^.\[\]'\"]+")


def is_linear(node: torch.fx.Node) -> bool:
    """Whether ``node`` computes ``x @ weight.T + bias``, as dynamo or as torch.export spells it."""
    return node.op == "call_function" and node.target in LINEARS


def linear_module_name(node: torch.fx.Node) -> str | None:
    """Name of the module whose forward made ``node``; None if that is the root module or not recorded."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = next(reversed(stack.values()))[0]
    # export writes "model.layers.0"; dynamo "L['self'].model.layers.0" or "L['self']._modules['model']..."
    parts = _PART.findall(_ROOT.sub("", path))
    return ".".join(part for part in parts if part != "_modules") or None


class FindLinears(Pass):
    name = "find_linears"

    def call(self, gm: torch.fx.GraphModule) -> bool:
        names = {node.name: linear_module_name(node) for node in gm.graph.nodes if is_linear(node)}
        gm.meta[self.name] = {node: module for node, module in names.items() if module is not None}
        gm.meta["unnamed_linears"] = [node for node, module in names.items() if module is None]
        return False
