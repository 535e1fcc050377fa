"""From torch's nodes to the portable form: op names, packed K-major weights and a function body for every op.

The naming scheme is in :mod:`tqcompile.exporters.onnx`, the bodies are in exporters/bodies.py.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from tqcompile.exporters.bodies import (
    int8_linear_function,
    lattice_linear_function,
    quantize_activation_function,
    twin_linear_function,
)

DOMAIN = "com.tqcompile"
QUANTIZE_INPUTS = ("x", "input_scale", "rotation")
INT8_INPUTS = ("x", "weight", "weight_scale", "bias")
TWIN_INPUTS = (
    *("x", "x_scale", "residual", "residual_scale"),
    *("down", "down_scale", "up", "up_scale", "bias"),
)
LATTICE_INPUTS = ("x", "codes", "scale", "zero", "offset", "bias")
# An op of another scheme joins here, in lower(), in bodies.py, in ort.py, and in the translations of trace.py.
INPUTS = {
    "QuantizeActivation": QUANTIZE_INPUTS,
    "TwinLinear": TWIN_INPUTS,
    "Int8Linear": INT8_INPUTS,
    "LatticeLinear": LATTICE_INPUTS,
}
SOURCE = "tqcompile.source"


def sources(node) -> list[str]:
    """The modules that a node came from: one, or several after siblings were merged."""
    return node.metadata_props.get(SOURCE, "").split(",")


def lower(model, opset: int) -> None:
    """Give every node of ours its portable op, packed K-major weights, float32 scales, and a function body.

    Args:
        model: ``onnx_ir.Model`` whose nodes of ours have torch's layout, changed in place. opset: the standard
            operators' version.
    """
    import onnx_ir as ir

    done: set[str] = set()
    model.opset_imports[DOMAIN] = 1
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        given = inputs_of(node)
        if node.op_type == "TwinLinear":
            ratio = node.attributes["act_ratio"].as_float()
            node.attributes.clear()
            if ratio > 0:
                node.attributes["act_ratio"] = ir.AttrFloat32("act_ratio", ratio)
            for name, part in (("group_size", "residual"), ("up_group_size", "up")):
                if part in given:
                    columns, groups = _to_k_major(given[part], given[f"{part}_scale"], done)
                    node.attributes[name] = ir.AttrInt64(name, columns // groups)
            if "down" in given:
                for name in ("down", "down_scale"):
                    if given[name].name in done:  # siblings that could not be merged may share them
                        given[name] = _copy(model.graph, given[name], done)
                _to_k_major(given["down"], given["down_scale"], done)
            finish_linear(node, given)
            node.op_type, text = twin_linear_function(given, ratio > 0)
        elif node.op_type == "Int8Linear":
            columns, groups = given["weight"].shape[1], given["weight_scale"].shape[1]
            node.attributes["group_size"] = ir.AttrInt64("group_size", columns // groups)
            replace(given["weight"], lambda a: np.ascontiguousarray(a.T), given["weight"].shape[::-1], ir.DataType.INT8)
            replace(given["weight_scale"], transposed, given["weight_scale"].shape[::-1])
            finish_linear(node, given)
            node.op_type, text = int8_linear_function(given)
        elif node.op_type == "LatticeLinear":
            bits = node.attributes["bits"].as_int()
            node.attributes.clear()
            for name in ("codes", "scale", "zero"):
                if name in given:
                    _transpose(given[name], done)
            finish_linear(node, given)
            node.op_type, text = lattice_linear_function(given, bits)
        else:
            finish_quantization(node, given)
            node.op_type, text = quantize_activation_function(given)
        set_inputs(node, given)
        add_function(model, text, {"": opset})


def inputs_of(node) -> dict:
    """The inputs that a node of ours, straight from torch, has: name -> value."""
    return {name: value for name, value in zip(INPUTS[node.op_type], node.inputs, strict=False) if value is not None}


def set_inputs(node, given: Mapping) -> None:
    for index, value in enumerate(given.values()):
        node.replace_input_with(index, value)
    node.resize_inputs(len(given))


def add_function(model, text: str, opsets: Mapping[str, int]) -> None:
    """Attach a function of our domain, written as ONNX text, to the model."""
    import onnx
    import onnx_ir as ir

    imports = ", ".join(f'"{domain}": {version}' for domain, version in opsets.items())
    parsed = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n{text}')
    function = ir.serde.deserialize_function(parsed)
    model.functions[function.identifier()] = function


def finish_linear(node, given: dict) -> None:
    """Name a linear's node after its layer (merged siblings have a name already); output and bias are float32."""
    import onnx_ir as ir

    if "bias" in given and given["bias"].dtype != ir.DataType.FLOAT:
        # A bias keeps the dtype in which it was quantized; float32 holds every bfloat16 and float16.
        replace(given["bias"], lambda bias: bias.astype(np.float32))
    if len(sources(node)) == 1:
        node.name = sources(node)[0]
    node.outputs[0].dtype = ir.DataType.FLOAT


def finish_quantization(node, given: dict, *, rounded: bool = True) -> None:
    """Name a quantization and its outputs after the layers that read it: ``<layer>.x_q``, ``<layer>.x_scale``.

    rounded: False where only the transform is left of it; its one output in use is then ``<layer>.h``, float32.
    """
    import onnx_ir as ir

    readers = [source for use in node.outputs[0].uses() for source in sources(use.node)]
    names = ("x_q", "x_scale") if rounded else ("h", "unused")
    taken = {value.name for other in node.graph for value in other.outputs}
    suffixes = itertools.chain([""], (f".{n}" for n in itertools.count(2)))
    suffix = next(s for s in suffixes if f"{readers[0]}.{names[0]}{s}" not in taken)
    for output, name in zip(node.outputs, names, strict=True):
        output.name, output.dtype = f"{readers[0]}.{name}{suffix}", ir.DataType.FLOAT
    if rounded:
        node.outputs[0].dtype = ir.DataType.INT8
    node.name = f"{readers[0]}.{'quantize' if rounded else 'transform'}{suffix}"
    node.metadata_props[SOURCE] = ",".join(readers)
    if "rotation" in given and given["rotation"].dtype != ir.DataType.FLOAT:
        replace(given["rotation"], lambda rotation: rotation.astype(np.float32))


def _copy(graph, value, done: set[str]):
    """A second initializer with the tensor of ``value``, which is in ``done``; so is the copy.

    ONNX Runtime merges dequantization and product only where a single product reads the weight and its scale. The
    price is small, since a low-rank factor has few columns.
    """
    import onnx_ir as ir

    number = next(n for n in itertools.count(2) if f"{value.name}.{n}" not in graph.initializers)
    copy = ir.Value(name=f"{value.name}.{number}", shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    done.add(copy.name)
    return copy


def derive(graph, value, what: str, function: Callable[[np.ndarray], np.ndarray], shape, dtype):
    """A new initializer ``<name of value>.<what>`` like :func:`replace` makes; the same one when asked again."""
    import onnx_ir as ir

    name = f"{value.name}.{what}"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=value.const_value))
        replace(graph.initializers[name], function, shape, dtype)
    return graph.initializers[name]


def replace(value, function: Callable[[np.ndarray], np.ndarray], shape=None, dtype=None) -> None:
    """Replace an initializer's tensor by ``function`` of its array, called when the file is written.

    Two copies of a large model's weights are then never in memory at once. shape and dtype are those of the result,
    by default the same shape and float32; INT4 is returned as uint8, two values a byte.
    """
    import onnx_ir as ir

    source, name = value.const_value, value.name
    shape, dtype = ir.Shape(shape or source.shape), dtype or ir.DataType.FLOAT

    def compute():
        array = function(source.numpy())
        if dtype == ir.DataType.INT4:
            return ir.PackedTensor(array, dtype, shape=shape, name=name)
        return ir.tensor(array, name=name)

    value.const_value = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=name)
    value.dtype, value.shape = dtype, shape


def transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(np.float32).T)


def _to_k_major(packed, scale, done: set[str]) -> tuple[int, int]:
    """Turn a canonical (N, K/2) uint8 initializer into INT4 (K, N), its (N, G) scale into (G, N); returns (K, G)."""
    import onnx_ir as ir

    if packed.name not in done:
        done.add(packed.name)
        n, k = packed.shape[0], packed.shape[1] * 2
        replace(packed, _k_major, (k, n), ir.DataType.INT4)
    _transpose(scale, done)
    return packed.shape[0], scale.shape[0]


def _transpose(value, done: set[str]) -> None:
    """Turn an (N, G) initializer into (G, N), bytes or else float32; once, as equal ones may have been merged."""
    import onnx_ir as ir

    if value.name in done:
        return
    done.add(value.name)
    if value.dtype == ir.DataType.UINT8:
        replace(value, _columns, value.shape[::-1], value.dtype)
    else:
        replace(value, transposed, value.shape[::-1])


def _columns(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


def _k_major(stored: np.ndarray) -> np.ndarray:
    """(N, K/2) bytes of two values along K -> the bytes of the transpose, two values along N in each."""
    columns = _columns(stored)
    nibbles = np.stack((columns & 0xF, columns >> 4), 1).reshape(-1)
    return nibbles[0::2] | (nibbles[1::2] << 4)
