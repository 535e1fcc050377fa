"""Model in, model out: D2Quant's Deviation-Aware Correction (arXiv 2602.02546), a bias behind a norm.

    norm(x) -> norm(x) + mu,    mu the mean over calibration tokens of norm(x_full) - norm(x_quantized)

Quantized attention shifts the mean of what the next norm gives; mu puts it back, so the linears behind read inputs of
the mean they had. A norm with a bias takes mu into it; any other becomes a ShiftedNorm, whose addition a compiler fuses
with the norm. Requires that only linears that are quantized with this norm in front read it (an Absorber of kind
"norm", find_absorbers).
"""

import torch
from torch import nn

from tqcompile.passes.replace_linear import Journal


class ShiftedNorm(nn.Module):
    """A norm and the bias that follows it. shift: (K,), dtype of the norm's gain."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.shift = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=norm.weight.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.shift


def insert_shift(model: nn.Module, name: str, journal: Journal) -> ShiftedNorm:
    """Put a ShiftedNorm with a shift of zero in the place of the norm ``name``."""
    norm = model.get_submodule(name)
    shifted = ShiftedNorm(norm).train(norm.training)
    journal.replace(name, shifted)
    return shifted


def correct_norm_mean(model: nn.Module, name: str, shift: torch.Tensor, journal: Journal) -> str:
    """Add ``shift`` (K,) to what the norm ``name`` gives; returns the name of the parameter that holds it."""
    norm = model.get_submodule(name)
    with torch.no_grad():
        if getattr(norm, "bias", None) is not None:
            journal.remember(norm)
            norm.bias.add_(shift.to(norm.bias))
            return f"{name}.bias"
        insert_shift(model, name, journal).shift.copy_(shift)
    return f"{name}.shift"


def shifted_norms(model: nn.Module) -> list[str]:
    """Names of the norms that a bias follows: what a checkpoint has to say about a corrected model."""
    return [name for name, module in model.named_modules() if isinstance(module, ShiftedNorm)]
