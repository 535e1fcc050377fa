"""Both solutions of a site, closed form and learned, and the choice between them on rows used for neither."""

import dataclasses
import math
from collections.abc import Callable

import torch

from tqcompile.distributed import active, numbers, owner, same, share
from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.learn import Objective, learn, learned_rotation
from tqcompile.methods.lowrank import LowRank
from tqcompile.methods.statistics import balance_tokens
from tqcompile.methods.twin import (
    SiteProblem,
    SiteTransform,
    choose_scale,
    closed_form_transform,
    learned_transform,
    quantize_site,
    quantized_operands,
)
from tqcompile.ops.packing import dequantize_int4

# Up to this many channels a step on rows with the Hessian of all tokens costs no more than one on a sample.
HESSIAN_CHANNELS = 1024
# A learned rotation may take this share of the room of its site's 4-bit codes.
ROTATION_BUDGET = 1.0


@dataclasses.dataclass
class Solution:
    """A site's transform and quantized linears; held-out relative errors of both candidates (None: not made)."""

    transform: SiteTransform
    quantized: list[QuantizedLinear]
    closed_error: float | None = None
    learned_error: float | None = None

    @property
    def learned(self) -> bool:
        return self.learned_error is not None and self.learned_error < self.closed_error

    @property
    def error(self) -> float | None:
        """Of the candidate that was kept."""
        return self.learned_error if self.learned else self.closed_error


def solve_site(
    problem: SiteProblem,
    applied: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Solution:
    """Quantize a site in closed form and, where its recipe learns, also with a learned transform; keep the better.

    Args:
        applied: scale (K,) -> the scale that its absorber will really apply. on_step: see ``learn``.
    Raises:
        NumericError: weights are not finite, a Hessian cannot be factored, or learning diverges.
    """
    start = choose_scale(problem)
    closed = closed_form_transform(problem, None if start is None else applied(start))
    if not (problem.recipe.learn and problem.config.steps and problem.statistics is not None):
        return Solution(closed, quantize_site(problem, closed))
    transforms = [closed, learn_transform(problem, start, applied, on_step)]

    def candidate(index: int) -> tuple[Solution, float]:
        found = Solution(transforms[index], quantize_site(problem, transforms[index]))
        return found, held_out_error(problem, found)

    solution, errors = best_of(candidate, len(transforms), problem.weights[0].device)
    return dataclasses.replace(solution, closed_error=errors[0], learned_error=errors[1])


def best_of(
    candidate: Callable[[int], tuple[Solution, float]], count: int, device: torch.device
) -> tuple[Solution, list[float]]:
    """The solution of the smallest error, the first of equal ones, and all errors; several processes share the work.

    Args:
        candidate: number of a candidate -> its solution and error. device: where the solutions' tensors are.
    """
    best: tuple[float, int, Solution] | None = None

    def error(index: int) -> float:
        nonlocal best
        solution, value = candidate(index)
        value = math.inf if math.isnan(value) else value
        if best is None or value < best[0]:
            best = (value, index, solution)
        return value

    errors = numbers(error, count)
    index = min(range(count), key=errors.__getitem__)
    mine = best is not None and best[1] == index
    return _received(best[2] if mine else None, owner(index, count), device), errors


def _received(solution: Solution | None, source: int, device: torch.device) -> Solution:
    """The solution of process ``source``; others pass None."""
    if not active():
        return solution
    tensors, facts = {}, {}
    if solution is not None:
        t = solution.transform
        tensors = {"scale": t.scale, "rotation": t.rotation}
        tensors |= {} if t.factors is None else {f"factors.{k}": v for k, v in vars(t.factors).items()}
        tensors |= {f"{i}.{k}": v for i, q in enumerate(solution.quantized) for k, v in q.tensors.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        transform = {"act_ratio": t.act_ratio, "rotation_signs": t.rotation_signs, "scale_name": t.scale_name}
        facts = {"transform": transform, "specs": [q.spec.to_dict() for q in solution.quantized]}
    facts, tensors = same(facts, source), share(tensors, device, source)

    def of(part: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}

    factors = LowRank(**of("factors")) if of("factors") else None
    transform = SiteTransform(tensors.get("scale"), tensors.get("rotation"), factors=factors, **facts["transform"])
    return Solution(
        transform, [QuantizedLinear(LinearSpec(**spec), of(str(i))) for i, spec in enumerate(facts["specs"])]
    )


def learn_transform(
    problem: SiteProblem,
    scale: torch.Tensor | None,
    applied: Callable[[torch.Tensor], torch.Tensor],
    on_step: Callable[[float], None],
) -> SiteTransform:
    """The learned transform of a site, started from the closed form with ``scale`` (K,) or None."""
    config, recipe, generator = problem.config, problem.recipe, problem.generator()
    closed = closed_form_transform(problem, scale, factors=False)
    w = problem.stacked()
    rotation = closed.rotation
    learn_rotation = rotation is not None and _affordable(problem, rotation)
    if rotation is not None:
        # A signed Hadamard in bfloat16 is orthogonal up to one factor.
        rotation = rotation * (len(rotation) ** 0.5 / rotation.norm())
    objective = Objective(w, scale, rotation, problem.tie, config.group_size, problem.scheme.act_bits)
    start = objective.start(config.rank if recipe.low_rank_bits else 0, recipe.smooth, generator, learn_rotation)
    rows = learning_rows(problem)
    found = learn(objective, start, rows, config.steps, generator, on_step, problem.name, config.shards)
    scale = objective.scale_of(found)
    down = None if found.frame is None else torch.linalg.solve(found.factor, found.frame.t())
    return learned_transform(
        problem,
        scale=None if scale is None else applied(scale),
        rotation=learned_rotation(objective, found) if learn_rotation else closed.rotation,
        down=down,
        up_of=None if found.frame is None else found.frame @ found.factor,
        clip=float(torch.sigmoid(found.act_clip)),
        signs="" if learn_rotation else closed.rotation_signs,
    )


def _affordable(problem: SiteProblem, rotation: torch.Tensor) -> bool:
    """Whether a learned rotation keeps to ROTATION_BUDGET.

    Each linear stores it, unless a neighbour absorbs it; the signs of a Hadamard take none.
    """
    return problem.head_dim > 0 or affordable_rotation(len(rotation), problem.weights)


def affordable_rotation(block: int, weights: list[torch.Tensor]) -> bool:
    """Whether a (block, block) matrix beside each of the weights keeps to ROTATION_BUDGET."""
    return 16 * block**2 * len(weights) <= ROTATION_BUDGET * 4 * sum(w.numel() for w in weights)


def learning_rows(problem: SiteProblem) -> torch.Tensor:
    """Rows (T, K) to learn on: the sample, or without activation rounding K rows with the Hessian of all tokens."""
    statistics = problem.statistics
    hessian = statistics.hessian
    if problem.scheme.act_bits != 16 or len(hessian) > HESSIAN_CHANNELS:
        return statistics.rows
    damped = hessian.clone()
    damped.diagonal().add_(1e-4 * hessian.diagonal().mean())
    # Any X with X^T X = H has the same output errors as the tokens themselves.
    return torch.linalg.cholesky(damped).t().contiguous()


def held_out_error(problem: SiteProblem, solution: Solution) -> float:
    """Relative output error of a site on held-out rows, weighted like the rows it was calibrated on."""
    statistics, transform = problem.statistics, solution.transform
    x = balance_tokens(statistics.held_out) if statistics.balanced else statistics.held_out
    target = x @ problem.stacked().t()
    coarse, fine = quantized_operands(transform.activations(x), problem.scheme.act_bits, transform.act_ratio)
    tensors = [q.tensors for q in solution.quantized]
    residual = torch.cat([dequantize_int4(t["residual.weight_packed"], t["residual.weight_scale"]) for t in tensors])
    y = coarse @ residual.t()
    if transform.factors is not None:
        y = y + (fine @ transform.factors.down.t()) @ transform.factors.up.t()
    return float((y - target).norm() / target.norm().clamp_min(1e-30))
