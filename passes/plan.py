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
class StreamNorm:
    """An RMSNorm that reads the residual stream. module: its name, "" if it has no gain; linears: all its readers."""

    module: str
    linears: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """A residual stream that one orthogonal rotation can turn without changing the model's function.

    Only ``embeddings`` and ``producers`` write it, only RMSNorms read it, and only linears read those.

    channels: its width.
    embeddings: names of modules whose ``weight`` (V, channels) is looked up; every row is written to the stream.
    norms: in graph order; a linear belongs to exactly one.
    producers: names of linears whose output is added to the stream.
    tied_head: the linear of ``norms`` whose weight is an embedding's, "" if there is none.
    """

    channels: int
    embeddings: tuple[str, ...]
    norms: tuple[StreamNorm, ...]
    producers: tuple[str, ...]
    tied_head: str = ""

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the linears that read the normalised stream."""
        return tuple(name for norm in self.norms for name in norm.linears)


@dataclasses.dataclass(frozen=True)
class Plan:
    """sites: every linear to quantize, grouped; skipped: module or parameter name -> reason; notes: for the report.

    stream: the residual stream, when the graph proves that it can be rotated; else None, and why in ``stream_reason``.
    """

    sites: tuple[Site, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stream: ResidualStream | None = None
    stream_reason: str = ""
