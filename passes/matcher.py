"""Finds a pattern graph in a graph, backwards from one anchor node."""

import torch.fx


class Match:
    """The subgraph that ends at ``anchor`` and equals ``pattern``; false when there is none.

    Calls must agree in target, arguments and literals; a placeholder of the pattern takes any node, the same
    one wherever it is read; a literal in ``wildcards`` takes any literal of its type.

    nodes: pattern node -> node of the graph. literals: wildcard's name -> what it stands for.
    outputs: the nodes of the pattern's output, the anchor first. inner: all matched calls, last first.
    tensors: placeholder's name -> node.
    """

    def __init__(self, pattern: torch.fx.Graph, anchor: torch.fx.Node, wildcards: dict | None = None):
        self._wildcards = wildcards or {}
        self.nodes: dict[torch.fx.Node, torch.fx.Node] = {}
        self.literals: dict[str, object] = {}
        (result,) = pattern.output_node().args
        results = result if isinstance(result, tuple) else (result,)
        self._found = self._same(results[0], anchor) and all(node in self.nodes for node in results)
        if self._found:
            self.outputs = [self.nodes[node] for node in results]
            calls = [n for n in reversed(pattern.nodes) if n.op not in ("placeholder", "output")]
            self.inner = [self.nodes[node] for node in calls]
            self.tensors = {node.target: self.nodes.get(node) for node in pattern.find_nodes(op="placeholder")}

    def __bool__(self) -> bool:
        return self._found

    def read_outside(self) -> torch.fx.Node | None:
        """An inner value, no output, that something outside of the match reads; None if there is none."""
        inner = set(self.inner)
        return next((n for n in self.inner if n not in self.outputs and not inner.issuperset(n.users)), None)

    def replace(self, new: list[torch.fx.Node]) -> None:
        """Readers of the outputs read ``new`` instead; the matched calls are erased."""
        inner = set(self.inner)
        for old, by in zip(self.outputs, new, strict=True):
            old.replace_all_uses_with(by, delete_user_cb=lambda user: user not in inner)
        for node in self.inner:
            node.graph.erase_node(node)

    def _same(self, want, have) -> bool:
        if isinstance(want, torch.fx.Node):
            if want in self.nodes or not isinstance(have, torch.fx.Node):
                return self.nodes.get(want) is have
            if want.op != "placeholder" and (
                (want.op, want.target) != (have.op, have.target)
                or not self._same(want.args, have.args)
                or not self._same(want.kwargs, have.kwargs)
            ):
                return False
            self.nodes[want] = have
            return True
        if isinstance(want, (tuple, list)):
            return (
                isinstance(have, (tuple, list))
                and len(want) == len(have)
                and all(self._same(a, b) for a, b in zip(want, have, strict=True))
            )
        if isinstance(want, dict):
            return want.keys() == have.keys() and all(self._same(want[key], have[key]) for key in want)
        if type(want) is not type(have):
            return False
        if want in self._wildcards:
            return self.literals.setdefault(self._wildcards[want], have) == have
        return want == have
