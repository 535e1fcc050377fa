"""One transformed and quantized activation for all layers that read the same one.

Before: every layer of a site (q/k/v, gate/up) brings its own copy of the site's transform and its own
QuantizeActivation. After: equal initializers are stored once, and no node repeats another.
"""

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)

LARGEST = 1 << 20  # elements: transforms and factors are compared, whole weight matrices are not


class ShareActivationQuant(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        steps = (
            DeduplicateInitializersPass(size_limit=LARGEST),
            CommonSubexpressionEliminationPass(),
            RemoveUnusedNodesPass(),
        )
        results = [step(model) for step in steps]
        return ir.passes.PassResult(model, modified=any(result.modified for result in results))

    def ensures(self, model: ir.Model) -> None:
        inputs = [tuple(map(id, node.inputs)) for node in model.graph if node.op_type == "QuantizeActivation"]
        if len(set(inputs)) != len(inputs):
            raise ir.passes.PostconditionError("an activation is quantized twice in the same way")
