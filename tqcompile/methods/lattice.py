"""Rounding below four bits: codes on a group's own grid, or on one affine integer lattice for the whole matrix.

    grid      w = scale (code - zero)                  scale and zero of a group of g columns of a row
    lattice   w = scale T (code + offset)              T (d, d) and offset (d,) of the matrix, for every d columns

The lattice is UniSVQ's (arXiv 2606.10520): its T z + b is ours with b = T offset. Both are rounded column by column (d
columns at a time), each error compensated by what comes after: GPTQ (arXiv 2210.17323), which for d columns at a time
is block-LDLQ (QuIP#, arXiv 2402.04396). Coordinate passes then move one column at a time to its best code given all
others.
"""

import dataclasses

import torch

from tqcompile.methods.hadamard import signed_hadamard
from tqcompile.methods.rounding import storable
from tqcompile.ops.lattice_linear import ZERO_STEPS

RATIOS = 17  # clipping ratios that are tried for a group's grid
DIMENSION = 4  # d of a lattice
PASSES = 2
SEARCHED = 256  # points that a search for a scale may go through; of more it takes the one by rounding T^-1 w
WORK = 1 << 25  # distances that are computed in one round of learning a lattice, at most


@dataclasses.dataclass(frozen=True)
class Lattice:
    """basis: T (d, d) float32, or None for the identity. offset: (d,) float32."""

    basis: torch.Tensor | None
    offset: torch.Tensor

    def codewords(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All codes (2^(bits d), d) uint8 and the points T (code + offset) they stand for, float32."""
        d = len(self.offset)
        codes = torch.cartesian_prod(*[torch.arange(1 << bits, dtype=torch.uint8, device=self.offset.device)] * d)
        points = codes + self.offset
        return codes, points if self.basis is None else points @ self.basis.t()


def integer_lattice(bits: int, device: torch.device | str = "cpu") -> Lattice:
    """T = I, centred: points -1.5 to 1.5 (2 bits) or -3.5 to 3.5 (3 bits)."""
    return Lattice(None, torch.full((DIMENSION,), -((1 << bits) - 1) / 2, device=device))


def input_rotation(signs: str, basis: torch.Tensor | None) -> torch.Tensor | None:
    """What the input of a layer is multiplied by in blocks: the signed Hadamard, T for every d channels, or both in
    one matrix. (b, b) bfloat16 on the device of ``basis``, or None."""
    rotation = signed_hadamard(signs) if signs else None
    if basis is None:
        return rotation
    if rotation is None:
        return basis.to(torch.bfloat16)
    blocks = torch.block_diag(*[basis] * (len(rotation) // len(basis)))
    return (rotation.to(blocks) @ blocks).to(torch.bfloat16)


@dataclasses.dataclass
class Codes:
    """codes (N, K) uint8; scale (N, K/g) float32 of bfloat16 values; zero (N, K/g) uint8 (ZERO_STEPS a code) where
    there is no lattice."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    lattice: Lattice | None
    bits: int

    def weights(self) -> torch.Tensor:
        """(N, K) float32."""
        points = self.codes.float().unflatten(-1, (self.scale.shape[1], -1))
        if self.lattice is None:
            points = points - self.zero.float().unsqueeze(-1) / ZERO_STEPS
        else:
            points = points.unflatten(-1, (-1, len(self.lattice.offset))) + self.lattice.offset
            points = points if self.lattice.basis is None else points @ self.lattice.basis.t()
            points = points.flatten(-2)
        return (points * self.scale.unsqueeze(-1)).flatten(-2)


def group_grid(
    w: torch.Tensor, group_size: int, bits: int, importance: torch.Tensor | None = None, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of every group of (N, K) ``w``: from its smallest to its largest value, or with ``search`` the one of
    the smallest (importance-weighted) squared error over ranges clipped on both sides, then fitted by least squares.

    Args:
        importance: (K,) non-negative weights of the squared error.
    Returns:
        scale (N, K/g) float32 of bfloat16 values, and zero (N, K/g) float32 in steps of 1 / ZERO_STEPS.
    """
    groups = w.unflatten(-1, (-1, group_size))
    top = (1 << bits) - 1
    # The grid always reaches zero, so that a zero point fits in [0, top].
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    weight = torch.ones_like(groups[:1]) if importance is None else importance.view(1, -1, group_size)

    def stored(scale, zero):
        return storable(scale), (zero * ZERO_STEPS).round().clamp(0, top * ZERO_STEPS) / ZERO_STEPS

    def rounded(scale, zero):
        return (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top)

    def error(scale, zero, codes):
        return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - groups).square().mul(weight).sum(-1)

    flat = high == low  # a group of zeros
    full = torch.where(flat, torch.ones_like(low), (high - low) / top)
    best = stored(full, torch.where(flat, torch.zeros_like(low), -low / full))
    if not search:
        return best
    best_error = error(*best, rounded(*best))
    for ratio in torch.linspace(0.36, 1.0, RATIOS).tolist():
        scale = full * ratio
        grid = stored(scale, top / 2 - (high + low) / 2 / scale)
        codes = rounded(*grid)
        for fit in (False, True):
            if fit:
                grid = stored(*_least_squares(groups, codes, weight, grid))
                codes = rounded(*grid)
            found = error(*grid, codes)
            better = found < best_error
            best = tuple(torch.where(better, new, old) for new, old in zip(grid, best, strict=True))
            best_error = torch.where(better, found, best_error)
    return best


def _least_squares(groups, codes, weight, start):
    """scale and zero of every group that fit its values best by scale (code - zero); ``start`` where that has no
    answer."""
    total = weight.sum(-1)
    mean_z, mean_w = ((weight * v).sum(-1) / total.clamp_min(1e-30) for v in (codes, groups))
    centred = codes - mean_z.unsqueeze(-1)
    spread = (weight * centred.square()).sum(-1)
    scale = (weight * centred * groups).sum(-1) / spread.clamp_min(1e-30)
    usable = (spread > 0) & (scale > 0)
    zero = mean_z - mean_w / scale
    return torch.where(usable, scale, start[0]), torch.where(usable, zero, start[1])


def lattice_scales(w: torch.Tensor, group_size: int, bits: int, lattice: Lattice, importance=None) -> torch.Tensor:
    """The scale of every group of (N, K) ``w`` on a lattice, alternating nearest points and least squares.

    Returns: (N, K/g) float32 of bfloat16 values, positive.
    """
    groups = w.unflatten(-1, (-1, group_size))
    weight = torch.ones_like(groups[:1]) if importance is None else importance.view(1, -1, group_size)
    points = lattice.codewords(bits)[1]
    rms = groups.square().mean(-1).sqrt()
    rms = torch.where(rms > 0, rms, torch.ones_like(rms))
    best = best_error = None
    for factor in (0.75, 0.95, 1.1):
        # At this scale the points, taken as equally likely, have 1 / factor times the spread of the group.
        scale = rms / points.square().mean().sqrt() * factor
        for _ in range(3):
            units = (groups / scale.unsqueeze(-1)).unflatten(-1, (-1, len(lattice.offset)))
            q = _points(_near(units, bits, lattice), lattice).flatten(-2)
            fitted = (weight * q * groups).sum(-1) / (weight * q.square()).sum(-1).clamp_min(1e-30)
            scale = torch.where(fitted > 0, fitted, scale)
        scale = storable(scale)
        units = (groups / scale.unsqueeze(-1)).unflatten(-1, (-1, len(lattice.offset)))
        q = _points(_near(units, bits, lattice), lattice).flatten(-2) * scale.unsqueeze(-1)
        error = ((q - groups).square() * weight).sum(-1)
        if best is None:
            best, best_error = scale, error
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def _points(codes: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    points = codes.float() + lattice.offset
    return points if lattice.basis is None else points @ lattice.basis.t()


def _near(units: torch.Tensor, bits: int, lattice: Lattice) -> torch.Tensor:
    if lattice.basis is None or 1 << bits * len(lattice.offset) <= SEARCHED:
        return nearest(units, bits, lattice)
    codes = units @ torch.linalg.inv(lattice.basis).t() - lattice.offset
    return codes.round().clamp(0, (1 << bits) - 1).to(torch.uint8)


def nearest(units: torch.Tensor, bits: int, lattice: Lattice, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Codes (..., d) uint8 of the lattice points nearest to ``units`` (..., d), w over its scale.

    metric: A (d, d), distances are |(u - p) A|; or None for the identity.
    """
    top = (1 << bits) - 1
    if lattice.basis is None and metric is None:
        return (units - lattice.offset).round().clamp(0, top).to(torch.uint8)
    codes, points = lattice.codewords(bits)
    flat = units.reshape(-1, units.shape[-1])
    if metric is not None:
        flat, points = flat @ metric, points @ metric
    energy = points.square().sum(-1)
    found = [(energy - 2 * part @ points.t()).argmin(-1) for part in flat.split(max(1, (1 << 24) // len(points)))]
    return codes[torch.cat(found)].reshape(units.shape)


def learn_lattice(w: torch.Tensor, group_size: int, bits: int, rounds: int = 12) -> Lattice:
    """T and offset that fit (N, K) ``w``, its groups brought to one spread: Lloyd's alternation of nearest points and
    least squares, started at T = I."""
    units = w / lattice_scales(w, group_size, bits, integer_lattice(bits, w.device)).repeat_interleave(group_size, 1)
    units = units.reshape(-1, DIMENSION)
    units = units[:: -(-len(units) * (1 << bits * DIMENSION) // WORK)]
    lattice = integer_lattice(bits, w.device)
    for _ in range(rounds):
        codes = nearest(units, bits, lattice).double()
        # Normal equations in float64: LAPACK's least squares gives other bits when tensors lie elsewhere in memory.
        codes = torch.cat([codes, torch.ones_like(codes[:, :1])], 1)
        affine, singular = torch.linalg.solve_ex(codes.t() @ codes, codes.t() @ units.double())
        if singular:
            break
        affine = affine.float()
        basis = affine[:DIMENSION].t().contiguous()
        if not torch.isfinite(affine).all() or torch.linalg.cond(basis.double()) > 1e3:
            break
        lattice = Lattice(basis, torch.linalg.solve(basis, affine[DIMENSION]))
    return lattice


def encode(
    w: torch.Tensor,
    bits: int,
    group_size: int,
    factor: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    lattice: Lattice | None = None,
    search: bool = True,
) -> Codes:
    """Round (N, K) ``w`` to ``bits`` bits in groups of g, with error compensation where ``factor`` is given.

    Args:
        factor: (K, K) from ``gptq.inverse_factor``, or None to round to nearest. importance: (K,) weights of the
            squared error for the search of scales. lattice: one for the whole matrix, or None for a grid a group.
            search: as in :func:`group_grid`.
    """
    n, k = w.shape
    w = w.clone()
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scale = torch.empty(n, k // group_size, device=w.device)
    zero = None if lattice is not None else torch.empty_like(scale)
    d = 1 if lattice is None or lattice.basis is None else len(lattice.offset)
    for start in range(0, k, group_size):
        g = slice(start, start + group_size)
        index, block = start // group_size, w[:, g]
        weight = None if importance is None else importance[g]
        if lattice is None:
            s, z = group_grid(block, group_size, bits, weight, search)
            zero[:, index] = z[:, 0]
        else:
            s = lattice_scales(block, group_size, bits, lattice, weight)
        scale[:, index] = s[:, 0]
        if factor is None:
            codes[:, g] = _round(block, s, None if zero is None else z, bits, lattice)
            continue
        u, errors = factor[g, g], torch.empty_like(block)
        inverses = _diagonal_blocks(u, d).inverse()
        for j in range(0, group_size, d):
            columns, inverse = block[:, j : j + d], inverses[j // d]
            code, value = _round_columns(columns, s, None if zero is None else z, bits, lattice, inverse, j)
            codes[:, start + j : start + j + d] = code
            error = _times(columns - value, inverse)
            block[:, j + d :] -= error @ u[j : j + d, j + d :]
            errors[:, j : j + d] = error
        w[:, g.stop :] -= errors @ factor[g, g.stop :]
    zero = None if zero is None else (zero * ZERO_STEPS).round().to(torch.uint8)
    return Codes(codes, scale, zero, lattice, bits)


def _round(block, scale, zero, bits, lattice):
    units = block / scale
    if lattice is None:
        return (units + zero).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    return nearest(units.unflatten(-1, (-1, len(lattice.offset))), bits, lattice).flatten(-2)


def _round_columns(columns, scale, zero, bits, lattice, inverse, j):
    """Codes and values of d columns of one group; scale and zero (N, 1)."""
    if lattice is not None and lattice.basis is not None:
        code = nearest(columns / scale, bits, lattice, inverse)
        return code, _points(code, lattice) * scale
    shift = zero if lattice is None else -lattice.offset[j % len(lattice.offset)]
    code = (columns / scale + shift).round().clamp(0, (1 << bits) - 1)
    return code.to(torch.uint8), (code - shift) * scale


def refine(w: torch.Tensor, found: Codes, hessian: torch.Tensor, passes: int = PASSES) -> Codes:
    """Coordinate passes: each column (d columns on a lattice with a basis) moves to its best code, all others fixed.

    The error tr((w - q) H (w - q)^T) never grows. Costs N K^2 products a pass, like GPTQ itself.

    Args:
        w: (N, K) float32. hessian: (K, K) float32, positive definite. passes: over all columns, last to first.
    """
    lattice, bits, groups = found.lattice, found.bits, found.scale.shape[1]
    size = w.shape[1] // groups
    d = 1 if lattice is None or lattice.basis is None else len(lattice.offset)
    codes, values = found.codes.clone(), found.weights()
    zero = None if found.zero is None else found.zero.float() / ZERO_STEPS
    for _ in range(passes):
        for index in reversed(range(groups)):
            g = slice(index * size, (index + 1) * size)
            pull = (w - values) @ hessian[:, g]
            h, s = hessian[g, g], found.scale[:, index : index + 1]
            own = _diagonal_blocks(h, d)
            inverses, metrics = own.inverse(), torch.linalg.cholesky(own)
            for j in reversed(range(0, size, d)):
                at, inside = slice(g.start + j, g.start + j + d), slice(j, j + d)
                best = values[:, at] + _times(pull[:, inside], inverses[j // d])
                code, value = _round_columns(best, s, _column(zero, index), bits, lattice, metrics[j // d], j)
                pull -= (value - values[:, at]) @ h[inside]
                codes[:, at], values[:, at] = code, value
    return dataclasses.replace(found, codes=codes)


def _diagonal_blocks(matrix: torch.Tensor, d: int) -> torch.Tensor:
    """(g, g) -> the (g/d, d, d) blocks on its diagonal."""
    blocks = matrix.unflatten(0, (-1, d)).unflatten(2, (-1, d))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _times(columns: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return columns * matrix if len(matrix) == 1 else columns @ matrix


def _column(zero: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if zero is None else zero[:, index : index + 1]
