"""The ``ort`` form: our nodes become ONNX Runtime's own product of 4-bit weights, ``com.microsoft::MatMulNBits``.

It reads the canonical packed layout, row-major along K, values offset by half their range. ``accuracy_level`` says
what becomes of the activations:

    activations   what the graph does                                  level
    a16           nothing                                              1: float32
    a8            transforms them; ONNX Runtime rounds every block     4: int8
    a4            rounds to 8 bits a token, from there to 4            4: int8
    8-bit head    nothing; there is no fast float32 kernel             4: int8

An a8 model thus loses its own rounding, one scale a token, and gets a finer one. See docs/onnx.md.
"""

from collections.abc import Mapping

import numpy as np

from tqcompile.errors import ExportError
from tqcompile.exporters.bodies import (
    four_bit_lines,
    quantize_activation_function,
    transform_lines,
    write_function,
)
from tqcompile.exporters.portable import (
    DOMAIN,
    add_function,
    derive,
    finish_linear,
    finish_quantization,
    inputs_of,
    set_inputs,
)

MICROSOFT = "com.microsoft"
FLOAT_LEVEL, INT8_LEVEL = 1, 4
BLOCKS = (256, 128, 64, 32, 16)  # sizes that MatMulNBits takes


def lower_ort(model, opset: int) -> None:
    """Turn our nodes, straight from torch, into calls of functions that use MatMulNBits; they are there to be inlined.

    Args:
        model: ``onnx_ir.Model``, changed in place. opset: the standard operators' version.
    """
    import onnx_ir as ir

    model.opset_imports[DOMAIN] = model.opset_imports[MICROSOFT] = 1
    ours = [node for node in model.graph if node.domain == DOMAIN]
    rounded = {node.inputs[0].producer() for node in ours if _ratio(node) > 0}
    for node in sorted(ours, key=lambda node: node.op_type == "QuantizeActivation"):  # last: what reads it decides
        given, numbers, ratio = inputs_of(node), {}, _ratio(node)
        if node.op_type == "TwinLinear":
            for part in ("residual", "down", "up"):
                if part in given:
                    numbers |= _to_blocks(model.graph, part, given, bits=4)
            level = INT8_LEVEL if "x_scale" in given else FLOAT_LEVEL
            if given["x"].producer() not in rounded:
                given.pop("x_scale", None)
            finish_linear(node, given)
            node.op_type, text = _twin_function(given, level, ratio > 0)
        elif node.op_type == "Int8Linear":
            numbers = _to_blocks(model.graph, "weight", given, bits=8)
            finish_linear(node, given)
            node.op_type, text = _int8_function(given)
        else:
            finish_quantization(node, given, rounded=node in rounded)
            if node in rounded:
                node.op_type, text = quantize_activation_function(given)
            else:
                node.resize_outputs(1)
                node.op_type, text = _transform_function(given)
        node.attributes.clear()
        for name, number in numbers.items():
            node.attributes[name] = ir.AttrInt64(name, number)
        if ratio > 0:
            node.attributes["act_ratio"] = ir.AttrFloat32("act_ratio", ratio)
        set_inputs(node, given)
        add_function(model, text, {"": opset, MICROSOFT: 1})


def _ratio(node) -> float:
    return node.attributes["act_ratio"].as_float() if "act_ratio" in node.attributes else 0.0


def _to_blocks(graph, part: str, given: dict, bits: int) -> dict[str, int]:
    """Give ``part`` the layout that MatMulNBits reads: (N, blocks, bytes of a block) uint8, scales (N, blocks) float32.

    A group of a size that MatMulNBits lacks becomes several blocks with one scale; what a single group leaves of its
    last block is zero. Returns the attributes that describe it.
    """
    import onnx_ir as ir

    weight, scale = given[part], given[f"{part}_scale"]
    values = 8 // bits
    (n, stored), groups = weight.shape, scale.shape[1]
    k = stored * values
    block = _block_size(k, groups)
    blocks = -(-k // block)
    zero = np.uint8(0x88 if bits == 4 else 0x80)  # also what turns two's complement into an offset

    def lay_out(array: np.ndarray) -> np.ndarray:
        padded = np.pad(
            array.view(np.uint8) ^ zero, ((0, 0), (0, blocks * block // values - stored)), constant_values=zero
        )
        return padded.reshape(n, blocks, block // values)

    def repeat(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32).repeat(blocks // groups, 1)

    given[part] = derive(graph, weight, "blocks", lay_out, (n, blocks, block // values), ir.DataType.UINT8)
    given[f"{part}_scale"] = derive(graph, scale, f"by_{block}", repeat, (n, blocks), ir.DataType.FLOAT)
    return {f"{part}_k": k, f"{part}_n": n, f"{part}_block": block}


def _block_size(k: int, groups: int) -> int:
    if groups == 1:
        return next((block for block in reversed(BLOCKS) if block >= k), BLOCKS[0])
    size = k // groups
    block = next((block for block in BLOCKS if size % block == 0), None)
    if block is None:
        raise ExportError(f"group size {size} cannot be cut into the blocks of MatMulNBits. Use form='portable'.")
    return block


def _product(y: str, x: str, part: str, level: int, bits: int = 4) -> str:
    sizes = ", ".join(
        f"{name}: int = @{part}_{ours}" for name, ours in (("K", "k"), ("N", "n"), ("block_size", "block"))
    )
    settings = f"{sizes}, bits = {bits}, accuracy_level = {level}"
    return f"{y} = com.microsoft.MatMulNBits <{settings}> ({x}, {part}, {part}_scale)"


def _transform_function(given: Mapping) -> tuple[str, str]:
    name, lines, h = transform_lines(given, "Transform")
    return name, write_function(name, [], given, "h", [*lines, f"h = Identity ({h})"])


def _twin_function(given: Mapping, level: int, four_bit: bool) -> tuple[str, str]:
    """Name and ONNX text of a linear: x (..., K) float32, or int8 with x_scale."""
    name, lines, wide = f"TwinLevel{level}", [], "x"
    attributes = [f"residual_{what}" for what in ("k", "n", "block")]
    if "x_scale" in given:
        name, wide = f"{name}Rounded", "wide"
        lines += ["code = Cast <to = 1> (x)", "wide = Mul (code, x_scale)"]
    operand = wide
    if four_bit:
        name, operand = f"{name}A4", "operand"
        attributes.append("act_ratio")
        lines += [*four_bit_lines("code"), "operand = Mul (narrow, x_scale)"]
    lines.append(_product("y0", operand, "residual", level))
    last = "y0"
    if "down" in given:
        attributes += [f"{part}_{what}" for part in ("down", "up") for what in ("k", "n", "block")]
        lines += [_product("t", wide, "down", level), _product("low_rank", "t", "up", level)]
        lines.append("y1 = Add (y0, low_rank)")
        last = "y1"
    else:
        name += "Single"
    if "bias" in given:
        name += "Bias"
        lines.append(f"y = Add ({last}, bias)")
        last = "y"
    return name, write_function(name, attributes, given, last, lines)


def _int8_function(given: Mapping) -> tuple[str, str]:
    lines = [_product("y0", "x", "weight", INT8_LEVEL, bits=8)]
    attributes = [f"weight_{what}" for what in ("k", "n", "block")]
    if "bias" not in given:
        return "Int8", write_function("Int8", attributes, given, "y0", lines)
    return "Int8Bias", write_function("Int8Bias", attributes, given, "y", [*lines, "y = Add (y0, bias)"])
