"""What happens between torch's graph and the file, in order. Imported late: it needs the onnx extra."""

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, NameFixPass

from tqcompile.exporters.fold_constants import FoldConstants
from tqcompile.exporters.merge_siblings import MergeSiblings
from tqcompile.exporters.ort import lower_ort
from tqcompile.exporters.portable import lower
from tqcompile.exporters.record_sources import RecordSources
from tqcompile.exporters.share_activation_quant import ShareActivationQuant

LOWER = {"portable": lower, "inlined": lower, "ort": lower_ort}


def finish(model: ir.Model, form: str, opset: int) -> None:
    """Turn what torch.onnx.export made, our ops still single nodes of torch's layout, into one of the forms."""
    RecordSources()(model)  # the layer that every node came from
    ShareActivationQuant()(model)  # one quantized activation a site
    MergeSiblings()(model)  # q/k/v, gate/up
    LOWER[form](model, opset)  # layouts, op names, function bodies
    if form != "portable":
        InlinePass()(model)
        CommonSubexpressionEliminationPass()(model)  # every body brings the same few constants
    FoldConstants()(model)
    NameFixPass()(model)  # a layer that is called twice is two nodes
