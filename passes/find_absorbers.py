"""Find absorbers: a captured graph with meta["group_shared_inputs"] in, the same graph out.

meta["find_absorbers"]: input node name -> an Absorber, or the reason why there is none. An absorber's output
reaches the linears of the group, and nothing else, through ops that only move elements; that no channel
changes place is proven by moving channel numbers through those ops.
"""

import networkx as nx
import torch
import torch.fx

from tqcompile.passes.base import Pass
from tqcompile.passes.find_linears import is_linear
from tqcompile.passes.graph import describe, kind, move, origin, other_reader, sizes, to_networkx
from tqcompile.passes.group_shared_inputs import input_of
from tqcompile.passes.plan import Absorber

_aten = torch.ops.aten


class FindAbsorbers(Pass):
    name = "find_absorbers"

    def requires(self, gm: torch.fx.GraphModule) -> None:
        if "group_shared_inputs" not in gm.meta:
            raise self.fail("no groups are recorded; run GroupSharedInputs first")
        if "parameters" not in gm.meta:
            raise self.fail("parameters have no names; only graphs made by capture() can be analysed")

    def call(self, gm: torch.fx.GraphModule) -> bool:
        graph = to_networkx(gm)
        found: dict[str, Absorber | str] = {}
        for name in gm.meta["group_shared_inputs"]:
            try:
                found[name] = _Search(graph, graph.nodes[name]["fx"]).run()
            except _Refused as refused:
                found[name] = str(refused)
        gm.meta[self.name] = found
        return False


class _Refused(Exception):
    """Carries the reason why a group has no absorber."""


class _Search:
    """The absorber of the linears that read ``shared``; every method returns it or raises _Refused."""

    def __init__(self, graph: nx.DiGraph, shared: torch.fx.Node):
        self.graph, self.shared = graph, shared
        self.producer, self.path = origin(shared)

    def run(self) -> Absorber:
        node, target = self.producer, self.producer.target
        if sizes(node) is None or sizes(self.shared) is None:
            raise _Refused(f"the shape of {self.name(node)} depends on data")
        if target is _aten.layer_norm.default:
            return self.norm(*node.args[2:4])
        if target is _aten.rms_norm.default:
            return self.norm(*node.args[2:3])
        if target is _aten.mul.Tensor:
            return self.product([arg for arg in node.args if isinstance(arg, torch.fx.Node)])
        if target is _aten.scaled_dot_product_attention.default:
            return self.attention(*node.args[:3])
        if is_linear(node):
            self.require_order()
            return self.linear(node, self.reads_group)
        raise _Refused(f"the input comes from {self.name(node)}, which cannot take a scale")

    def norm(self, weight: torch.fx.Node | None = None, bias: torch.fx.Node | None = None) -> Absorber:
        """A gain (and a bias) over the channels of the producer."""
        gain = self.parameter(weight)
        if gain is None:
            raise _Refused(f"{self.name(self.producer)} has no gain over its channels")
        module, _, leaf = self.name(gain).rpartition(".")
        if leaf != "weight" or not module:
            raise _Refused(f"the gain {self.name(gain)} is not the `weight` of a norm module")
        shift = self.parameter(bias)
        if bias is not None and (shift is None or self.name(shift) != f"{module}.bias"):
            raise _Refused(f"the bias added by {self.name(self.producer)} is not {module}.bias")
        for parameter in (gain, shift) if shift else (gain,):
            self.require_readers(parameter, lambda reader, via: reader is self.producer)
        self.require_readers(self.producer, self.reads_group)
        self.require_order()
        return Absorber("norm", module)

    def product(self, factors: list[torch.fx.Node]) -> Absorber:
        """A norm written out (gain times normalised input), or a gate times the output of a linear."""
        for factor in factors:
            if self.parameter(factor):
                return self.norm(factor)
            leaves = [n for n in nx.ancestors(self.graph, factor.name) if not self.graph.in_degree(n)]
            fqns = [self.graph.nodes[name]["fqn"] for name in leaves]
            if fqns and all(fqns) and origin(factor)[0].op != "placeholder":
                how = self.name(origin(factor)[0])
                raise _Refused(f"the gain is computed from {fqns[0]} by {how}, as in 1 + weight: not a plain gain")
        self.require_readers(self.producer, self.reads_group)
        self.require_order()
        linears = [f for f in factors if is_linear(origin(f)[0]) and sizes(f) == sizes(self.producer)]
        if not linears:
            names = " and ".join(self.name(origin(factor)[0]) for factor in factors)
            raise _Refused(f"the input is the product of {names}: neither is the output of a linear")
        source, path = origin(linears[-1])
        once = self.producer.args.count(linears[-1]) == 1
        self.require_channels(_channels(source), path)
        return self.linear(source, lambda reader, via: once and reader is self.producer and via is linears[-1])

    def linear(self, node: torch.fx.Node, accepts) -> Absorber:
        if self.graph.nodes[node.name]["fqn"] is None:
            raise _Refused(f"{self.name(node)} belongs to no module")
        self.require_readers(node, accepts)
        return Absorber("linear", self.name(node))

    def attention(self, query: torch.fx.Node, key: torch.fx.Node, value: torch.fx.Node) -> Absorber:
        """The rows of the value projection: attention mixes tokens, never channels."""
        source, path = origin(value)
        if not is_linear(source):
            raise _Refused(f"the value of attention comes from {self.name(source)}, not from a linear")
        if len(sizes(self.producer)) != 4 or len(sizes(value)) != 4:
            raise _Refused(f"{self.name(self.producer)} is not laid out as (batch, heads, tokens, channels)")
        self.require_readers(self.producer, self.reads_group)
        once = self.producer.args.count(value) == 1
        name = self.linear(source, lambda reader, via: once and reader is self.producer and via is value).module
        (batch, heads, tokens, head_dim), rows = sizes(self.producer), sizes(source)[-1]
        moved = move(_channels(source), path)  # the row of the projection behind every element of the value
        repeat, rest = divmod(heads * head_dim, rows)
        if rest or not repeat or not torch.equal(moved, moved[:1, :, :1].expand_as(moved)):
            raise _Refused(f"the {rows} rows of {name} are not whole heads of {head_dim} channels")
        row = moved[0, :, 0].repeat_interleave(heads // moved.shape[1], 0)  # (heads, head_dim)
        channel = torch.arange(heads * head_dim)
        expected = (channel // head_dim // repeat) * head_dim + channel % head_dim
        self.require_channels(row[None, :, None].expand(batch, heads, tokens, head_dim), self.path, expected)
        return Absorber("attn_v", name, repeat, head_dim, self.unrotatable(row, repeat))

    def unrotatable(self, row: torch.Tensor, repeat: int) -> str:
        """Why a rotation within each head cannot move through attention; row: (heads, head_dim), of the projection.

        A scale needs only that every channel returns to its place. A rotation also needs that the channels that
        attention calls a head are neighbours on both sides.
        """
        heads, head_dim = row.shape
        channel = torch.arange(heads * head_dim)
        neighbours = channel // head_dim // repeat * head_dim + channel % head_dim
        after = move(channel.view(1, heads, 1, head_dim).expand(sizes(self.producer)), self.path)
        if torch.equal(row.flatten(), neighbours) and torch.equal(after, channel.expand_as(after)):
            return ""
        return f"the channels of one head of {self.name(self.producer)} are not neighbours in what it reads or feeds"

    def require_readers(self, producer: torch.fx.Node, accepts) -> None:
        other = other_reader(self.graph, producer, accepts)
        if other is not None:
            raise _Refused(f"{self.name(producer)} also feeds {self.name(other)}")

    def reads_group(self, reader: torch.fx.Node, via: torch.fx.Node) -> bool:
        named = is_linear(reader) and self.graph.nodes[reader.name]["fqn"] is not None
        return named and reader.args[0] is via and via not in reader.args[1:] and input_of(reader) is self.shared

    def require_order(self) -> None:
        """Channel j of the producer is input channel j of the group."""
        self.require_channels(_channels(self.producer), self.path)

    def require_channels(self, source: torch.Tensor, path: list, expected: torch.Tensor | None = None) -> None:
        expected = torch.arange(source.shape[-1]) if expected is None else expected
        moved = move(source, path)
        if moved.shape[-1:] != expected.shape or not torch.equal(moved, expected.expand_as(moved)):
            raise _Refused(f"channels change place between {self.name(self.producer)} and what it feeds")

    def parameter(self, node: torch.fx.Node | None) -> torch.fx.Node | None:
        """The parameter over the producer's channels that ``node`` is, behind casts; None if it is none."""
        while isinstance(node, torch.fx.Node) and kind(node) == "same":
            node = node.args[0]
        named = isinstance(node, torch.fx.Node) and node.op == "placeholder" and self.graph.nodes[node.name]["fqn"]
        return node if named and sizes(node) == sizes(self.producer)[-1:] else None

    def name(self, node: torch.fx.Node) -> str:
        return describe(self.graph, node)


def _channels(node: torch.fx.Node) -> torch.Tensor:
    """The channel number of every element of a node."""
    return torch.arange(sizes(node)[-1]).expand(sizes(node))
