"""Learning the transform of one site: scale s, rotation Q, low-rank frame V and factor G, and clips, jointly.

    x~ = (x / s) Q                       W~ = W diag(s) Q
    up = round4(W~ V G)                  down = round4(G^-1 V^T)
    residual = round4(W~ - up down)      with clipped group scales
    loss = ||round_a(x~) residual^T + round_8(x~) down^T up^T - x W^T||^2 / ||x W^T||^2

so the loss is the error of the layer's output after every quantizer of both components. Rounding is passed straight
through (its gradient is taken as the identity); scales are differentiated through the largest magnitude. What is
learned is the start for GPTQ, which then rounds the residual (``twin.quantize_site``).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from tqcompile.distributed import share, sum_parts
from tqcompile.errors import NumericError
from tqcompile.methods.hadamard import mixing_matrix, rotate_blocks
from tqcompile.methods.lowrank import truncated_svd
from tqcompile.methods.manifolds import StiefelAdam, cayley, reorthogonalise, well_conditioned
from tqcompile.methods.rounding import QMAX, QMIN

# Learning rates of the first step; a cosine takes them to FINAL of that.
LR_SCALE = 1e-2
LR_ROTATION = 4e-3
LR_FRAME = 0.2
LR_FACTOR = 2e-3
LR_CLIP = 5e-2
FINAL = 0.05
BETAS = (0.9, 0.99)
BATCH_ROWS = 512  # at least; a quarter of the channels where that is more
START_CLIP = 0.9


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def straight_round(x: torch.Tensor) -> torch.Tensor:
    """torch.round with the gradient of the identity."""
    return _Round.apply(x)


def fake_quantize(w: torch.Tensor, group_size: int, clip: torch.Tensor | float = 1.0) -> torch.Tensor:
    """4-bit rounding of (N, K) ``w`` in groups of g; scales are ``clip`` (N, K/g) of the full range; differentiable."""
    groups = w.unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1).clamp_min(1e-12) * (clip / QMAX)).unsqueeze(-1)
    return (straight_round(groups / scale).clamp(QMIN, QMAX) * scale).flatten(-2)


def fake_quantize_activation(x: torch.Tensor, bits: int, clip: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Rounding of (..., K) ``x`` with one scale per token: 4 bits (clipped), 8, or 16 (none); differentiable."""
    if bits == 16:
        return x
    top = 127 if bits == 8 else QMAX
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) * (clip / top)
    codes = straight_round(x / scale)
    return (codes if bits == 8 else codes.clamp(QMIN, QMAX)) * scale


def cosine(step: int, steps: int) -> float:
    """Factor on a learning rate: 1 at the first step, FINAL at the last."""
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


@contextlib.contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """TF32 products on a GPU while learning; the settings before are restored."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass
class Parameters:
    """What is learned at a site with weights (N, K); also the result, detached.

    log_scale: (channels,) logarithm of s relative to its start, or None (s stays). generator: (b, b), Q is its start
    times cayley(generator), or None (Q stays). frame: V (K, R), or None. factor: G (R, R), or None.
    weight_clip: (N, K/g) and act_clip: () before the logistic function.
    """

    log_scale: torch.Tensor | None
    generator: torch.Tensor | None
    frame: torch.Tensor | None
    factor: torch.Tensor | None
    weight_clip: torch.Tensor
    act_clip: torch.Tensor


@dataclasses.dataclass
class Objective:
    """The loss of a site as a function of its parameters.

    w: (N, K) float32 stacked weights. scale: (K,) start of s, or None for ones. rotation: (b, b) start of Q, or None.
    tie: (K,) long, channels with equal numbers share one scale, or None. group_size: g. act_bits: 4, 8 or 16.
    """

    w: torch.Tensor
    scale: torch.Tensor | None
    rotation: torch.Tensor | None
    tie: torch.Tensor | None
    group_size: int
    act_bits: int

    def start(
        self, rank: int, learn_scale: bool, generator: torch.Generator, learn_rotation: bool = True
    ) -> Parameters:
        """Parameters at the closed form: s and Q as given, V from the SVD of W~, G balancing both factors.

        rank: R, 0 for no low rank. learn_scale, learn_rotation: else these stay as given. generator: of the
        orthogonal mixing where R is no power of two.
        """
        n, k = self.w.shape
        new = self.w.new_zeros
        channels = k if self.tie is None else int(self.tie.max()) + 1
        logit = math.log(START_CLIP / (1 - START_CLIP))
        frame = factor = None
        if rank:
            frame, factor = balanced_svd(self.transformed(self.w, self.scale, self.rotation), rank, generator)
        return Parameters(
            log_scale=new(channels) if learn_scale else None,
            generator=torch.zeros_like(self.rotation) if self.rotation is not None and learn_rotation else None,
            frame=frame,
            factor=factor,
            weight_clip=new(n, k // self.group_size) + logit,
            act_clip=new(()) + logit,
        )

    @staticmethod
    def transformed(w: torch.Tensor, scale: torch.Tensor | None, rotation: torch.Tensor | None) -> torch.Tensor:
        """W~ (N, K) for an orthogonal rotation."""
        w = w if scale is None else w * scale
        return w if rotation is None else rotate_blocks(w, rotation)

    def scale_of(self, p: Parameters) -> torch.Tensor | None:
        """s: (K,) positive, tied channels equal; learned steps keep the geometric mean."""
        if p.log_scale is None:
            return self.scale
        centred = p.log_scale - p.log_scale.mean()
        s = (centred if self.tie is None else centred[self.tie]).exp()
        return s if self.scale is None else s * self.scale

    def rotation_of(self, p: Parameters) -> torch.Tensor | None:
        """Q (b, b)."""
        return self.rotation if p.generator is None else self.rotation @ cayley(p.generator)

    def __call__(self, p: Parameters, x: torch.Tensor) -> torch.Tensor:
        """Squared output error on rows x (T, K), not yet divided by anything."""
        return next(self.losses(p, x, x @ self.w.t(), [0], 1))

    def losses(
        self, p: Parameters, x: torch.Tensor, y: torch.Tensor, parts: Iterable[int], count: int
    ) -> Iterator[torch.Tensor]:
        """Some of the ``count`` terms whose sum is the squared output error, in turn: each of some of the outputs, or
        of some of the rows where there are more of those.

        Args:
            x: (T, K). y: (T, N), x W^T. parts: numbers of the terms.
        """
        scale, rotation = self.scale_of(p), self.rotation_of(p)
        mix = down = None
        if p.frame is not None:
            mix = p.frame @ p.factor
            down = fake_quantize(torch.linalg.solve(p.factor, p.frame.t()), self.group_size)
        everything = slice(None)
        by_outputs = len(self.w) >= len(x)
        # What all terms need is computed once.
        if by_outputs:
            read = self._read(p, x, scale, rotation, down)
        else:
            rounded = self._rounded(p, everything, scale, rotation, mix, down)
        total = len(self.w) if by_outputs else len(x)
        for part in parts:
            some = slice(part * total // count, (part + 1) * total // count)
            if by_outputs:
                rounded, exact = self._rounded(p, some, scale, rotation, mix, down), y[:, some]
            else:
                read, exact = self._read(p, x[some], scale, rotation, down), y[some]
            (coarse, low), (residual, up) = read, rounded
            found = coarse @ residual.t()
            found = found if up is None else found + low @ up.t()
            yield (found - exact).square().sum()
            found = None  # the graph of this term is not needed while the next one is made
            if by_outputs:
                rounded = residual = up = None
            else:
                read = coarse = low = None

    def _read(self, p: Parameters, x: torch.Tensor, scale, rotation, down):
        """What the residual reads, (T, K), and what the up-projection reads, (T, R) or None."""
        x = x if scale is None else x / scale
        x = x if rotation is None else rotate_blocks(x, rotation)
        fine = fake_quantize_activation(x, max(self.act_bits, 8))
        coarse = fake_quantize_activation(x, 4, torch.sigmoid(p.act_clip)) if self.act_bits == 4 else fine
        return coarse, None if down is None else fine @ down.t()

    def _rounded(self, p: Parameters, rows: slice, scale, rotation, mix, down):
        """The residual, (n, K), and the up-projection, (n, R) or None, of some of the outputs."""
        target = self.transformed(self.w[rows], scale, rotation)
        clip, up = torch.sigmoid(p.weight_clip[rows]), None
        if mix is not None:
            up = fake_quantize(target @ mix, mix.shape[1])
            target = target - up @ down
        return fake_quantize(target, self.group_size, clip), up


def balanced_svd(w: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """V (K, R) and G (R, R) for which W V G and G^-1 V^T carry equal, evenly mixed shares of the R largest singular
    values of W (N, K)."""
    _, values, v = truncated_svd(w, rank, generator)
    # A vanishing direction gets a factor that is still well conditioned.
    values = values.clamp_min(1e-4 * values.max().clamp_min(1e-30))
    return v.contiguous(), values.rsqrt()[:, None] * mixing_matrix(rank, generator).to(w)


def learn(
    objective: Objective,
    start: Parameters,
    rows: torch.Tensor,
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[float], None] = lambda loss: None,
    what: str = "site",
    shards: int = 1,
) -> Parameters:
    """Minimise the objective over minibatches of ``rows``.

    Args:
        rows: (T, K) float32 inputs of the site; with no more than BATCH_ROWS (or K) of them each step reads all.
        steps: learning steps. generator: draws the minibatches. on_step: told the relative squared error.
        what: named in errors. shards: parts in which a gradient is formed, see ``Config.shards``.
    Returns:
        the learned parameters, detached. Where G became ill-conditioned, V and G are those of the start.
    Raises:
        NumericError: the loss is not finite.
    """
    p = dataclasses.replace(start, **{f.name: _leaf(getattr(start, f.name)) for f in dataclasses.fields(start)})
    rates = {"log_scale": LR_SCALE, "generator": LR_ROTATION, "weight_clip": LR_CLIP}
    if p.factor is not None:
        rates["factor"] = LR_FACTOR * float(start.factor.square().mean().sqrt())
    if objective.act_bits == 4:
        rates["act_clip"] = LR_CLIP
    groups = [
        {"params": [getattr(p, n)], "lr": lr, "start": lr} for n, lr in rates.items() if getattr(p, n) is not None
    ]
    adam = torch.optim.Adam(groups, betas=BETAS)
    frame = None if p.frame is None else StiefelAdam(p.frame, LR_FRAME, BETAS)
    learned = [q for group in groups for q in group["params"]] + ([] if frame is None else [p.frame])
    size = max(BATCH_ROWS, rows.shape[1] // 4)
    outputs = rows @ objective.w.t()
    energy = outputs.square().sum() / len(rows)
    with torch.enable_grad(), fast_matmul(rows.device):
        for step in range(steps):
            batch, exact = rows, outputs
            if len(rows) > max(size, rows.shape[1]):
                drawn = torch.randint(len(rows), (size,), generator=generator).to(rows.device)
                batch, exact = rows[drawn], outputs[drawn]
            norm = energy * len(batch)

            def terms(parts, batch=batch, exact=exact, norm=norm):
                losses = objective.losses(p, batch, exact, parts, shards)
                return (flat_gradient(loss / norm, learned) for loss in losses)

            loss = set_gradients(learned, sum_parts(terms, shards, flat_like(learned)))
            for group in adam.param_groups:
                group["lr"] = group["start"] * cosine(step, steps)
            adam.step()
            adam.zero_grad()
            if frame is not None:
                frame.step(cosine(step, steps))
                p.frame.grad = None
            on_step(loss)
    if not math.isfinite(loss):
        raise NumericError(f"{what}: learning diverged (loss {loss}). Use steps=0, or report the layer.")
    same_values(learned)
    p = dataclasses.replace(p, **{f.name: _detached(getattr(p, f.name)) for f in dataclasses.fields(p)})
    if p.factor is not None and not well_conditioned(p.factor):
        p = dataclasses.replace(p, frame=start.frame, factor=start.factor)
    return p


def flat_like(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Zeros of the size of what :func:`flat_gradient` gives."""
    return parameters[0].new_zeros(sum(p.numel() for p in parameters) + 1, requires_grad=False)


def flat_gradient(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of ``loss`` and behind it its value, as one vector; the graph is kept."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([part.reshape(-1) for part in (*parts, loss.detach())])


def set_gradients(parameters: list[torch.Tensor], flat: torch.Tensor) -> float:
    """Set every parameter's ``grad`` from such a vector, and return the value of the loss."""
    *parts, loss = flat.split([*(p.numel() for p in parameters), 1])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p)
    return float(loss)


@torch.no_grad()
def same_values(parameters: list[torch.Tensor]) -> None:
    """Give every process the parameters of the first one, in case that equal steps differed by rounding."""
    found = share({str(i): p for i, p in enumerate(parameters)}, parameters[0].device)
    for i, p in enumerate(parameters):
        if found[str(i)] is not p:
            p.copy_(found[str(i)])


def learned_rotation(objective: Objective, p: Parameters) -> torch.Tensor | None:
    """Q (b, b), orthogonal to float32 rounding: the float64 polar factor of what was learned in float32."""
    q = objective.rotation_of(p)
    return None if q is None else reorthogonalise(q)


def _leaf(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clone().requires_grad_(True)


def _detached(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach()
