"""q/k/v and gate/up become one wide linear and a Split.

Before: nodes of one op, in torch's layout, that read one activation and share ``down`` (TwinLinear) or ``offset``
(LatticeLinear). After: one node whose other inputs are those of the siblings, row under row, and a Split of its output.
Siblings that differ in anything else (group size, bits, a bias on one of them) stay apart. Every output feature keeps
its own weights and scales, so the result is the same.
"""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from tqcompile.exporters.portable import DOMAIN, INPUTS, SOURCE, sources

STACKED = {
    "TwinLinear": ("residual", "residual_scale", "up", "up_scale", "bias"),
    "LatticeLinear": ("codes", "scale", "zero", "bias"),
}


class MergeSiblings(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        families: dict[tuple, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type in STACKED:
                families[_key(node)].append(node)
        merged = [_merge(model.graph, family) for family in families.values() if len(family) > 1]
        return ir.passes.PassResult(model, modified=bool(merged))


def _inputs(node: ir.Node) -> dict[str, ir.Value | None]:
    names = INPUTS[node.op_type]
    given = dict.fromkeys(names)
    given.update(zip(names, node.inputs, strict=False))
    return given


def _key(node: ir.Node) -> tuple:
    """What siblings have in common."""
    given, stacked = _inputs(node), STACKED[node.op_type]
    same = tuple(value for name, value in given.items() if name not in stacked)
    like = tuple(None if given[name] is None else (given[name].dtype, given[name].shape[1:]) for name in stacked)
    settings = tuple((name, attribute.value) for name, attribute in sorted(node.attributes.items()))
    return node.op_type, same, like, settings


def _merge(graph: ir.Graph, family: list[ir.Node]) -> ir.Node:
    parents, leaves = zip(*(sources(node)[0].rpartition(".")[::2] for node in family), strict=True)
    name = f"{parents[0]}.{'+'.join(leaves)}".lstrip(".")
    given = _inputs(family[0])
    for key in STACKED[family[0].op_type]:
        if given[key] is not None:
            given[key] = _stack(graph, f"{name}.{key}", [_inputs(node)[key] for node in family])
    widths = [node.outputs[0].shape[-1] for node in family]
    sizes = _initializer(graph, f"{name}.sizes", ir.tensor(np.array(widths)))
    attributes = family[0].attributes
    wide = ir.node(family[0].op_type, list(given.values()), domain=DOMAIN, attributes=attributes, name=name)
    split = ir.node("Split", [wide.outputs[0], sizes], {"axis": -1}, num_outputs=len(family), name=f"{name}.split")
    old = [node.outputs[0] for node in family]
    wide.outputs[0].shape = ir.Shape([*old[0].shape[:-1], sum(widths)])
    for value in (wide.outputs[0], *old):
        value.dtype = ir.DataType.FLOAT
    for node in (wide, split):
        node.metadata_props[SOURCE] = ",".join(source for member in family for source in sources(member))
    ir.convenience.replace_nodes_and_values(graph, family[0], family, [wide, split], old, split.outputs)
    return wide


def _stack(graph: ir.Graph, name: str, parts: list[ir.Value]) -> ir.Value:
    """An initializer with the rows of all parts, put together when the file is written."""
    tensors = [part.const_value for part in parts]
    shape = ir.Shape([sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]])

    def rows() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors]), name=name)

    return _initializer(graph, name, ir.LazyTensor(rows, dtype=tensors[0].dtype, shape=shape, name=name))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer, or the one of that name: layers that are called twice are merged twice, in the same way."""
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
