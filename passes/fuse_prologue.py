"""Quantized activation and its linears -> ``prologue`` and ``twin_gemm``, the two ops that a GPU runs.

In: ``quantize_activation`` (or the plain-torch transform of a 16-bit activation) and the ``twin_linear`` nodes that
read it; example values; real tensors.
Out: one ``prologue`` per activation, with the RMSNorm (and the addition before it) or the gated product in front
when nothing else reads it, and one ``twin_gemm`` per linear, with an addition behind when only that reads the
linear. The sum is then rounded once, where the separate ops round twice. Residual scales that have an integer
form are passed as such (``channel_scale``), found once per weight.
What a ``lattice_linear`` reads comes from a ``prologue`` too, in natural order, where it has a transform, norm or gate.
``gm.meta["fuse_prologue"]``: node name -> why an activation kept its two ops, or what is not part of its prologue.
On CUDA the two ops must both have a kernel for the arguments; otherwise the portable ops stay, which have.
Must hold after: every quantization is fused or has a reason.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

import torch
import torch.fx

from tqcompile import ops  # noqa: F401  (registers the ops)
from tqcompile.ops.packing import integer_scales
from tqcompile.ops.prologue import keeps_wide
from tqcompile.ops.twin_gemm import defer_from_of
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
    write_between,
)
from tqcompile.passes.lower import implementation
from tqcompile.passes.producers import Producer, find_producer, find_transform, reads_shape

PROLOGUE, GEMM = torch.ops.tqcompile.prologue.default, torch.ops.tqcompile.twin_gemm.default
QUANTIZE, TWIN = torch.ops.tqcompile.quantize_activation.default, torch.ops.tqcompile.twin_linear.default
LATTICE = torch.ops.tqcompile.lattice_linear.default


@dataclasses.dataclass
class _Site:
    """One activation: what is transformed, the linears that read it, and the nodes that the prologue replaces."""

    at: torch.fx.Node  # the quantization, or the first linear: here the prologue goes
    x: torch.fx.Node
    transform: Mapping[str, torch.fx.Node]  # input_scale and rotation, where they exist
    twins: list[torch.fx.Node]
    replaced: list[torch.fx.Node]  # last first
    dtype: torch.dtype
    act_bits: int
    act_ratio: float
    planes: bool = True  # the order of 16-bit operands

    @property
    def defer_from(self) -> int:
        """Number of tokens from which the linears make t themselves; 0: never. What one of them would not do beside its
        product is done once, in the prologue."""
        if not self.planes or _down(op_arguments(self.twins[0]))[0] is None:
            return 0
        given = (op_arguments(twin) for twin in self.twins)
        return max(defer_from_of(*_shape(one["residual"])) for one in given)


class FusePrologue(Pass):
    """``tensors`` and ``depend_on`` are those of ``MergeSiblings``."""

    name = "fuse_prologue"

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        depend_on: Callable[[torch.fx.Node], None] = lambda node: None,
    ):
        self._tensors = tensors or {}
        self._depend_on = depend_on

    def call(self, gm: torch.fx.GraphModule) -> bool:
        gm.meta[self.name] = {}
        channel_scales: dict[str, torch.fx.Node | None] = {}
        done: set[torch.fx.Node] = set()
        for node in list(gm.graph.nodes):
            if node.target is LATTICE:
                reason = self._fuse_lattice(gm, node)
                done.update([node] if reason is None else [])
            elif node.target not in (QUANTIZE, TWIN) or node in done:
                continue
            elif node.target is TWIN and op_arguments(node)["x_scale"] is not None:
                continue  # it belongs to a quantization
            else:
                sites = self._sites(gm, node)
                reason = sites if isinstance(sites, str) else None
                for site in [] if reason else sites:
                    reason = reason or self._fuse(gm, site, len(sites) == 1, channel_scales)
                    if reason is None:
                        done.update(site.twins)
            if reason is not None:
                gm.meta[self.name][node.name] = reason
        for node in gm.graph.find_nodes(op="call_method", target="item"):
            if not node.users:  # an eps or a ratio that is a constant now
                gm.graph.erase_node(node)
        return bool(done)

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
            if node.name not in gm.meta[self.name]:
                raise self.fail("this quantization was neither fused nor left with a reason", node)

    def _sites(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> list[_Site] | str:
        """The activation that ``node`` quantizes or reads, once for each down projection behind it; or why it is
        left alone."""
        site = _quantized_site(node) if node.target is QUANTIZE else _float_site(node)
        if isinstance(site, str):
            return site
        value = example_value(site.x)
        if value is None or example_value(site.twins[0]) is None:
            return "the dtype of its input is unknown; trace the graph with example inputs"
        first = op_arguments(site.twins[0])
        site.dtype, site.act_ratio = value.dtype, number(first["act_ratio"])
        site.act_bits = 16 if first["x_scale"] is None else 4 if site.act_ratio > 0 else 8
        groups: list[list[torch.fx.Node]] = []
        for twin in site.twins:
            given = op_arguments(twin)
            if given["dtype"] != site.dtype:
                return f"{site.dtype} comes in, but the linear returns {given['dtype']}"
            if number(given["act_ratio"]) != site.act_ratio:
                return "its linears round it to 4 bits in different ways"
            same = (group for group in groups if self._same_down(gm, op_arguments(group[0]), given))
            group = next(same, None)
            if group is None:
                groups.append(group := [])
            group.append(twin)
        if value.shape[-1] % 2:
            return f"K is odd: {value.shape[-1]}"
        # The last one takes the quantization away.
        last = len(groups) - 1
        return [
            dataclasses.replace(site, twins=group, replaced=site.replaced if i == last else [])
            for i, group in enumerate(groups)
        ]

    def _same_down(self, gm: torch.fx.GraphModule, a: dict, b: dict) -> bool:
        return all(same_values(gm, a[name], b[name], self._tensors) for name in ("down", "down_scale"))

    def _fuse(self, gm: torch.fx.GraphModule, site: _Site, alone: bool, channel_scales: dict) -> str | None:
        """Rewrite one site; returns why not, and then nothing is changed. ``alone``: no other site has its x."""
        note, producer = None, self._producer(site) if alone else "its linears have different down projections"
        if isinstance(producer, str):
            note, producer = producer, Producer("none", site.x, None, None, 0.0, ())
        prologue, parts = self._insert_prologue(gm, site, producer)
        gemms: dict[torch.fx.Node, torch.fx.Node] = {}  # the node whose value it computes -> the gemm
        for twin in site.twins:
            addition, addend = _addition(twin)
            last, addend = (twin, None) if addition in (None, *gemms) else (addition, addend)
            gemms[last] = self._insert_gemm(gm, site, twin, last, addend, parts, channel_scales)
        reason = next(filter(None, map(_no_kernel, (prologue, *gemms.values()))), None)
        if reason is not None:
            for node in (*gemms.values(), *reversed(parts.values()), prologue):
                gm.graph.erase_node(node)
            return reason
        for last, gemm in gemms.items():
            last.replace_all_uses_with(gemm)
            if last.target is not TWIN:
                gm.graph.erase_node(last)
        self._remove(gm, site, producer, parts, site.twins)
        if note is not None:
            gm.meta[self.name][prologue.name] = note
        return None

    def _fuse_lattice(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> str | None:
        """Let a prologue compute what ``node`` reads, for all its readers; returns why not."""
        operand = op_arguments(node)["x"]
        if operand.target is operator.getitem and operand.args[0].target is PROLOGUE:
            return None  # it was done with another reader
        value = example_value(operand)
        if value is None:
            return "the dtype of its input is unknown; trace the graph with example inputs"
        readers = [node, *(user for user in operand.users if user is not node)]
        site = _Site(operand, operand, {}, readers, [], value.dtype, 16, 0.0, planes=False)
        match = find_transform(operand)
        if match is not None and match.read_outside() is None:
            site.x, site.replaced = match.tensors["x"], list(match.inner)
            site.transform = {name: tensor for name, tensor in match.tensors.items() if name != "x"}
        note, producer = None, self._producer(site)
        if isinstance(producer, str):
            if not site.transform:
                return producer
            note, producer = producer, Producer("none", site.x, None, None, 0.0, ())
        prologue, parts = self._insert_prologue(gm, site, producer)
        reason = _no_kernel(prologue)
        if reason is not None:
            for new in (*reversed(parts.values()), prologue):
                gm.graph.erase_node(new)
            return reason
        operand.replace_all_uses_with(parts["operand"])
        self._remove(gm, site, producer, parts, [])
        if note is not None:
            gm.meta[self.name][prologue.name] = note
        return None

    def _remove(self, gm, site: _Site, producer: Producer, parts: dict, twins: list[torch.fx.Node]) -> None:
        """Erase what the prologue and its gemms replaced."""
        if "h" in parts:
            (old,) = producer.inner[-1:]
            old.replace_all_uses_with(parts["h"], delete_user_cb=lambda user: user not in producer.inner)
        for reader in list(site.x.users):
            if producer.inner and reads_shape(reader):
                reader.replace_input_with(site.x, producer.x)  # it has the same shape, and stays
        for node in (*reversed(twins), *site.replaced, *producer.inner):
            gm.graph.erase_node(node)
        for part in parts.values():
            if not part.users:
                gm.graph.erase_node(part)

    def _producer(self, site: _Site) -> Producer | str:
        readers = {*site.replaced, *site.twins}
        found = find_producer(site.x, readers.__contains__)
        if isinstance(found, str):
            return found
        write = write_between(found.inner[-1], site.at)
        if write is not None:
            return f"{write.name} writes in place between the {found.kind} and the quantization"
        if found.other is not None and found.kind == "rms_norm":
            stream = found.inner[-1]
            if any(user < site.at for user in stream.users if user not in found.inner):
                # The sum is read before the prologue can give it back.
                return found._replace(x=stream, other=None, inner=found.inner[:-1])
        return found

    def _insert_prologue(self, gm, site: _Site, producer: Producer) -> tuple[torch.fx.Node, dict[str, torch.fx.Node]]:
        twin = op_arguments(site.twins[0])
        with gm.graph.inserting_before(site.at):
            # A buffer's node may come later in the graph; this one comes in time.
            down = [gm.graph.get_attr(n.target) if n and n.op == "get_attr" else n for n in _down(twin)]
            args = (producer.x, producer.other, producer.gain)
            args += (site.transform.get("input_scale"), site.transform.get("rotation"), *down)
            args += (producer.kind, producer.eps, site.act_bits, site.act_ratio, site.planes, site.defer_from)
            prologue = call_op(gm.graph, PROLOGUE, args, site.at.meta)
            names = {"operand": 0}
            if site.act_bits != 16:
                names["operand_scale"] = 1
            if down[0] is not None:
                names["t"] = 2
            if producer.kind == "rms_norm" and producer.other is not None:
                names["h"] = 3
            if keeps_wide(down[0], site.act_bits, site.defer_from):
                names["wide"] = 4
            return prologue, {name: get_item(prologue, i, site.at.meta) for name, i in names.items()}

    def _insert_gemm(self, gm, site: _Site, twin, last, addend, parts: dict, channel_scales: dict) -> torch.fx.Node:
        """The gemm of ``twin`` in the place of ``last``, the linear itself or the addition behind it."""
        given = op_arguments(twin)
        with gm.graph.inserting_before(last):
            channel = self._channel_scale(gm, given["residual_scale"], channel_scales)
            args = (parts["operand"], parts.get("operand_scale"), parts.get("t"))
            args += (given["residual"], given["residual_scale"], channel, given["up"], given["up_scale"])
            down = _down(given) if site.defer_from else (None, None)
            args += (given["bias"], addend, site.dtype, *down, site.defer_from)
            args += (parts["wide"], site.act_ratio) if "wide" in parts else (None, 0.0)
            return call_op(gm.graph, GEMM, args, twin.meta)

    def _channel_scale(self, gm, scale: torch.fx.Node, known: dict[str, str | None]) -> torch.fx.Node | None:
        """The row factor of the residual scales, (N,) float32, as a buffer; None when they have no integer form."""
        key = str(scale.target)
        if key not in known:
            tensor = real_tensor(gm, scale, self._tensors)
            form = _exact_form(tensor) if tensor is not None else None
            known[key] = None
            if form is not None:
                self._depend_on(scale)
                known[key] = f"tq_channel_{len(known)}"
                attach_buffer(gm, known[key], form)
        return None if known[key] is None else gm.graph.get_attr(known[key])


def _exact_form(scale: torch.Tensor) -> torch.Tensor | None:
    with torch.inference_mode(False), torch.no_grad():
        form = integer_scales(scale)
        if form is None or not torch.equal(form[0][:, None] * form[1], scale.float()):
            return None
        return form[0].contiguous()


def _down(twin: dict) -> tuple[torch.fx.Node | None, torch.fx.Node | None]:
    return twin.get("down"), twin.get("down_scale")


def _shape(packed: torch.fx.Node) -> tuple[int, int]:
    """(N, K) of packed weights."""
    n, half = example_value(packed).shape
    return n, 2 * half


def _quantized_site(node: torch.fx.Node) -> _Site | str:
    parts = list(node.users)
    twins: dict[torch.fx.Node, None] = {}
    for part in parts:
        for user in part.users:
            given = op_arguments(user) if user.target is TWIN else {}
            whole = [given.get("x"), given.get("x_scale")]
            if part.target is not operator.getitem or any(w not in parts for w in whole):
                return f"{user.name} reads it and is no linear of ours"
            twins[user] = None
    if not twins or any(part.target is not operator.getitem for part in parts):
        return "no linear of ours reads it"
    arguments = op_arguments(node)
    transform = {name: arguments[name] for name in ("input_scale", "rotation") if arguments[name] is not None}
    return _Site(node, arguments["x"], transform, sorted(twins), [*parts, node], None, 0, 0.0)


def _float_site(node: torch.fx.Node) -> _Site | str:
    operand = op_arguments(node)["x"]
    twins = sorted(user for user in operand.users if user.target is TWIN and op_arguments(user)["x"] is operand)
    write = write_between(twins[0], twins[-1])
    if write is not None:
        return f"{write.name} writes in place between the linears that read it"
    match = find_transform(operand)
    if match is None or match.read_outside() is not None or len(twins) != len(operand.users):
        return _Site(twins[0], operand, {}, twins, [], None, 0, 0.0)
    transform = {name: match.tensors[name] for name in ("input_scale", "rotation") if name in match.tensors}
    return _Site(twins[0], match.tensors["x"], transform, twins, list(match.inner), None, 0, 0.0)


def _addition(twin: torch.fx.Node) -> tuple[torch.fx.Node | None, torch.fx.Node | None]:
    """(the addition that alone reads a linear, what it adds), or (None, None)."""
    if len(twin.users) != 1:
        return None, None
    (user,) = twin.users
    if user.target is not operator.add or user.kwargs or not all(isinstance(a, torch.fx.Node) for a in user.args):
        return None, None
    others = [a for a in user.args if a is not twin]
    if len(others) != 1:
        return None, None
    y, other = example_value(twin), example_value(others[0])
    if not isinstance(other, torch.Tensor) or other.dtype != y.dtype or other.shape != y.shape:
        return None, None
    return user, others[0]


def _no_kernel(node: torch.fx.Node) -> str | None:
    found = implementation(node)
    on_cpu = example_value(node.args[0]).device.type == "cpu"
    return None if on_cpu or found.startswith("triton") else f"{node.target._schema.name.split('::')[1]}: {found}"
