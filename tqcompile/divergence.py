"""How far a model's output is from what it was, on the held-out part of the calibration data."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tqcompile.calibration import held_out_batches, model_kwargs
from tqcompile.data import Batch

# Outputs are compared on held-out sequences of about this many positions in all ...
POSITIONS = 4096
# ... and at so many of them that no more values than this are kept: logits of a large vocabulary are large.
KEPT = 1 << 26


class Divergence:
    """How far a model's output is from what it was: mean KL divergence of its logits over positions, or the relative
    squared error of an output that is no logits."""

    def __init__(self, model: nn.Module, batches: list[Batch]):
        self._model, self._kept = model, KEPT
        held_out = batches[-max(1, held_out_batches(len(batches))) :]
        positions, values = self._output(next(rows_of(held_out[0], 1)))[0].shape
        rows = max(1, min(KEPT // values, POSITIONS) // positions)
        parts = [part for batch in held_out for part in rows_of(batch, rows)]
        self._inputs = parts[: -(-POSITIONS // (rows * positions))]
        self._kept = KEPT // len(self._inputs)
        self._exact = [self._output(sequence) for sequence in self._inputs]

    def now(self) -> float:
        """Of the model as it is."""
        parts = [self._compare(exact, self._output(s)) for exact, s in zip(self._exact, self._inputs, strict=True)]
        return float(torch.cat(parts).mean())

    def _output(self, batch: Batch) -> tuple[torch.Tensor, bool]:
        """(rows, C) float32 of the positions that are no padding, and whether they are log probabilities."""
        with torch.no_grad():
            out: Any = self._model(**model_kwargs(self._model, batch))
        logits = getattr(out, "logits", None)
        values = logits if logits is not None else _first_tensor(out)
        rows, mask = values.float(), batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == rows.shape[:-1]:
            rows = rows[mask.to(rows.device).bool()]
        rows = rows.reshape(-1, rows.shape[-1])
        count = max(1, min(len(rows), self._kept // rows.shape[-1]))
        rows = rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
        return (rows.log_softmax(-1), True) if logits is not None else (rows, False)

    @staticmethod
    def _compare(exact: tuple[torch.Tensor, bool], found: tuple[torch.Tensor, bool]) -> torch.Tensor:
        (p, is_log), (q, _) = exact, found
        if is_log:
            return (p.exp() * (p - q)).sum(-1)
        return (q - p).square().sum(-1) / p.square().sum(-1).mean().clamp_min(1e-30)


def rows_of(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch ``count`` rows at a time, which keeps the logits of no more in memory."""
    size = next(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim())
    for i in range(0, size, count):
        yield {
            n: v[i : i + count] if isinstance(v, torch.Tensor) and v.dim() and len(v) == size else v
            for n, v in batch.items()
        }


def _first_tensor(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    values = out.values() if isinstance(out, dict) else out
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())
