"""What depends on weights alone is computed at export, where the result is small.

Before: Cast, Transpose and arithmetic of initializers, left over from the model's dtypes. After: their results, where
these hold at most ``LARGEST`` elements; a large one stays as it is, because folding would store the matrix in a wider
type or a second time. Dequantization is never folded: that would undo the 4 bits. Nor is anything that reads uint8,
which is how codes of 2 and 3 bits are stored.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

LARGEST = 1 << 16
KEPT = ("DequantizeLinear", "MatMulNBits")


class FoldConstants(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        from onnxscript.optimizer import fold_constants

        result = fold_constants(
            model,
            input_size_limit=LARGEST,
            output_size_limit=LARGEST,
            should_fold=lambda node: False if node.op_type in KEPT or _reads_bytes(node) else None,
        )
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=result.modified)


def _reads_bytes(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == ir.DataType.UINT8 for value in node.inputs)
