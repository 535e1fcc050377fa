"""What a site computes on-line besides its linears, and what that costs: for the report."""

import dataclasses
from collections.abc import Sequence

from tqcompile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OnlineCost:
    """Per token. what: in words, "nothing" if everything was absorbed. flops: of the transforms. site_flops: of the
    site's linears in full precision, 2 N K each. A multiplication and an addition count as one FLOP each."""

    what: str
    flops: int
    site_flops: int

    @property
    def percent(self) -> float:
        """The transforms' FLOPs in percent of the linears'."""
        return 100 * self.flops / self.site_flops

    def __str__(self) -> str:
        return f"{self.what} ({self.percent:.2f}% of the linears' FLOPs)" if self.flops else self.what


def online_cost(shapes: Sequence[tuple[int, int]], rotation_block: int = 0, scaled: bool = False) -> OnlineCost:
    """The cost of the transforms that stay on-line at one site.

    Args:
        shapes: (N, K) of every linear that reads the site's input; the K are equal.
        rotation_block: b of a block rotation that is applied to the input, 0 for none: 2 K b FLOPs a token, as a
            product with (b, b) matrices, whether or not the matrix is a Hadamard matrix.
        scaled: whether a diagonal scale is applied to the input: K FLOPs a token.
    Raises:
        ConfigError: no linears, different K, or a block that does not divide K.
    """
    channels = {k for _, k in shapes}
    if len(channels) != 1:
        raise ConfigError(f"the linears of one site read one input, got shapes {[tuple(s) for s in shapes]}")
    (k,) = channels
    if rotation_block and k % rotation_block:
        raise ConfigError(f"{k} channels are not whole blocks of {rotation_block}")
    parts = ["scale"] * scaled + [f"rotation {rotation_block}x{rotation_block}"] * bool(rotation_block)
    flops = 2 * k * rotation_block + k * scaled
    return OnlineCost(" and ".join(parts) or "nothing", flops, sum(2 * n * k for n, _ in shapes))


def total_cost(costs: Sequence[OnlineCost]) -> OnlineCost:
    """The cost of several sites together, such as those of a decoder layer or of a whole model."""
    online = sum(bool(cost.flops) for cost in costs)
    what = f"{online} of {len(costs)} sites" if online else "nothing"
    return OnlineCost(what, sum(cost.flops for cost in costs), sum(cost.site_flops for cost in costs))
