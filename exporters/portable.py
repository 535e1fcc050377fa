"""From torch's nodes to the portable form: op names, INT4 K-major weights and a function body for every op.

The naming scheme is in :mod:`tqcompile.exporters.onnx`. Bodies are ONNX text, so they can be read as they are.
"""

import itertools
from collections.abc import Mapping

import numpy as np

import tqcompile

DOMAIN = "com.tqcompile"
QUANTIZE_INPUTS = ("x", "input_scale", "rotation")
INT8_INPUTS = ("x", "weight", "weight_scale", "bias")
TWIN_INPUTS = (
    *("x", "x_scale", "residual", "residual_scale"),
    *("down", "down_scale", "up", "up_scale", "bias"),
)
INPUTS = {"QuantizeActivation": QUANTIZE_INPUTS, "TwinLinear": TWIN_INPUTS, "Int8Linear": INT8_INPUTS}


def lower(model, opset: int) -> None:
    """Give every node of ours its portable op, INT4 K-major weights, float32 scales, and a function body.

    Args:
        model: ``onnx_ir.Model`` straight from torch, changed in place. opset: the standard operators' version.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    done: set[str] = set()
    model.opset_imports[DOMAIN] = 1
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        names = INPUTS[node.op_type]
        given = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
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
                    if given[name].name in done:  # siblings may share them
                        given[name] = _copy(model.graph, given[name], done)
                _to_k_major(given["down"], given["down_scale"], done)
            _finish_linear(node, given, "residual", "residual.weight_packed")
            node.op_type, text = twin_linear_function(given, ratio > 0)
        elif node.op_type == "Int8Linear":
            weight, scale = (given[name].const_value.numpy() for name in ("weight", "weight_scale"))
            size = weight.shape[1] // scale.shape[1]
            node.attributes["group_size"] = ir.AttrInt64("group_size", size)
            _set(given["weight"], np.ascontiguousarray(weight.T))
            _set(given["weight_scale"], np.ascontiguousarray(scale.astype(np.float32).T))
            _finish_linear(node, given, "weight", "weight_int8")
            node.op_type, text = int8_linear_function(given)
        else:
            if "rotation" in given:
                _set(given["rotation"], given["rotation"].const_value.numpy().astype(np.float32))
            node.outputs[0].dtype, node.outputs[1].dtype = ir.DataType.INT8, ir.DataType.FLOAT
            node.op_type, text = quantize_activation_function(given)
        for index, value in enumerate(given.values()):
            node.replace_input_with(index, value)
        node.resize_inputs(len(given))
        header = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(header + text))
        model.functions[function.identifier()] = function
    _share_equal(model.graph, keep=done)
    ClearMetadataAndDocStringPass()(model)  # stack traces: paths of this machine, and longer than the graph
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "tqcompile", tqcompile.__version__
    taken = {value.name for value in model.graph.inputs}
    for value in list(model.graph.initializers.values()):
        name = value.name.removeprefix("model.")
        if name not in model.graph.initializers and name not in taken:
            value.name = name


def _finish_linear(node, given: dict, weight: str, stored: str) -> None:
    """Name a linear's node after its layer, whose ``weight`` is the buffer ``stored``; output and bias are float32."""
    import onnx_ir as ir

    if "bias" in given and given["bias"].const_value.dtype != ir.DataType.FLOAT:
        # A bias keeps the dtype in which it was quantized; float32 holds every bfloat16 and float16.
        _set(given["bias"], given["bias"].const_value.numpy().astype(np.float32))
    node.name = given[weight].name.removeprefix("model.").removesuffix(stored).rstrip(".")
    node.outputs[0].dtype = ir.DataType.FLOAT


def _share_equal(graph, keep: set[str]) -> None:
    """Store equal initializers once, since every layer brings its copy of the same rotation; not those of ``keep``."""
    import onnx_ir as ir

    first: dict[tuple, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if value.name in keep or tensor.size > 1 << 20 or value.is_graph_output():
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[value.name]


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


def _set(value, array: np.ndarray) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(array, name=value.name)
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape


def _to_k_major(packed, scale, done: set[str]) -> tuple[int, int]:
    """Turn a canonical (N, K/2) uint8 initializer into INT4 (K, N), its (N, G) scale into (G, N); returns (K, G)."""
    import onnx_ir as ir

    if packed.name not in done:
        done.add(packed.name)
        stored = packed.const_value.numpy()
        n, k = stored.shape[0], stored.shape[1] * 2
        nibbles = np.stack((stored & 0xF, stored >> 4), -1).reshape(n, k).T.reshape(-1, 2)
        data = nibbles[:, 0] | (nibbles[:, 1] << 4)
        packed.const_value = ir.PackedTensor(data, ir.DataType.INT4, shape=ir.Shape((k, n)), name=packed.name)
        packed.dtype, packed.shape = ir.DataType.INT4, ir.Shape((k, n))
    if scale.name not in done:  # asked apart: torch may have merged equal scales of different matrices
        done.add(scale.name)
        _set(scale, np.ascontiguousarray(scale.const_value.numpy().astype(np.float32).T))
    return packed.shape[0], scale.shape[0]


def quantize_activation_function(given: Mapping) -> tuple[str, str]:
    """Name and ONNX text of the body of quantize_activation for these inputs: x (..., K) float32."""
    name, lines, h = "QuantizeActivation", [], "x"
    if "input_scale" in given:
        name, h = name + "Scaled", "scaled"
        lines.append("scaled = Mul (x, input_scale)")
    if "rotation" in given:
        name += "Rotated"
        lines += [
            f"shape = Shape ({h})",
            f"rows = Shape <start = 0, end = -1> ({h})",
            "width = Shape <start = 0, end = 1> (rotation)",
            "rest = Constant <value_ints = [-1]> ()",
            "block_shape = Concat <axis = 0> (rows, rest, width)",
            f"blocks = Reshape ({h}, block_shape)",
            "turned = MatMul (blocks, rotation)",
            "rotated = Reshape (turned, shape)",
        ]
        h = "rotated"
    lines += [
        f"magnitude = Abs ({h})",
        "last = Constant <value_ints = [-1]> ()",
        "peak = ReduceMax <keepdims = 1> (magnitude, last)",
        "tiny = Constant <value_float = 1e-30> ()",
        "bounded = Max (peak, tiny)",
        "steps = Constant <value_float = 127.0> ()",
        "x_scale = Div (bounded, steps)",
        f"exact = Div ({h}, x_scale)",
        "rounded = Round (exact)",
        "lowest = Constant <value_float = -127.0> ()",
        "clipped = Clip (rounded, lowest, steps)",
        "x_q = Cast <to = 3> (clipped)",
    ]
    return name, _function(name, [], given, "x_q, x_scale", lines)


def twin_linear_function(given: Mapping, four_bit: bool) -> tuple[str, str]:
    """Name and ONNX text of the body of twin_linear: x (..., K), int8 with x_scale or float32 without."""
    integer, low_rank = "x_scale" in given, "down" in given
    name, attributes = "TwinLinear", ["group_size"]
    wide = operand = "wide" if integer else "x"
    lines = ["wide = Cast <to = 1> (x)"] if integer else []
    if not integer:
        name += "A16"
    if four_bit:
        name, operand = name + "A4", "operand"
        lines += [
            "ratio = Constant <value_float: float = @act_ratio> ()",
            "stretched = Mul (wide, ratio)",
            "nearest = Round (stretched)",
            "lowest = Constant <value_float = -8.0> ()",
            "highest = Constant <value_float = 7.0> ()",
            "code = Clip (nearest, lowest, highest)",
            "operand = Div (code, ratio)",
        ]
    weight = "DequantizeLinear <axis = 0, block_size: int = @group_size>"
    lines += [f"residual_weight = {weight} (residual, residual_scale)", f"y0 = MatMul ({operand}, residual_weight)"]
    terms = ["y0"]

    def then(line: str) -> None:
        terms.append(f"y{len(terms)}")
        lines.append(f"{terms[-1]} = {line}")

    if integer:
        then("Mul (y0, x_scale)")
    if low_rank:
        attributes.append("up_group_size")
        lines += [f"down_weight = {weight} (down, down_scale)", f"t = MatMul ({wide}, down_weight)"]
        lines += ["scaled_t = Mul (t, x_scale)"] if integer else []
        lines += [
            "up_weight = DequantizeLinear <axis = 0, block_size: int = @up_group_size> (up, up_scale)",
            f"low_rank = MatMul ({'scaled_t' if integer else 't'}, up_weight)",
        ]
        then(f"Add ({terms[-1]}, low_rank)")
    else:
        name += "Single"
    if "bias" in given:
        name += "Bias"
        then(f"Add ({terms[-1]}, bias)")
    attributes += ["act_ratio"] if four_bit else []
    return name, _function(name, attributes, given, terms[-1], lines)


def int8_linear_function(given: Mapping) -> tuple[str, str]:
    """Name and ONNX text of the body of int8_linear: x (..., K) float32, weight INT8 (K, N)."""
    name, last = "Int8Linear", "y0"
    lines = [
        "dense = DequantizeLinear <axis = 0, block_size: int = @group_size> (weight, weight_scale)",
        "y0 = MatMul (x, dense)",
    ]
    if "bias" in given:
        name, last = "Int8LinearBias", "y1"
        lines.append("y1 = Add (y0, bias)")
    return name, _function(name, ["group_size"], given, last, lines)


def _function(name: str, attributes: list[str], inputs: Mapping, outputs: str, lines: list[str]) -> str:
    declared = f" <{', '.join(attributes)}>" if attributes else ""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{name}{declared} ({', '.join(inputs)}) => ({outputs}) {{\n{body}\n}}"
