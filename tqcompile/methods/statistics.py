"""What calibration keeps of a site's input: second moments, channel ranges, and a few rows."""

import dataclasses

import torch

ROWS = 4096
HELD_OUT_ROWS = 1024
BALANCE = 0.3


def balance_tokens(x: torch.Tensor) -> torch.Tensor:
    """Scale the rows of x (T, K) down to about equal norm, so that a few tokens of huge norm do not decide alone.

    A row's error reaches the next block divided by the norm of its token (RMSNorm); counted by its square, a token
    with a massive activation would outweigh thousands of others. Per-token rounding does not depend on a row's scale,
    so every loss on scaled rows is a weighted loss on the original ones.
    """
    energy = x.square().mean(-1, keepdim=True)
    return x / (energy + BALANCE * energy.median() + torch.finfo(x.dtype).tiny).sqrt()


@dataclasses.dataclass
class SiteStatistics:
    """Statistics of the input x (T, K) of one site, before any transform.

    hessian: (K, K) float32, sum of x^T x over the training rows. absmax: (K,) largest magnitude per channel.
    rows: (T1, K) sample of the training rows; held_out: (T2, K) rows from windows used for nothing else, unbalanced.
    balanced: whether hessian, absmax and rows are of :func:`balance_tokens`, batch by batch.
    """

    hessian: torch.Tensor
    absmax: torch.Tensor
    rows: torch.Tensor
    held_out: torch.Tensor
    tokens: int
    balanced: bool = False


class StatisticsCollector:
    """Accumulates :class:`SiteStatistics` batch by batch; memory is O(K^2), independent of the number of tokens."""

    def __init__(
        self,
        channels: int,
        device: torch.device | str,
        batches: int,
        held_out_batches: int,
        balanced: bool = False,
    ):
        self.hessian = torch.zeros(channels, channels, device=device)
        self.absmax = torch.zeros(channels, device=device)
        self.tokens = 0
        self.balanced = balanced
        self._rows: list[torch.Tensor] = []
        self._held_out: list[torch.Tensor] = []
        self._take = -(-ROWS // max(1, batches - held_out_batches))
        self._take_held_out = -(-HELD_OUT_ROWS // max(1, held_out_batches))

    def add(self, x: torch.Tensor, held_out: bool) -> None:
        """x: (T, K) of one batch, any floating dtype; T may be 0 (masked out, or an expert without tokens)."""
        if not len(x):
            return
        x = x.detach().to(self.hessian.device, torch.float32)
        x = balance_tokens(x) if self.balanced and not held_out else x
        take = self._take_held_out if held_out else self._take
        # Evenly spaced rows: deterministic, and they cover every position of a window.
        picked = x[torch.linspace(0, len(x) - 1, min(take, len(x)), device=x.device).long()]
        (self._held_out if held_out else self._rows).append(picked)
        if held_out:
            return
        self.hessian.addmm_(x.t(), x)
        torch.maximum(self.absmax, x.abs().amax(0), out=self.absmax)
        self.tokens += len(x)

    def finish(self) -> SiteStatistics:
        rows = torch.cat(self._rows)
        # With a single calibration batch nothing can be held out; the report then says so.
        held_out = torch.cat(self._held_out) if self._held_out else rows
        return SiteStatistics(self.hessian, self.absmax, rows, held_out, self.tokens, self.balanced)
