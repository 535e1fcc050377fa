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
    balance: tokens count about equally, whatever their norm (``statistics.balance_tokens``). tune: blocks are tuned
    for this many times ``Config.tune`` steps after they are quantized.

    Below four bits only. choose: rotation and scale are tried with and without, the better on held-out rows is kept.
    dual: D2Quant's column scale where a linear absorbs it. correct: D2Quant's mean correction of norms. lattice: codes
    on one lattice for the matrix, not on a grid a group. learn_lattice: its T and b are fitted before rounding.
    mix_outputs: rows are rotated too. passes: coordinate passes after GPTQ."""

    smooth: bool
    rotate: bool
    low_rank_bits: int
    gptq: bool
    clip: bool
    grid: bool = False
    learn: bool = False
    balance: bool = False
    tune: int = 0
    choose: bool = False
    dual: bool = False
    correct: bool = False
    lattice: bool = False
    learn_lattice: bool = False
    mix_outputs: bool = False
    passes: int = 0


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
        smooth=True, rotate=True, low_rank_bits=4, gptq=True, clip=True, grid=True, learn=True, balance=True, tune=1
    ),
}

# What d2 and unisvq share.
_LOW_BIT = Recipe(smooth=True, rotate=True, low_rank_bits=0, gptq=True, clip=True, balance=True, tune=4, passes=4)
LOW_BIT_RECIPES = {
    "rtn": RECIPES["rtn"],
    "gptq": RECIPES["gptq"],
    "quarot": RECIPES["quarot"],
    # D2Quant (arXiv 2602.02546); the choice of rotations and scales and the coordinate passes are ours.
    "d2": dataclasses.replace(_LOW_BIT, choose=True, dual=True, correct=True),
    # UniSVQ (arXiv 2606.10520); it also mixes outputs, which made our errors larger (docs/unisvq.md).
    "unisvq": dataclasses.replace(_LOW_BIT, lattice=True, learn_lattice=True),
}
# A twin low rank over D2Quant's residual.
LOW_BIT_RECIPES["twin"] = dataclasses.replace(LOW_BIT_RECIPES["d2"], low_rank_bits=4)


def recipe_of(scheme: Scheme) -> Recipe:
    """The recipe of a scheme; below four bits a method may differ from its 4-bit form."""
    return (RECIPES if scheme.weight_bits == 4 else LOW_BIT_RECIPES)[scheme.method]


def quantize_data_free(weight: torch.Tensor, bias: torch.Tensor | None, config: Config) -> QuantizedLinear:
    """Quantize one linear with no calibration data: identity Hessian, no smoothing, the recipe's rotation.

    Args:
        weight: (N, K) floating point; bias: (N,) or None.
    Returns:
        the components of ``config.scheme`` at ``config.rank`` and ``config.group_size``, on the weight's device.
    """
    from tqcompile.methods import low_bit, twin

    site = twin.SiteProblem([weight], [bias], None, Scheme.parse(config.scheme), config)
    if site.scheme.weight_bits < 4:
        return low_bit.solve_site(site).quantized[0]
    return twin.quantize_site(site, twin.closed_form_transform(site, scale=None))[0]
