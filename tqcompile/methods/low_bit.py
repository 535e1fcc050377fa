"""Quantizing a site below four bits: candidates for its scale and rotation, the rounding, and the choice.

A candidate's scale s and rotation Q are used as in ``twin``: x~ = (x / s) Q, W~ = W diag(s) Q^-T. Where the recipe
mixes outputs, the rows of W~ are rotated too, and the layer rotates its result back. A low rank comes first, as in
``twin``: the codes are those of W~ - up down, after both factors were rounded to four bits.
"""

import dataclasses
from collections.abc import Callable

import torch

from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.dual_scale import OBJECTIVES, dual_scale
from tqcompile.methods.gptq import DAMPING, inverse_factor
from tqcompile.methods.hadamard import random_signs, rotate_blocks, rotation_block, signed_hadamard
from tqcompile.methods.lattice import Codes, Lattice, encode, integer_lattice, learn_lattice, refine
from tqcompile.methods.lowrank import quantize_factors, svd_factors
from tqcompile.methods.rounding import require_finite
from tqcompile.methods.select import Solution, best_of
from tqcompile.methods.statistics import balance_tokens
from tqcompile.methods.twin import SiteProblem, SiteTransform, factor_tensors
from tqcompile.ops.packing import pack_codes


@dataclasses.dataclass
class Candidate:
    """A transform (its ``scale`` and ``rotation`` used) and the codes of the stacked weights in it."""

    transform: SiteTransform
    codes: Codes
    output_signs: list[str]


def solve_site(
    problem: SiteProblem,
    applied: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Solution:
    """Quantize a site with every candidate transform of its recipe; keep the smallest error on held-out rows.

    Args, Raises: as for ``select.solve_site``; on_step is told the error of each candidate.
    """
    w = problem.stacked()
    require_finite(w, f"{problem.name}: weights", "The checkpoint is damaged, or training diverged.")
    candidates = _candidates(problem, w)

    def quantized(index: int) -> Candidate:
        name, scale, rotate = candidates[index]
        return _quantize(problem, w, name, None if scale is None else applied(scale), rotate)

    def candidate(index: int) -> tuple[Solution, float]:
        found = quantized(index)
        error = _held_out_error(problem, w, found)
        on_step(error)
        return Solution(found.transform, _linears(problem, found)), error

    if problem.statistics is None:
        found = quantized(0)
        return Solution(found.transform, _linears(problem, found))
    solution, errors = best_of(candidate, len(candidates), w.device)
    return dataclasses.replace(solution, closed_error=min(errors))


def _candidates(problem: SiteProblem, w: torch.Tensor) -> list[tuple[str, torch.Tensor | None, bool]]:
    """(name of the scale, scale s or None, whether to rotate) of every transform to try."""
    recipe, statistics = problem.recipe, problem.statistics
    if statistics is None:
        return [("scale", None, recipe.rotate)]
    rotations = (False, True) if recipe.choose and recipe.rotate else (recipe.rotate,)
    scales: list[tuple[str, torch.Tensor | None]] = [("scale", None)]
    if recipe.smooth:
        rescale = ("rescale", balance_columns(w, statistics.hessian.diagonal(), problem.tie))
        scales = [*scales, rescale] if recipe.choose else [rescale]
    found = [(*scale, rotate) for rotate in rotations for scale in scales]
    if recipe.dual and problem.dual:
        # Columns are scaled before a rotation mixes them, so this and a rotation do not go together.
        found += [(f"dual scale ({name})", dual_scale(w, problem, name), False) for name in OBJECTIVES]
    return found


def balance_columns(w: torch.Tensor, energy: torch.Tensor, tie: torch.Tensor | None) -> torch.Tensor:
    """s with which the columns of W diag(s) and of x / s have energies in one proportion: (|x_k|^2 / |W_k|^2)^(1/4).

    (UniSVQ's code calls it rescale_WH, after QuIP, arXiv 2307.13304.)

    Args:
        w: (N, K). energy: (K,) sum of x_k^2. tie: as in SiteProblem.
    Returns:
        (K,) float32, geometric mean 1.
    """
    sums = [energy, w.square().sum(0)]
    if tie is not None:
        sums = [torch.zeros(int(tie.max()) + 1, device=w.device).index_add_(0, tie, v)[tie] for v in sums]
    x, columns = (v.clamp_min(1e-6 * v.mean().clamp_min(1e-30)) for v in sums)
    log = (x.log() - columns.log()) / 4
    return (log - log.mean()).exp()


def _quantize(problem: SiteProblem, w: torch.Tensor, name: str, scale: torch.Tensor | None, rotate: bool) -> Candidate:
    recipe, bits, generator = problem.recipe, problem.scheme.weight_bits, problem.generator()
    block = rotation_block(problem.head_dim or w.shape[1]) if rotate else 0
    signs = random_signs(block, generator) if block else ""
    rotation = signed_hadamard(signs).to(w) if block else None
    transform = SiteTransform(scale, rotation, 0.0, None, signs, name)
    w, out_signs = transform.weights(w), [""] * len(problem.weights)
    if recipe.mix_outputs:
        out_signs = [_signs(len(part), generator) for part in problem.weights]
        parts = zip(w.split([len(part) for part in problem.weights]), out_signs, strict=True)
        w = torch.cat([mix_rows(part, s) for part, s in parts])
    size = problem.config.group_size
    if recipe.low_rank_bits:
        low = svd_factors(w, problem.config.rank, generator)
        transform.factors = quantize_factors(low, size)
        w = w - transform.factors.product()
    lattice: Lattice | None = None
    if recipe.lattice:
        lattice = learn_lattice(w, size, bits) if recipe.learn_lattice else integer_lattice(bits, w.device)
    if problem.statistics is None or not recipe.gptq:
        return Candidate(transform, encode(w, bits, size, None, None, lattice, recipe.clip), out_signs)
    hessian = transform.hessian(problem.statistics.hessian)
    factor = inverse_factor(hessian, problem.name)
    codes = encode(w, bits, size, factor, hessian.diagonal(), lattice)
    if recipe.passes:
        damped = hessian.clone()
        damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
        codes = refine(w, codes, damped, recipe.passes)
    return Candidate(transform, codes, out_signs)


def _signs(size: int, generator: torch.Generator) -> str:
    block = rotation_block(size)
    return random_signs(block, generator) if block else ""


def mix_rows(w: torch.Tensor, signs: str) -> torch.Tensor:
    """Rows of (N, K) ``w`` rotated, so that the signed Hadamard of ``signs`` behind x W_r^T gives x W^T."""
    if not signs:
        return w
    inverse = torch.linalg.inv(signed_hadamard(signs).double()).to(w)
    return rotate_blocks(w.t(), inverse).t().contiguous()


def _held_out_error(problem: SiteProblem, w: torch.Tensor, candidate: Candidate) -> float:
    """Relative output error on held-out rows, weighted like the rows the site was calibrated on."""
    statistics, transform = problem.statistics, candidate.transform
    x = balance_tokens(statistics.held_out) if statistics.balanced else statistics.held_out
    target = x @ w.t()
    found = candidate.codes.weights()
    if transform.factors is not None:
        found = found + transform.factors.product()
    y = transform.activations(x) @ found.t()
    parts = zip(y.split([len(part) for part in problem.weights], 1), candidate.output_signs, strict=True)
    y = torch.cat([rotate_blocks(part, signed_hadamard(s).to(part)) if s else part for part, s in parts], 1)
    return float((y - target).norm() / target.norm().clamp_min(1e-30))


def _linears(problem: SiteProblem, best: Candidate) -> list[QuantizedLinear]:
    """One QuantizedLinear a weight; as in ``twin.quantize_site``, the caller removes what a neighbour absorbs."""
    transform, found, bits = best.transform, best.codes, problem.scheme.weight_bits
    packed, scale = pack_codes(found.codes, bits), found.scale.to(torch.bfloat16)
    lattice, out, start = found.lattice, [], 0
    for weight, bias, signs in zip(problem.weights, problem.biases, best.output_signs, strict=True):
        rows = slice(start, start + len(weight))
        start = rows.stop
        tensors = {"weight_codes": packed[rows].clone(), "weight_scale": scale[rows].clone()}
        tensors |= factor_tensors(transform.factors, rows)
        if lattice is None:
            tensors["weight_zero"] = found.zero[rows].clone()
        else:
            tensors["weight_offset"] = lattice.offset.clone()
            if lattice.basis is not None:
                tensors["transform.basis"] = lattice.basis.clone()
        if signs:
            tensors["output_scale"] = torch.ones(len(weight), dtype=torch.bfloat16, device=weight.device)
        if transform.scale is not None:
            tensors["transform.input_scale"] = 1.0 / transform.scale
        if bias is not None:
            tensors["bias"] = bias.detach().clone()
        spec = LinearSpec(
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            rank=0 if transform.factors is None else problem.config.rank,
            group_size=problem.config.group_size,
            act_bits=16,
            rotation_block=0 if transform.rotation is None else len(transform.rotation),
            rotation_signs=transform.rotation_signs,
            scaled=transform.scale is not None,
            bias_dtype=None if bias is None else str(bias.dtype).removeprefix("torch."),
            weight_bits=bits,
            lattice=0 if lattice is None else len(lattice.offset),
            basis=lattice is not None and lattice.basis is not None,
            output_signs=signs,
        )
        out.append(QuantizedLinear(spec, tensors))
    return out
