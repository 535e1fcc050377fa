"""What each method does to a site, as data; and quantization without calibration data."""

import dataclasses

import torch

from tqcompile.config import Config, Scheme
from tqcompile.methods.components import QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Recipe:
    """smooth: diagonal scale. rotate: signed block Hadamard. low_rank_bits: 0 (none), 4 or 16. gptq: else round to
    nearest. clip: search clipping scales (weights, 4-bit activations) instead of using the full range. grid: the
    residual's scales of a row are integer multiples 1 to 16 of one number. learn: the transform may be learned.
    balance: tokens count about equally, whatever their norm (``statistics.balance_tokens``). tune: blocks may be tuned
    after they are quantized."""

    smooth: bool
    rotate: bool
    low_rank_bits: int
    gptq: bool
    clip: bool
    grid: bool = False
    learn: bool = False
    balance: bool = False
    tune: bool = False


RECIPES = {
    "rtn": Recipe(smooth=False, rotate=False, low_rank_bits=0, gptq=False, clip=False),
    "gptq": Recipe(smooth=False, rotate=False, low_rank_bits=0, gptq=True, clip=True),
    # SVDQuant (arXiv 2411.05007) with its GPTQ option: the stronger of its two forms.
    "svdquant": Recipe(smooth=True, rotate=False, low_rank_bits=16, gptq=True, clip=True),
    # Hadamard + GPTQ, as in QuaRot (arXiv 2404.00456), and a learned rotation, scale and clips, as in SpinQuant
    # (arXiv 2405.16406) and FlatQuant; both without a low rank, and both on-line at every site.
    "quarot": Recipe(smooth=False, rotate=True, low_rank_bits=0, gptq=True, clip=True),
    "spinquant": Recipe(smooth=True, rotate=True, low_rank_bits=0, gptq=True, clip=True, learn=True),
    "twin": Recipe(
        smooth=True, rotate=True, low_rank_bits=4, gptq=True, clip=True, grid=True, learn=True, balance=True, tune=True
    ),
}


def quantize_data_free(weight: torch.Tensor, bias: torch.Tensor | None, config: Config) -> QuantizedLinear:
    """Quantize one linear with no calibration data: identity Hessian, no smoothing, the recipe's rotation.

    Args:
        weight: (N, K) floating point; bias: (N,) or None.
    Returns:
        the components of ``config.scheme`` at ``config.rank`` and ``config.group_size``, on the weight's device.
    """
    from tqcompile.methods import twin

    site = twin.SiteProblem([weight], [bias], None, Scheme.parse(config.scheme), config)
    return twin.quantize_site(site, twin.closed_form_transform(site, scale=None))[0]
