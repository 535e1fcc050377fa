"""Names: every node says which module of the model it came from, and nothing of torch's own metadata stays.

Before: the graph that torch.onnx.export made of a wrapper whose ``model`` is the model, with scopes, stack traces and
file names in its metadata. After: ``tqcompile.source`` on every node, the name of the module in the model ("" for the
model itself), initializers named as in ``model.state_dict()``, and no other metadata.
"""

import ast

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from tqcompile.exporters.portable import SOURCE

_SCOPES = "pkg.torch.onnx.name_scopes"


class RecordSources(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(node, _module(node.metadata_props.get(_SCOPES))) for node in model.graph]
        ClearMetadataAndDocStringPass()(model)
        model.metadata_props.clear()
        for node, source in found:
            node.metadata_props[SOURCE] = source
        taken = {value.name for value in model.graph.inputs}
        taken |= {value.name for node in model.graph for value in node.outputs}
        for value in list(model.graph.initializers.values()):
            name = value.name.removeprefix("model.")
            if name not in model.graph.initializers and name not in taken:
                value.name = name
        return ir.passes.PassResult(model, modified=True)


def _module(scopes: str | None) -> str:
    """The innermost module of a list of scopes that ends with the node's own name; the wrapper's prefix taken off."""
    inner = ast.literal_eval(scopes)[:-1] if scopes else []
    name = next((scope for scope in reversed(inner) if scope == "model" or scope.startswith("model.")), "")
    return name.removeprefix("model").removeprefix(".")
