"""The function bodies of our ops in standard operators, as ONNX text, so that they can be read as they are.

Every function returns the op's name, with the suffixes for its inputs, and the text. See docs/onnx.md.
"""

from collections.abc import Mapping


def quantize_activation_function(given: Mapping) -> tuple[str, str]:
    """Name and ONNX text of the body of quantize_activation for these inputs: x (..., K) float32."""
    name, lines, h = transform_lines(given, "QuantizeActivation")
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
    return name, write_function(name, [], given, "x_q, x_scale", lines)


def transform_lines(given: Mapping, name: str) -> tuple[str, list[str], str]:
    """The scale and rotation in front of a quantization: the op's name with its suffixes, lines, the result's name."""
    lines, h = [], "x"
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
    return name, lines, h


def four_bit_lines(code: str) -> list[str]:
    """From the float32 value of an 8-bit code to ``narrow``, the value of the 4-bit code in the same units."""
    return [
        "ratio = Constant <value_float: float = @act_ratio> ()",
        f"stretched = Mul ({code}, ratio)",
        "nearest = Round (stretched)",
        "lowest = Constant <value_float = -8.0> ()",
        "highest = Constant <value_float = 7.0> ()",
        "clipped = Clip (nearest, lowest, highest)",
        "narrow = Div (clipped, ratio)",
    ]


def twin_linear_function(given: Mapping, four_bit: bool) -> tuple[str, str]:
    """Name and ONNX text of the body of twin_linear: x (..., K), int8 with x_scale or float32 without."""
    integer, low_rank = "x_scale" in given, "down" in given
    name, attributes = "TwinLinear", ["group_size"]
    wide = operand = "wide" if integer else "x"
    lines = ["wide = Cast <to = 1> (x)"] if integer else []
    if not integer:
        name += "A16"
    if four_bit:
        name, operand = name + "A4", "narrow"
        lines += four_bit_lines("wide")
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
    return name, write_function(name, attributes, given, terms[-1], lines)


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
    return name, write_function(name, ["group_size"], given, last, lines)


def lattice_linear_function(given: Mapping, bits: int) -> tuple[str, str]:
    """Name and ONNX text of the body of lattice_linear: x (..., K) float32, codes (K * bits / 8, N) uint8.

    Shapes on the way: fields (K/4, 4, N), octets (K/8, 8, N), codes and weights (G, g, N), points (K/d, d, N).
    """
    name, low = f"LatticeLinearW{bits}", "codes"
    lines = [
        "rest = Constant <value_ints = [-1]> ()",
        "middle = Constant <value_ints = [1]> ()",
        "groups = Shape <start = 0, end = 1> (scale)",
        "width = Shape <start = 1, end = 2> (scale)",
        "grouped = Concat <axis = 0> (groups, rest, width)",
    ]
    if bits == 3:
        low = "low"
        lines += [
            "low0, low1, high = Split <axis = 0, num_outputs = 3> (codes)",
            "low = Concat <axis = 0> (low0, low1)",
        ]
    lines += [
        f"quads = Unsqueeze ({low}, middle)",
        "places = Constant <value: tensor = uint8[4, 1] {0, 2, 4, 6}> ()",
        "three = Constant <value: tensor = uint8[1] {3}> ()",
        'moved = BitShift <direction = "RIGHT"> (quads, places)',
        "fields = BitwiseAnd (moved, three)",
        "code = Reshape (fields, grouped)",
    ]
    code = "code"
    if bits == 3:
        lines += [
            "eights = Unsqueeze (high, middle)",
            "bits = Constant <value: tensor = uint8[8, 1] {0, 1, 2, 3, 4, 5, 6, 7}> ()",
            "one = Constant <value: tensor = uint8[1] {1}> ()",
            "two = Constant <value: tensor = uint8[1] {2}> ()",
            'moved_high = BitShift <direction = "RIGHT"> (eights, bits)',
            "octets = BitwiseAnd (moved_high, one)",
            'fours = BitShift <direction = "LEFT"> (octets, two)',
            "high_code = Reshape (fours, grouped)",
            "whole = BitwiseOr (code, high_code)",
        ]
        code = "whole"
    lines.append(f"w0 = Cast <to = 1> ({code})")
    terms = ["w0"]

    def then(*added: str) -> None:
        terms.append(f"w{len(terms)}")
        lines.extend([*added[:-1], f"{terms[-1]} = {added[-1]}"])

    if "zero" in given:
        name += "Zero"
        then(
            "steps = Constant <value_float = 32.0> ()",
            "zero_steps = Cast <to = 1> (zero)",
            "zero_point = Div (zero_steps, steps)",
            "zero_row = Unsqueeze (zero_point, middle)",
            f"Sub ({terms[-1]}, zero_row)",
        )
    if "offset" in given:
        name += "Offset"
        then(
            "dimension = Shape (offset)",
            "vectors = Concat <axis = 0> (rest, dimension, width)",
            f"points = Reshape ({terms[-1]}, vectors)",
            "offset_column = Unsqueeze (offset, middle)",
            "offset_points = Add (points, offset_column)",
            "Reshape (offset_points, grouped)",
        )
    then("scale_row = Unsqueeze (scale, middle)", f"Mul ({terms[-1]}, scale_row)")
    lines += [
        "matrix = Concat <axis = 0> (rest, width)",
        f"weight = Reshape ({terms[-1]}, matrix)",
        "y0 = MatMul (x, weight)",
    ]
    last = "y0"
    if "bias" in given:
        name, last = name + "Bias", "y1"
        lines.append("y1 = Add (y0, bias)")
    return name, write_function(name, [], given, last, lines)


def write_function(name: str, attributes: list[str], inputs: Mapping, outputs: str, lines: list[str]) -> str:
    declared = f" <{', '.join(attributes)}>" if attributes else ""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{name}{declared} ({', '.join(inputs)}) => ({outputs}) {{\n{body}\n}}"
