"""Linear -> the twin components written out in plain torch: the definition of correctness.

In: a graph with linears, from dynamo or from torch.export, and the quantized components of some of them.
Out: transform, quantize, residual product, down, up, add, bias, by inlining the references of our ops; the
components' tensors become buffers. The bias is the one of the components, which may have absorbed something,
never the original node. Dead weight placeholders stay: dynamo keeps books on them.
Components below four bits become the transform and ``lattice_linear`` itself.
Must hold after: every linear left is named with a reason in ``gm.meta["decompose_linear"]``.
"""

import operator
from collections.abc import Callable, Mapping

import torch
import torch.fx
from torch.nn.functional import linear

from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.hadamard import signed_hadamard
from tqcompile.methods.lattice import input_rotation
from tqcompile.ops.lattice_linear import mix_outputs
from tqcompile.passes.base import Pass
from tqcompile.passes.buffers import attach_buffer, call_op, example_value, set_example
from tqcompile.passes.find_linears import is_linear
from tqcompile.passes.reference_graphs import (
    TWIN_TENSORS,
    inline,
    quantize_graph,
    trace,
    transform_graph,
    twin_graph,
)

Components = Mapping[str, QuantizedLinear] | Callable[[torch.fx.Node], QuantizedLinear | str]

_ARGUMENTS = {
    "transform.input_scale": "input_scale",
    "transform.rotation": "rotation",
    "residual.weight_packed": "residual",
    "residual.weight_scale": "residual_scale",
    "down.weight_packed": "down",
    "down.weight_scale": "down_scale",
    "up.weight_packed": "up",
    "up.weight_scale": "up_scale",
    "down": "dense_down",
    "up": "dense_up",
    "bias": "bias",
}
_TRANSFORM = ("input_scale", "rotation")
_INHERITED = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node")


def linear_operands(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node | None]:
    """(x, weight, bias or None) of a linear node, however they were passed."""
    given = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    return given["input"], given["weight"], given.get("bias")


class DecomposeLinear(Pass):
    """``components``: linear node name -> QuantizedLinear, or a function of the node that may answer with a
    reason to leave that linear alone. ``gm.meta["decompose_linear"]`` collects the reasons by node name."""

    name = "decompose_linear"

    def __init__(self, components: Components):
        self._components = components

    def _choose(self, node: torch.fx.Node) -> QuantizedLinear | str:
        if isinstance(self._components, Mapping):
            return self._components.get(node.name, "no components were given for it")
        return self._components(node)

    def call(self, gm: torch.fx.GraphModule) -> bool:
        left, buffers = {}, {}
        linears = [n for n in gm.graph.nodes if is_linear(n) and "reference_of" not in n.meta]
        for node in linears:
            quantized = self._choose(node)
            if isinstance(quantized, str):
                left[node.name] = quantized
                continue
            self._check(node, quantized)
            with gm.graph.inserting_before(node):
                if quantized.spec.weight_bits < 4:
                    result = self._lattice(gm, node, quantized, buffers)
                    node.replace_all_uses_with(result)
                    gm.graph.erase_node(node)
                    continue
                tensors = {
                    _ARGUMENTS[key]: self._buffer(gm, f"tq_{node.name}_{key.replace('.', '_')}", tensor, buffers)
                    for key, tensor in quantized.tensors.items()
                }
                result = self._written_out(gm.graph, node, quantized.spec, tensors)
            result.meta = {**node.meta, "reference_of": result.meta["reference_of"]}
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
        gm.meta[self.name] = left
        return len(left) < len(linears)

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if is_linear(node) and "reference_of" not in node.meta and node.name not in gm.meta[self.name]:
                raise self.fail("this linear was neither replaced nor left with a reason", node)

    def _check(self, node: torch.fx.Node, quantized: QuantizedLinear) -> None:
        x, weight, bias = linear_operands(node)
        spec, weight = quantized.spec, example_value(weight)
        if weight is not None and tuple(weight.shape) != (spec.out_features, spec.in_features):
            raise self.fail(
                f"the weight is {tuple(weight.shape)} but its components are for "
                f"({spec.out_features}, {spec.in_features}); quantize this weight again",
                node,
            )
        if bias is not None and "bias" not in quantized.tensors:
            raise self.fail("it has a bias, its components have none; quantize it with its bias", node)
        if example_value(x) is None:
            raise self.fail("the dtype of the input is unknown; trace the graph with example inputs", node)

    def _buffer(self, gm, name: str, tensor: torch.Tensor, buffers: dict[int, str]) -> torch.fx.Node:
        # A layer that is called twice has one set of buffers.
        if id(tensor) not in buffers:
            attach_buffer(gm, name, tensor)
            buffers[id(tensor)] = name
        return gm.graph.get_attr(buffers[id(tensor)])

    def _written_out(
        self, graph: torch.fx.Graph, node: torch.fx.Node, spec: LinearSpec, tensors: dict[str, torch.fx.Node]
    ) -> torch.fx.Node:
        """The same steps as ``TwinLinear.forward``, with references in the place of the ops."""
        inherited = {key: node.meta[key] for key in _INHERITED if key in node.meta}
        x = operand = linear_operands(node)[0]
        dtype = example_value(x).dtype

        def insert(reference: torch.fx.Graph, op: str, **more: torch.fx.Node):
            return inline(graph, reference, {**tensors, **more}, {**inherited, "reference_of": op})

        transforms = ("x", *(name for name in _TRANSFORM if name in tensors))
        scale = {}
        if spec.act_bits == 16:
            operand = insert(transform_graph(transforms), "transform", x=x)
        else:
            operand, scale["x_scale"] = insert(quantize_graph(transforms), "quantize_activation", x=x)
        present = tuple(name for name in TWIN_TENSORS if name in {"x": x, **scale, **tensors})
        y = insert(twin_graph(present, spec.act_ratio, dtype), "twin_linear", x=operand, **scale)
        if "dense_down" in tensors:
            dense = operand if spec.act_bits == 16 else insert(transform_graph(transforms), "transform", x=x)
            low_rank = trace(_dense_low_rank, ("y", "dense", "dense_down", "dense_up"), dtype=dtype)
            y = insert(low_rank, "low_rank", y=y, dense=dense)
        return y

    def _lattice(
        self, gm: torch.fx.GraphModule, node: torch.fx.Node, quantized: QuantizedLinear, buffers: dict[int, str]
    ) -> torch.fx.Node:
        """The same steps as ``LatticeLinear.forward``."""
        spec, tensors = quantized.spec, dict(quantized.tensors)
        device = tensors["weight_codes"].device
        rotations = {
            "transform.rotation": input_rotation(spec.rotation_signs, tensors.pop("transform.basis", None)),
            "output_rotation": signed_hadamard(spec.output_signs) if spec.output_signs else None,
        }
        tensors |= {key: matrix.to(device) for key, matrix in rotations.items() if matrix is not None}
        read = {
            key: self._buffer(gm, f"tq_{node.name}_{key.replace('.', '_')}", tensor, buffers)
            for key, tensor in tensors.items()
        }
        inherited = {key: node.meta[key] for key in _INHERITED if key in node.meta}
        x = operand = linear_operands(node)[0]
        transform = {_ARGUMENTS[key]: read[key] for key in read if key.startswith("transform.")}
        if transform:
            graph = transform_graph(("x", *(name for name in _TRANSFORM if name in transform)))
            operand = inline(gm.graph, graph, {**transform, "x": x}, {**inherited, "reference_of": "transform"})
            set_example(operand, example_value(x))
        names = ("weight_codes", "weight_scale", "weight_zero", "weight_offset")
        bias = read.get("bias")
        args = (operand, *map(read.get, names), None if spec.output_signs else bias, spec.weight_bits)
        y = call_op(gm.graph, torch.ops.tqcompile.lattice_linear.default, args, node.meta)
        if spec.rank:
            t = operand
            for part in ("down", "up"):
                packed = (read[f"{part}.weight_packed"], read[f"{part}.weight_scale"])
                args = (t, None, *packed, None, None, None, None, None, 0.0, example_value(x).dtype)
                t = call_op(gm.graph, torch.ops.tqcompile.twin_linear.default, args, node.meta)
            total = gm.graph.call_function(operator.add, (y, t))
            total.meta = dict(node.meta)
            return total
        if not spec.output_signs:
            return y
        behind = {"y": y, "rotation": read["output_rotation"], "scale": read["output_scale"]}
        present = behind if bias is None else {**behind, "bias": bias}
        absent = {"bias": None} if bias is None else {}
        y = inline(gm.graph, trace(mix_outputs, tuple(present), **absent), present, inherited)
        y.meta = dict(node.meta)
        return y


def _dense_low_rank(y, dense, dense_down, dense_up, dtype):
    return y + linear(linear(dense, dense_down.to(dtype)), dense_up.to(dtype))
