"""One module as a graph, in both spellings of a linear."""

import torch
import torch.fx

from tqcompile.passes.find_linears import is_linear

SPELLINGS = ("dynamo", "export")


def capture(module: torch.nn.Module, *inputs: torch.Tensor, spelling: str) -> tuple[torch.fx.GraphModule, tuple]:
    """The graph of ``module`` and the inputs to call it with; parameters come first in a dynamo graph."""
    torch._dynamo.reset()
    with torch.no_grad():
        if spelling == "export":
            return torch.export.export(module, inputs).module(), inputs
        graphs = []

        def keep(gm, example_inputs):
            graphs.append((gm, tuple(example_inputs)))
            return gm.forward

        torch.compile(module, backend=keep, fullgraph=True)(*inputs)
    ((gm, example_inputs),) = graphs
    return gm, example_inputs


def linears(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if is_linear(node)]


def calls(gm: torch.fx.GraphModule, target) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def only(result):
    """The one tensor that a captured graph returns."""
    return result if isinstance(result, torch.Tensor) else result[0]
