"""Find the residual stream: a captured graph in, the same graph out.

meta["find_residual_stream"]: a ResidualStream that an orthogonal rotation R may turn, or the reason why none may.
The graph is walked in order, and every node that reads something rotated must be one of: an addition of linears'
outputs to the stream, an RMSNorm of it (which commutes with R), that norm's plain gain, or a linear that reads the
result. Any other reader is a refusal; so is a parameter that has another use, or that the example did not reach.
"""

import dataclasses

import torch
import torch.fx

from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import op_arguments
from tqcompile.passes.find_linears import is_linear, linear_module_name
from tqcompile.passes.graph import describe, kind, move, sizes, to_networkx
from tqcompile.passes.plan import ResidualStream, StreamNorm

_aten = torch.ops.aten


class FindResidualStream(Pass):
    name = "find_residual_stream"

    def requires(self, gm: torch.fx.GraphModule) -> None:
        if "parameters" not in gm.meta or "tied" not in gm.meta:
            raise self.fail("parameters have no names; only graphs made by capture() can be analysed")

    def call(self, gm: torch.fx.GraphModule) -> bool:
        try:
            gm.meta[self.name] = _Walk(gm).run()
        except _Refused as refused:
            gm.meta[self.name] = str(refused)
        return False


class _Refused(Exception):
    """Carries the reason why there is no stream that can be rotated."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a node holds. what: "stream", "square", "mean", "shifted" (by epsilon), "rsqrt", "normed" or "scaled"
    (by the gain of ``norm``). root: the node of the stream that it is or was computed from."""

    what: str
    root: torch.fx.Node
    norm: str = ""


class _Walk:
    """One walk over a graph; every method raises _Refused with the reason when the proof fails."""

    def __init__(self, gm: torch.fx.GraphModule):
        self.gm, self.graph = gm, to_networkx(gm)
        self.names, self.tied = gm.meta["parameters"], gm.meta["tied"]
        self.values: dict[torch.fx.Node, _Value] = {}
        self.written: set[torch.fx.Node] = set()  # linears and what leads from them to the stream
        self.reads: dict[tuple[str, ...], list[torch.fx.Node]] = {}  # a parameter's names -> its proven readers
        self.embeddings: list[str] = []
        self.norms: dict[str, list[str]] = {}
        self.producers: list[str] = []

    def run(self) -> ResidualStream:
        tables = [node for node in self.gm.graph.nodes if _is_embedding(node)]
        if not tables:
            raise _Refused("no embedding starts a residual stream")
        self.channels = self.sizes(tables[0])[-1]
        for node in self.gm.graph.nodes:
            value = self.value(node)
            if value is not None:
                self.values[node] = value
        if not any(self.norms.values()):
            raise _Refused("no linear reads the residual stream through an RMSNorm")
        self.require_nothing_else_reads_producers()
        self.require_no_other_use_of_parameters()
        norms = tuple(StreamNorm(module, tuple(linears)) for module, linears in self.norms.items() if linears)
        return ResidualStream(self.channels, _unique(self.embeddings), norms, _unique(self.producers), self.head())

    def value(self, node: torch.fx.Node) -> _Value | None:
        """What ``node`` holds; None if nothing that the rotation changes."""
        if _is_embedding(node) and self.sizes(node)[-1] == self.channels:
            self.embeddings.append(self.own(node, _arguments(node)[0], "weight"))
            return _Value("stream", node)
        if kind(node) == "silent" or not any(source in self.values for source in node.all_input_nodes):
            return None
        if kind(node) in ("same", "shape"):
            return self.moved(node)
        read = [self.values[source] for source in node.all_input_nodes if source in self.values]
        rule = {"stream": self.read_stream, "normed": self.read_normed, "scaled": self.read_scaled}
        found = rule.get(read[0].what, self.read_statistic)(node, read)
        if found is None and not (is_linear(node) and read[0].what in ("normed", "scaled")):
            raise _Refused(self.refusal(node, read[0]))
        return found

    def refusal(self, node: torch.fx.Node, read: _Value) -> str:
        name = describe(self.graph, node)
        if read.norm:
            return f"{read.norm} feeds {name}, which is no linear"
        if node.target is _aten.layer_norm.default:
            return f"{name} reads the residual stream: it subtracts the mean, which a rotation changes"
        if read.what == "normed" and node.target is _aten.mul.Tensor:
            return f"{name} multiplies the normalised stream by something that is not the plain gain of a norm module"
        return f"{name} reads the residual stream, and is neither an addition to it nor an RMSNorm of it"

    def moved(self, node: torch.fx.Node) -> _Value | None:
        value = self.values.get(node.args[0])
        if value is None or kind(node) == "same":
            return value  # None: only a size or a dtype was read
        self.require_channels(node)
        return _Value("stream", node) if value.what == "stream" else value

    def read_stream(self, node: torch.fx.Node, read: list[_Value]) -> _Value | None:
        root = read[0].root
        if node.target is _aten.add.Tensor:
            return self.addition(node)
        if _is_scaling(node):
            return _Value("stream", node)
        if node.target is _aten.pow.Tensor_Scalar and _arguments(node)[1] == 2:
            return _Value("square", root)
        if node.target is _aten.rms_norm.default:
            _, shape, gain, _ = _arguments(node)
            if list(shape) == [self.channels]:
                return self.normed(root) if gain is None else self.scaled(node, gain, root)
        return self.normalised(node, read)

    def normalised(self, node: torch.fx.Node, read: list[_Value]) -> _Value | None:
        """x * rsqrt(mean(x^2) + epsilon), in either order."""
        same_root = len(read) == 2 and read[0].root is read[1].root
        if node.target is _aten.mul.Tensor and same_root and {v.what for v in read} == {"stream", "rsqrt"}:
            return self.normed(read[0].root)
        return None

    def read_statistic(self, node: torch.fx.Node, read: list[_Value]) -> _Value | None:
        what, root = read[0].what, read[0].root
        if what == "rsqrt":
            return self.normalised(node, read)
        if what == "square" and node.target is _aten.mean.dim:
            _, dims, keep, _ = _arguments(node)
            last = len(self.sizes(root)) - 1
            return _Value("mean", root) if keep and list(dims or ()) in ([-1], [last]) else None
        if what == "mean" and node.target is _aten.add.Tensor and _is_number(_arguments(node)[1]):
            return _Value("shifted", root)
        if what == "shifted" and node.target is _aten.rsqrt.default:
            return _Value("rsqrt", root)
        return None

    def normed(self, root: torch.fx.Node) -> _Value:
        self.norms.setdefault("", [])
        return _Value("normed", root)

    def scaled(self, node: torch.fx.Node, gain: torch.fx.Node, root: torch.fx.Node) -> _Value:
        norm = self.own(node, gain, "weight")
        self.norms.setdefault(norm, [])
        return _Value("scaled", root, norm)

    def read_normed(self, node: torch.fx.Node, read: list[_Value]) -> _Value | None:
        if is_linear(node):
            return self.consumer(node, "")
        others = [n for n in node.all_input_nodes if n not in self.values]
        plain = len(others) == 1 and self.parameter(others[0]) is not None and self.sizes(others[0]) == (self.channels,)
        return self.scaled(node, others[0], read[0].root) if plain and node.target is _aten.mul.Tensor else None

    def read_scaled(self, node: torch.fx.Node, read: list[_Value]) -> None:
        if is_linear(node):
            self.consumer(node, read[0].norm)

    def consumer(self, node: torch.fx.Node, norm: str) -> None:
        _, weight, bias = _arguments(node)
        if weight in self.values or bias in self.values:
            raise _Refused(f"{describe(self.graph, node)} has the residual stream for a weight")
        self.norms[norm].append(self.own(node, weight, "weight"))

    def addition(self, node: torch.fx.Node) -> _Value:
        """stream + linear, stream + stream, or stream + (linear + linear)."""
        *operands, multiple = _arguments(node)
        if multiple != 1:
            raise _Refused(f"{describe(self.graph, node)} adds a multiple to the residual stream")
        for operand in operands:
            if not self.is_wide(operand):
                raise _Refused(f"{describe(self.graph, node)} adds one number to all channels of the residual stream")
            if operand not in self.values:
                self.write(operand)
            elif self.values[operand].what != "stream":
                raise _Refused(f"{describe(self.graph, node)} adds what an RMSNorm made to the residual stream")
        return _Value("stream", node)

    def write(self, node: torch.fx.Node) -> None:
        """Prove that a node added to the stream is the output of linears, or a sum of such."""
        if is_linear(node):
            _, weight, bias = _arguments(node)
            self.producers.append(self.own(node, weight, "weight"))
            if bias is not None:
                self.own(node, bias, "bias")
        elif node in self.values or not self.leads_to_linears(node):
            what = describe(self.graph, node)
            raise _Refused(f"the residual stream is also written by {what}, which is neither a linear nor an embedding")
        self.written.add(node)

    def leads_to_linears(self, node: torch.fx.Node) -> bool:
        if kind(node) == "shape":
            self.require_channels(node)
        if kind(node) in ("same", "shape") or _is_scaling(node):
            self.write(node.args[0])
            return True
        if node.target is not _aten.add.Tensor:
            return False
        *operands, multiple = _arguments(node)
        if multiple != 1 or not all(self.is_wide(operand) for operand in operands):
            return False
        for operand in operands:
            self.write(operand)
        return True

    def is_wide(self, value) -> bool:
        """Whether ``value`` holds something else for every channel."""
        return isinstance(value, torch.fx.Node) and self.sizes(value)[-1:] == (self.channels,)

    def sizes(self, node: torch.fx.Node) -> tuple[int, ...]:
        found = sizes(node)
        if found is None:
            raise _Refused(f"the shape of {describe(self.graph, node)} depends on data")
        return found

    def require_channels(self, node: torch.fx.Node) -> None:
        shape = self.sizes(node.args[0])
        self.sizes(node)
        channels = torch.arange(shape[-1])
        after = move(channels.expand(shape), [node])
        if after.shape[-1:] != channels.shape or not torch.equal(after, channels.expand_as(after)):
            raise _Refused(f"{describe(self.graph, node)} moves channels of the residual stream")

    def parameter(self, node: torch.fx.Node) -> tuple[str, ...] | None:
        """All names of the parameter that ``node`` is, behind casts; None if it is none."""
        while kind(node) == "same":
            node = node.args[0]
        return self.tied.get(self.names.get(node.name)) if node.op == "placeholder" else None

    def own(self, reader: torch.fx.Node, node: torch.fx.Node, leaf: str) -> str:
        """The module whose parameter ``leaf`` is ``node``, which ``reader`` reads: the module that made the reader,
        or, for a norm's gain, the one that the parameter belongs to."""
        names = self.parameter(node)
        module = linear_module_name(reader)
        if names and f"{module}.{leaf}" not in names:
            owner, _, last = names[0].rpartition(".")
            module = owner if last == leaf and not is_linear(reader) and not _is_embedding(reader) else None
        if not names or not module:
            what = names[0] if names else describe(self.graph, node)
            raise _Refused(f"{describe(self.graph, reader)} uses {what}, which is not the `{leaf}` of its module")
        self.reads.setdefault(names, []).append(reader)
        return module

    def require_nothing_else_reads_producers(self) -> None:
        for node in self.written:
            for user in node.users:
                size_only = kind(user) in ("same", "shape") and user.args[0] is not node
                if user not in self.written and user not in self.values and not size_only and kind(user) != "silent":
                    raise _Refused(
                        f"{describe(self.graph, node)} writes the residual stream and also feeds "
                        f"{describe(self.graph, user)}"
                    )

    def require_no_other_use_of_parameters(self) -> None:
        used: dict[tuple[str, ...], list[torch.fx.Node]] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" and self.names.get(node.name) in self.tied:
                used.setdefault(self.tied[self.names[node.name]], []).extend(_readers(node))
        for names, readers in used.items():
            if not readers:
                raise _Refused(f"the example input does not reach {names[0]}, which may read or write the stream")
            proven = self.reads.get(names)
            other = next((r for r in readers if r not in proven), None) if proven is not None else None
            if other is not None:
                raise _Refused(f"{names[0]} is also read by {describe(self.graph, other)}")
            linears = sum(is_linear(reader) for reader in readers)
            tables = sum(_is_embedding(reader) for reader in readers)
            if proven is not None and len(readers) > 1 and (tables < len(readers) - 1 or linears > 1):
                raise _Refused(f"{names[0]} is used {len(readers)} times (module reuse)")

    def head(self) -> str:
        """The linear whose weight is an embedding's."""
        for readers in self.reads.values():
            for node in readers:
                if is_linear(node) and any(_is_embedding(reader) for reader in readers):
                    return linear_module_name(node)
        return ""


def _readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Who reads a node's values, directly or behind casts."""
    found = []
    for user in node.users:
        if kind(user) == "same" and user.args[0] is node:
            found += _readers(user)
        elif kind(user) != "silent":
            found.append(user)
    return found


def _is_embedding(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target is _aten.embedding.default


def _is_scaling(node: torch.fx.Node) -> bool:
    return node.target in (_aten.mul.Tensor, _aten.div.Tensor) and _is_number(_arguments(node)[1])


def _arguments(node: torch.fx.Node) -> list:
    """All arguments of an aten op in the order of its schema, however they were passed."""
    return list(op_arguments(node).values())


def _is_number(value) -> bool:
    return isinstance(value, int | float)


def _unique(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
