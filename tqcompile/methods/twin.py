"""TwinQuant at one site: W ~ up @ down + residual, both 4-bit, in a transformed basis.

With x the site's input and W its stacked weights, s > 0 a diagonal scale and Q a block rotation:

    x~ = (x / s) Q        W~ = W diag(s) Q^-T        so that x~ W~^T = x W^T
    low rank first:       up, down = round4(SVD_R(W~))
    residual feedback:    residual = round4(W~ - up @ down)      (GPTQ on the transformed Hessian)

The factors are rounded *before* the residual is formed, so the residual corrects their rounding. Transforms are
chosen in closed form here; a learned transform is any other SiteTransform handed to ``quantize_site``.
"""

import dataclasses

import torch

from tqcompile.config import Config, Scheme
from tqcompile.distributed import numbers
from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.gptq import gptq, inverse_factor
from tqcompile.methods.hadamard import random_signs, rotate_blocks, rotation_block, signed_hadamard
from tqcompile.methods.lowrank import LowRank, quantize_factors, svd_factors
from tqcompile.methods.recipe import Recipe, recipe_of
from tqcompile.methods.rounding import (
    QMAX,
    QMIN,
    from_codes,
    grid_scales,
    group_scales,
    require_finite,
    round_to_codes,
    row_units,
)
from tqcompile.methods.statistics import SiteStatistics
from tqcompile.ops.packing import pack_int4

SMOOTHING_EXPONENTS = (0.0, 0.3, 0.45, 0.6, 0.75)
ACTIVATION_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
DEFAULT_CLIP = 0.9


@dataclasses.dataclass
class SiteProblem:
    """The linears of one site. weights: (N_i, K) each; biases: (N_i,) or None; statistics: None when data-free.

    tie: (K,) long, channels with equal numbers must share one scale (an absorber demands it), or None.
    head_dim: the rotation mixes no channels of different heads of this many channels (an absorber demands it, and
        nothing of the rotation stays on-line), or 0. name: named in errors. dual: a linear absorbs the site's scale
        (D2Quant's column scale is for these). rotated: what it reads is rotated already, nothing is left to do on-line.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    statistics: SiteStatistics | None
    scheme: Scheme
    config: Config
    tie: torch.Tensor | None = None
    name: str = "linear"
    head_dim: int = 0
    dual: bool = False
    rotated: bool = False

    @property
    def recipe(self) -> Recipe:
        recipe = recipe_of(self.scheme)
        return dataclasses.replace(recipe, rotate=False) if self.rotated else recipe

    def stacked(self) -> torch.Tensor:
        """(sum N_i, K) float32."""
        return torch.cat([w.detach().float() for w in self.weights])

    def divide_rows(self, index: int, scale: torch.Tensor) -> None:
        """Divide the outputs of linear ``index`` by ``scale`` (N_i,): the scale of a site that reads them."""
        self.weights[index] = self.weights[index] / scale[:, None]
        bias = self.biases[index]
        self.biases[index] = None if bias is None else (bias.float() / scale).to(bias.dtype)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed)


@dataclasses.dataclass
class SiteTransform:
    """scale: (K,) float32, s above, or None. rotation: (b, b) float32 holding bfloat16 values, Q above, or None.

    act_ratio: 0, or 8-bit to 4-bit activation factor. factors: rounded low-rank component of W~, or None.
    rotation_signs: set when the rotation is a signed Hadamard (see LinearSpec). scale_name: for the report.
    """

    scale: torch.Tensor | None
    rotation: torch.Tensor | None
    act_ratio: float
    factors: LowRank | None
    rotation_signs: str = ""
    scale_name: str = "scale"

    def weights(self, w: torch.Tensor) -> torch.Tensor:
        """W -> W~, (N, K)."""
        if self.scale is not None:
            w = w * self.scale
        if self.rotation is not None:
            inverse = torch.linalg.inv(self.rotation.double()).t().to(w)
            w = rotate_blocks(w, inverse)
        return w

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """x -> x~, (T, K)."""
        if self.scale is not None:
            x = x / self.scale
        return x if self.rotation is None else rotate_blocks(x, self.rotation)

    def hessian(self, h: torch.Tensor) -> torch.Tensor:
        """x^T x -> x~^T x~, (K, K)."""
        return self.activations(self.activations(h).t()).t()


def act_ratio_for(scheme: Scheme, clip: float) -> float:
    """Factor from 8-bit to 4-bit activations when the largest ``clip`` fraction of the range is kept."""
    return QMAX / (127 * clip) if scheme.act_bits == 4 else 0.0


def quantized_operands(x: torch.Tensor, act_bits: int, act_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What the residual and the low-rank branch read instead of x (T, K): dequantized, float32."""
    if act_bits == 16:
        return x, x
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127.0
    codes = (x / scale).round().clamp(-127, 127)
    low = codes * scale
    if act_ratio == 0:
        return low, low
    return (codes * act_ratio).round().clamp(QMIN, QMAX) * (scale / act_ratio), low


def smoothing_scale(absmax: torch.Tensor, w: torch.Tensor, exponent: float, tie: torch.Tensor | None) -> torch.Tensor:
    """SmoothQuant's scale (arXiv 2211.10438, eq. 4): absmax_x^a / absmax_w^(1-a), geometric mean 1; (K,) float32."""
    if exponent == 0:
        return torch.ones_like(absmax)
    ranges = [absmax, w.abs().amax(0)]
    if tie is not None:
        tied = torch.zeros(2, int(tie.max()) + 1, device=w.device)
        ranges = [tied[i].scatter_reduce(0, tie, r, "amax")[tie] for i, r in enumerate(ranges)]
    x_range, w_range = (r.clamp_min(1e-5 * r.amax().clamp_min(1e-30)) for r in ranges)
    log_scale = exponent * x_range.log() - (1 - exponent) * w_range.log()
    return (log_scale - log_scale.mean()).exp()


def choose_scale(problem: SiteProblem) -> torch.Tensor | None:
    """The diagonal scale of a site, by output error over SMOOTHING_EXPONENTS; (K,) float32, None for "no scale".

    Every candidate goes through rotation, low rank and plain rounding, and is scored on the calibration rows.
    """
    stats = problem.statistics
    if stats is None or not problem.recipe.smooth:
        return None
    w = problem.stacked()
    scales = [smoothing_scale(stats.absmax, w, exponent, problem.tie) for exponent in SMOOTHING_EXPONENTS]

    def error(index: int) -> float:
        return _rounding_error(problem, _without_clip(problem, scales[index], w), w)

    best, best_error = None, torch.inf
    for exponent, scale, found in zip(SMOOTHING_EXPONENTS, scales, numbers(error, len(scales)), strict=True):
        if found < best_error:
            best, best_error = (None if exponent == 0 else scale), found
    return best


def _without_clip(
    problem: SiteProblem, scale: torch.Tensor | None, w: torch.Tensor, factors: bool = True
) -> SiteTransform:
    recipe, config, generator = problem.recipe, problem.config, problem.generator()
    block = rotation_block(problem.head_dim or w.shape[1]) if recipe.rotate else 0
    signs = random_signs(block, generator) if block else ""
    rotation = signed_hadamard(signs).to(w) if block else None
    clip = DEFAULT_CLIP if recipe.clip else 1.0
    transform = SiteTransform(scale, rotation, act_ratio_for(problem.scheme, clip), None, signs)
    if recipe.low_rank_bits and factors:
        low = svd_factors(transform.weights(w), config.rank, generator)
        if recipe.low_rank_bits == 4:
            low = quantize_factors(low, config.group_size)
        else:
            low = LowRank(*(f.to(torch.bfloat16).float() for f in (low.up, low.down)))
        transform.factors = low
    return transform


def _rounding_error(problem: SiteProblem, transform: SiteTransform, w: torch.Tensor) -> float:
    rows = transform.activations(problem.statistics.rows)
    target = transform.weights(w)
    low = transform.factors.product() if transform.factors else None
    residual = target if low is None else target - low
    scale = group_scales(residual, problem.config.group_size, search=False)
    rounded = from_codes(round_to_codes(residual, scale), scale)
    coarse, fine = quantized_operands(rows, problem.scheme.act_bits, transform.act_ratio)
    y = coarse @ rounded.t()
    if low is not None:
        y = y + (rows if problem.recipe.low_rank_bits == 16 else fine) @ low.t()
    return float((y - rows @ target.t()).square().sum())


def closed_form_transform(problem: SiteProblem, scale: torch.Tensor | None, factors: bool = True) -> SiteTransform:
    """Rotation, rounded low rank and activation clip for a given scale (K,) or None; factors: with the low rank."""
    w = problem.stacked()
    require_finite(w, f"{problem.name}: weights", "The checkpoint is damaged, or training diverged.")
    transform = _without_clip(problem, scale, w, factors)
    if factors and problem.scheme.act_bits == 4 and problem.recipe.clip and problem.statistics is not None:
        rows = transform.activations(problem.statistics.rows)
        target = transform.weights(w)
        residual = target - transform.factors.product() if transform.factors else target

        def error(clip: float) -> float:
            coarse, _ = quantized_operands(rows, 4, act_ratio_for(problem.scheme, clip))
            return float(((coarse - rows) @ residual.t()).square().sum())

        transform.act_ratio = act_ratio_for(problem.scheme, min(ACTIVATION_CLIPS, key=error))
    return transform


def learned_transform(
    problem: SiteProblem,
    scale: torch.Tensor | None,
    rotation: torch.Tensor | None,
    down: torch.Tensor | None,
    up_of: torch.Tensor | None,
    clip: float,
    signs: str = "",
) -> SiteTransform:
    """A transform from learned parts: scale s (K,), rotation Q (b, b), down (R, K), and up = W~ ``up_of`` (K, R).

    signs: of a rotation that stayed a signed Hadamard. The rotation is rounded to bfloat16, as it is stored.
    """
    rotation = None if rotation is None else rotation.to(torch.bfloat16).float()
    transform = SiteTransform(scale, rotation, act_ratio_for(problem.scheme, clip), None, signs)
    if down is not None:
        up = transform.weights(problem.stacked()) @ up_of
        transform.factors = quantize_factors(LowRank(up, down), problem.config.group_size)
    return transform


def quantize_site(problem: SiteProblem, transform: SiteTransform) -> list[QuantizedLinear]:
    """Round the residual of every linear of a site in the given transform.

    Returns one QuantizedLinear a weight, in order, holding ``transform.input_scale`` = 1/s when the transform has
    a scale: the caller removes it from the result when a neighbour absorbed it (:func:`absorbed`).
    Raises:
        NumericError: weights are not finite, or the Hessian cannot be factored.
    """
    config, recipe, scheme = problem.config, problem.recipe, problem.scheme
    w = transform.weights(problem.stacked())
    residual = w - transform.factors.product() if transform.factors else w
    statistics = problem.statistics
    if statistics is not None and recipe.gptq:
        hessian = transform.hessian(statistics.hessian)
        factor = inverse_factor(hessian, problem.name)
        codes, scales = gptq(residual, factor, hessian.diagonal(), config.group_size, recipe.grid)
    else:
        if recipe.grid:
            scales = grid_scales(residual, row_units(residual, config.group_size), config.group_size)
        else:
            scales = group_scales(residual, config.group_size, search=recipe.clip)
        codes = round_to_codes(residual, scales)
    packed = pack_int4(codes)
    out, start = [], 0
    for weight, bias in zip(problem.weights, problem.biases, strict=True):
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        tensors = {
            "residual.weight_packed": packed[rows].clone(),
            "residual.weight_scale": scales[rows].to(torch.bfloat16),
        }
        tensors |= factor_tensors(transform.factors, rows)
        if transform.scale is not None:
            tensors["transform.input_scale"] = 1.0 / transform.scale
        if transform.rotation is not None:
            tensors["transform.rotation"] = transform.rotation.to(torch.bfloat16)
        if bias is not None:
            tensors["bias"] = bias.detach().clone()
        spec = LinearSpec(
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            rank=config.rank if recipe.low_rank_bits else 0,
            group_size=config.group_size,
            act_bits=scheme.act_bits,
            low_rank_bits=recipe.low_rank_bits or 4,
            act_ratio=transform.act_ratio,
            rotation_block=0 if transform.rotation is None else transform.rotation.shape[0],
            rotation_signs=transform.rotation_signs,
            scaled=transform.scale is not None,
            bias_dtype=None if bias is None else str(bias.dtype).removeprefix("torch."),
        )
        out.append(QuantizedLinear(spec, tensors))
    return out


def factor_tensors(factors: LowRank | None, rows: slice) -> dict[str, torch.Tensor]:
    """The tensors of a low-rank component as a layer stores them, of the given rows of the stacked weights."""
    if factors is None:
        return {}
    if factors.up_codes is None:
        return {"down": factors.down.to(torch.bfloat16), "up": factors.up[rows].to(torch.bfloat16)}
    return {
        "down.weight_packed": pack_int4(factors.down_codes),
        "down.weight_scale": factors.down_scale.to(torch.bfloat16),
        "up.weight_packed": pack_int4(factors.up_codes[rows]),
        "up.weight_scale": factors.up_scale[rows].to(torch.bfloat16),
    }


def absorbed(quantized: QuantizedLinear, scale: bool = True, rotation: bool = False) -> QuantizedLinear:
    """The same linear without its on-line input scale or rotation, which a neighbour now applies."""
    spec, tensors = quantized.spec, dict(quantized.tensors)
    if scale:
        tensors.pop("transform.input_scale", None)
        spec = dataclasses.replace(spec, scaled=False)
    if rotation:
        tensors.pop("transform.rotation", None)
        spec = dataclasses.replace(spec, rotation_block=0, rotation_signs="")
    return QuantizedLinear(spec, tensors)
