"""Group shared inputs: a captured graph with meta["find_linears"] in, the same graph out.

meta["group_shared_inputs"]: input node name -> names of the linears that read it, in graph order (q/k/v).
Copies, eval-mode dropout and casts do not split a group; reading the input in different dtypes does.
"""

import torch.fx

from tqcompile.passes.base import Pass
from tqcompile.passes.graph import kind


def input_of(linear: torch.fx.Node) -> torch.fx.Node:
    """The node that stands for what ``linear`` reads: the origin of the copies and casts in front of it.

    Where the origin has another dtype, it is the first cast of the origin to the dtype that the linear reads.
    """
    node, dtype = linear.args[0], linear.args[0].meta["val"].dtype
    while kind(node) == "same":
        node = node.args[0]
    if node.meta["val"].dtype == dtype:
        return node
    casts = (u for u in node.users if kind(u) == "same" and u.args[0] is node and u.meta["val"].dtype == dtype)
    return next(casts, linear.args[0])


class GroupSharedInputs(Pass):
    name = "group_shared_inputs"

    def requires(self, gm: torch.fx.GraphModule) -> None:
        if "find_linears" not in gm.meta:
            raise self.fail("no linears are recorded; run FindLinears first")

    def call(self, gm: torch.fx.GraphModule) -> bool:
        linears = gm.meta["find_linears"]
        groups: dict[str, list[str]] = {}
        for node in gm.graph.nodes:
            if node.name in linears:
                group = groups.setdefault(input_of(node).name, [])
                if linears[node.name] not in group:
                    group.append(linears[node.name])
        gm.meta[self.name] = groups
        return False

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        grouped = {name for group in gm.meta[self.name].values() for name in group}
        missing = set(gm.meta["find_linears"].values()) - grouped
        if missing:
            raise self.fail(f"in no group: {', '.join(sorted(missing))}")
