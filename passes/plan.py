"""The plan: what the analysis passes found, by fully qualified name, independent of any graph.

A *site* is one tensor read by one or more linears (q/k/v, gate/up, o, down); transforms are learned per site.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Absorber:
    """A producer that can take the reciprocal of a diagonal scale without changing the model's function.

    kind: "norm" (RMSNorm or LayerNorm gain, and bias), "linear" (output rows of a linear, through the gated
        product) or "attn_v" (output rows of the value projection, through attention).
    module: fully qualified name of the producing module.
    repeat: query heads per key/value head (1 unless kind is "attn_v"): the scale must be equal over the
        repeated heads.
    head_dim: channels per head (0 unless kind is "attn_v").
    unrotatable: why a rotation of each head's channels cannot be absorbed although a scale can ("" if it can;
        only for kind "attn_v").
    """

    kind: str
    module: str
    repeat: int = 1
    head_dim: int = 0
    unrotatable: str = ""


@dataclasses.dataclass(frozen=True)
class Site:
    """Linears that read one tensor.

    linears: fully qualified module names, in graph order.
    absorber: the producer of the shared input when it can absorb a diagonal scale, else None.
    reason: why there is no absorber ("" when there is one).
    """

    linears: tuple[str, ...]
    absorber: Absorber | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return self.linears[0] if len(self.linears) == 1 else f"{self.linears[0]} (+{len(self.linears) - 1})"


@dataclasses.dataclass(frozen=True)
class Plan:
    """sites: every linear to quantize, grouped; skipped: module or parameter name -> reason; notes: for the report."""

    sites: tuple[Site, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
