"""Linears that read one quantized activation through one down projection become one linear (q/k/v, gate/up).

In: ``twin_linear`` and ``lattice_linear`` nodes, example values, and the real tensors of their weights.
Out: one node per group, its rows those of the members one below the other, and a split.
No second copy of a weight is made: the rows are concatenated once, and the original tensors (a module's buffers,
so also its ``state_dict``) become views of the result, with the same values. Tensors that already lie one behind
the other in one storage are used as they are, so a second compilation changes nothing.
``gm.meta["merge_siblings"]``: node name -> why it was not merged with the one before that reads the same.
Must hold after: every pair that reads the same activation is merged or has a reason.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import (
    attach_buffer,
    call_op,
    example_value,
    get_item,
    number,
    op_arguments,
    real_tensor,
    same_values,
    set_example,
    write_between,
)
from tqcompile.passes.producers import find_transform

TWIN = torch.ops.tqcompile.twin_linear.default
LATTICE = torch.ops.tqcompile.lattice_linear.default


class _Kind(NamedTuple):
    """Arguments of an op. rows: tensors with one row per output feature, the weight first; shared: tensors that must
    be equal, and what they are called; literals: numbers that must be equal."""

    rows: tuple[str, ...]
    shared: tuple[str, ...]
    called: str
    literals: tuple[str, ...]


_KINDS = {
    TWIN: _Kind(
        ("residual", "residual_scale", "up", "up_scale", "bias"),
        ("down", "down_scale"),
        "down projections",
        ("act_ratio", "dtype"),
    ),
    LATTICE: _Kind(("codes", "scale", "zero", "bias"), ("offset",), "offsets", ("bits",)),
}


class MergeSiblings(Pass):
    """``tensors``: placeholder name -> its real tensor. ``depend_on``: told each operand whose real tensor entered
    the graph as a constant, so that the graph is not run with another."""

    name = "merge_siblings"

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        depend_on: Callable[[torch.fx.Node], None] = lambda node: None,
    ):
        self._tensors = tensors or {}
        self._depend_on = depend_on
        self.moved_inputs = False  # whether tensors of placeholders have a new storage since the last call

    def call(self, gm: torch.fx.GraphModule) -> bool:
        gm.meta[self.name] = {}
        self.moved_inputs = False
        groups = [group for group in self._groups(gm) if len(group) > 1]
        for group in groups:
            self._merge(gm, group)
        return bool(groups)

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for group in self._groups(gm):
            if len(group) > 1:
                raise self.fail("it reads the same activation as the linear before and was not merged", group[1])

    def _groups(self, gm: torch.fx.GraphModule) -> list[list[torch.fx.Node]]:
        """Mergeable linears, in graph order; reasons go to ``gm.meta``."""
        sites: dict[tuple, list[list[torch.fx.Node]]] = {}
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target not in _KINDS:
                continue
            x, transform = _source(node)
            groups = sites.setdefault((node.target, x, op_arguments(node).get("x_scale")), [])
            readers = [group for group in groups if self._reads_the_same(gm, group[0], node, transform)]
            reasons = [self._difference(gm, group, node) for group in readers]
            if None in reasons:
                readers[reasons.index(None)].append(node)
                continue
            groups.append([node])
            if reasons:
                gm.meta[self.name][node.name] = f"not merged with {readers[0][0].name}: {reasons[0]}"
        return [group for groups in sites.values() for group in groups]

    def _reads_the_same(self, gm, first: torch.fx.Node, node: torch.fx.Node, transform: dict) -> bool:
        if op_arguments(node).get("x_scale") is not None:
            return True
        earlier = _source(first)[1]
        alike = (same_values(gm, earlier.get(n), transform.get(n), self._tensors) for n in ("input_scale", "rotation"))
        return write_between(first, node) is None and all(alike)

    def _difference(self, gm: torch.fx.GraphModule, group: list[torch.fx.Node], node: torch.fx.Node) -> str | None:
        """What keeps ``node`` out of the group, or None."""
        first, own, kind = op_arguments(group[0]), op_arguments(node), _KINDS[node.target]
        if any(_literal(first[name]) != _literal(own[name]) for name in kind.literals):
            return "they quantize their input, or round their output, in another way"
        for name in kind.shared:
            if not same_values(gm, first[name], own[name], self._tensors):
                return f"their {kind.called} differ"
        members = [op_arguments(member) for member in group]
        for name in kind.rows:
            if (first[name] is None) != (own[name] is None):
                return f"only one of them has {name}"
            if own[name] is None:
                continue
            mine, *others = (real_tensor(gm, a[name], self._tensors) for a in (own, *members))
            if mine is None or None in others:
                return f"{name} has no data here, or is computed"
            if mine.is_inference() or any(other.is_inference() for other in others):
                return f"{name} was made under inference_mode"
            if any(mine is other for other in others):
                return f"they share {name}"
            if any((mine.dtype, mine.device, mine.shape[1:]) != (o.dtype, o.device, o.shape[1:]) for o in others):
                return f"dtype, device or columns of {name} differ"
        return None

    def _merge(self, gm: torch.fx.GraphModule, group: list[torch.fx.Node]) -> None:
        first, members, kind = group[0], [op_arguments(node) for node in group], _KINDS[group[0].target]
        rows = [real_tensor(gm, member[kind.rows[0]], self._tensors).shape[0] for member in members]
        arguments = {**members[0], **{name: _literal(members[0][name]) for name in kind.literals}}
        with gm.graph.inserting_before(first):
            for name in kind.rows:
                if arguments[name] is not None:
                    parts = [real_tensor(gm, member[name], self._tensors) for member in members]
                    buffer = f"tq_merged_{first.name}_{name}"
                    if not follow_each_other(parts):
                        self.moved_inputs |= any(member[name].op == "placeholder" for member in members)
                    attach_buffer(gm, buffer, concatenated(parts))
                    arguments[name] = gm.graph.get_attr(buffer)
            for member in members:
                self._depend_on(member[kind.rows[0]])
            merged = call_op(gm.graph, first.target, tuple(arguments.values()), first.meta)
            split = gm.graph.call_method("split", (merged, rows, -1))
            if example_value(merged) is not None:
                set_example(split, example_value(merged).split(rows, -1))
            parts = [get_item(split, i, node.meta) for i, node in enumerate(group)]
        for node, part in zip(group, parts, strict=True):
            node.replace_all_uses_with(part)
            _allow_strides(part)
            gm.graph.erase_node(node)
        for member in members[1:]:
            if member.get("x_scale") is None and member["x"] is not members[0]["x"]:
                _erase_unread(member["x"])


def concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensors of ``parts`` below each other, in one storage that they share from now on."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    with torch.inference_mode(False), torch.no_grad():
        if follow_each_other(parts):
            return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
        whole = torch.cat([part.detach() for part in parts])
        start = whole.storage_offset()
        for part in parts:
            shape, stride = part.shape, whole.stride()
            part.set_(whole.untyped_storage(), start, shape, stride)
            start += part.numel()
        return whole


def follow_each_other(parts: list[torch.Tensor]) -> bool:
    """Whether the tensors lie one behind the other in one storage."""
    at = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or not part.is_contiguous() or part.storage_offset() != at:
            return False
        at += part.numel()
    return True


def _source(node: torch.fx.Node) -> tuple[torch.fx.Node, dict[str, torch.fx.Node]]:
    """What a linear reads: its operand, or of a floating operand what the transform in front reads, and that."""
    arguments = op_arguments(node)
    match = find_transform(arguments["x"]) if arguments.get("x_scale") is None else None
    return (match.tensors["x"], match.tensors) if match else (arguments["x"], {})


def _literal(value):
    """A literal, or the float that dynamo passes as a node."""
    return number(value) if isinstance(value, torch.fx.Node) else value


def _allow_strides(part: torch.fx.Node) -> None:
    """``view`` refuses some shapes of a strided part; ``reshape`` is the same where view works."""
    for user in part.users:
        if (user.op, user.target) == ("call_method", "view") and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"


def _erase_unread(node: torch.fx.Node) -> None:
    if not node.users and node.op.startswith("call"):
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unread(source)
