"""Linears that read one tensor quantize it once (Inductor does not merge equal custom ops).

In: ``quantize_activation`` nodes; q, k and v each store their own copy of one scale and rotation.
Out: nodes with the same x and equal transforms became the first of them.
Equal: the same node, or equal real tensors at compile time, of ``get_attr`` and, by placeholder, ``tensors``;
fake tensors equal nothing. A node that writes in place between two quantizations keeps them apart.
Must hold after: no two quantizations of one x by the same nodes are left without a write between them.
"""

import operator
from collections.abc import Mapping

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import op_arguments, same_values, writes_in_place


class ShareActivationQuant(Pass):
    """``tensors``: placeholder name -> the real tensor it stands for, as dynamo gives them to a backend."""

    name = "share_activation_quant"

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None):
        self._tensors = tensors or {}

    def call(self, gm: torch.fx.GraphModule) -> bool:
        merged = self._equal_pairs(gm, lambda a, b: same_values(gm, a, b, self._tensors))
        for first, node in merged:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
        for first in dict.fromkeys(first for first, _ in merged):
            parts: dict[int, torch.fx.Node] = {}
            for part in sorted(user for user in first.users if user.target is operator.getitem):
                keep = parts.setdefault(part.args[1], part)
                if keep is not part:
                    part.replace_all_uses_with(keep)
                    gm.graph.erase_node(part)
        return bool(merged)

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for _, node in self._equal_pairs(gm, lambda a, b: a is b):
            raise self.fail("the same activation is still quantized twice", node)

    def _equal_pairs(self, gm: torch.fx.GraphModule, same) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
        """(first, later) for every quantization that an earlier one can serve."""
        pairs, firsts = [], []
        for node in gm.graph.nodes:
            if writes_in_place(node):
                firsts.clear()
            elif node.target is torch.ops.tqcompile.quantize_activation.default:
                x, *transform = op_arguments(node).values()
                for first in firsts:
                    first_x, *first_transform = op_arguments(first).values()
                    if x is first_x and all(same(a, b) for a, b in zip(transform, first_transform, strict=True)):
                        pairs.append((first, node))
                        break
                else:
                    firsts.append(node)
        return pairs
