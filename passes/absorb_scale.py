"""Model in, model out: the reciprocal of a site's diagonal scale moves into the producer of its input.

Norm gains are divided in place; rows of a producing linear are divided when that linear is quantized. Both leave
the model's function unchanged (up to rounding of the gain, which is returned so that the consumer can undo it).
Requires an Absorber that the graph proved (find_absorbers).
"""

import torch
from torch import nn

from tqcompile.passes.plan import Absorber


def producer_channel(absorber: Absorber, channels: int) -> torch.Tensor:
    """(K,) long: the producer's output channel behind each input channel of the site.

    Identity, except through attention with grouped queries: channel d of query head h comes from channel d of
    key/value head h // repeat.
    """
    index = torch.arange(channels)
    if absorber.kind != "attn_v":
        return index
    head, channel = index // absorber.head_dim, index % absorber.head_dim
    return head // absorber.repeat * absorber.head_dim + channel


def producer_scale(absorber: Absorber, scale: torch.Tensor) -> torch.Tensor:
    """The site's scale (K,) as seen by the producer's output channels, (K / repeat,)."""
    index = producer_channel(absorber, len(scale)).to(scale.device)
    out = torch.empty(int(index.max()) + 1, dtype=scale.dtype, device=scale.device)
    out[index] = scale
    return out


def absorb_into_norm(norm: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    """Divide a norm's gain (and bias) by ``scale`` in place.

    Returns:
        (K,) float32: the scale that was really applied, old gain / new gain in the gain's own dtype. Channels whose
        gain is zero are left alone and get scale 1.
    """
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        old = norm.weight.detach().float().clone()
        scale = scale.to(old)
        if bias is not None and norm.weight.dtype != torch.float32:
            # A rounded gain can be compensated in the consumer, a rounded bias cannot: powers of two are exact.
            scale = torch.exp2(torch.log2(scale).round())
        new = (old / scale).to(norm.weight.dtype)
        usable = (new != 0) & torch.isfinite(new)
        norm.weight.copy_(torch.where(usable, new, norm.weight))
        if bias is not None:
            bias.copy_(torch.where(usable, (bias.float() / scale).to(bias.dtype), bias))
        return torch.where(usable, old / new.float(), torch.ones_like(old))
