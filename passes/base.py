"""What a pass is: a named, versioned rewrite or analysis of one FX graph, with checked contracts."""

from collections.abc import Sequence

import torch.fx

from tqcompile.errors import PassError


class Pass:
    """Base of every pass.

    A subclass implements ``call``; analysis passes write their findings to ``graph_module.meta`` under their
    own name and leave the nodes alone. ``requires`` runs before and ``ensures`` on the *result*; both raise
    :class:`PassError` through :meth:`fail`.
    """

    name: str
    version: int = 1

    def requires(self, gm: torch.fx.GraphModule) -> None:
        """Check what must hold before the pass."""

    def call(self, gm: torch.fx.GraphModule) -> bool:
        """Analyse or rewrite ``gm`` in place; return whether any node changed."""
        raise NotImplementedError

    def ensures(self, gm: torch.fx.GraphModule) -> None:
        """Check what must hold after the pass."""

    def fail(self, why: str, node: torch.fx.Node | None = None) -> PassError:
        where = f" at node {node.name}" if node is not None else ""
        return PassError(f"pass {self.name}{where}: {why}")


def run_passes(gm: torch.fx.GraphModule, passes: Sequence[Pass]) -> dict[str, bool]:
    """Run ``passes`` in order on ``gm``; returns pass name -> whether it modified the graph.

    Raises:
        PassError: a contract is broken; the message names the pass and those that ran before it.
    """
    modified: dict[str, bool] = {}
    for step in passes:
        try:
            step.requires(gm)
            modified[step.name] = step.call(gm)
            if modified[step.name]:
                gm.graph.lint()
                gm.recompile()
            step.ensures(gm)
        except PassError:
            raise
        except Exception as error:
            done = ", ".join(modified) or "none"
            raise PassError(
                f"pass {step.name} failed with {type(error).__name__}: {error} (passes run before it: {done})"
            ) from error
    return modified
