"""Perplexity of a causal language model on windows of tokens."""

import math

import torch
from torch import nn


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token cross entropy over all windows.

    Args:
        model: returns an object with ``.logits`` (B, S, vocabulary). windows: (W, S) int64 token ids.
    """
    device = next(t.device for t in [*model.parameters(), *model.buffers()])
    total, count = 0.0, 0
    for chunk in windows.split(batch_size):
        ids = chunk.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + ids[:, 1:].numel()
    return math.exp(total / count)
