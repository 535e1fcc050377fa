"""Float64 results of the two kernels' ops, and how far a correct kernel may be from them.

Nothing here calls the project: unpacking and formulas are written again from the layout's definition. Every
bound is a worst case of the rounding steps named beside it, so it holds for any input, in any order of sums.
"""

import itertools

import torch

U32 = 2.0**-24  # unit roundoff of float32
MAX_STEP = 128  # most K elements summed before a partial sum is scaled
MIN_STEP = 32  # fewest, so K / MIN_STEP partial sums at most
MAX_SPLITS = 16
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_seeds = itertools.count(1000)  # no seed given: other values for each call, the same in each run

# t, n, k, rank, form, dtype, options; odd T and N, one and several K steps, split and unsplit tiles.
TWIN_CASES = [
    (1, 70, 384, 8, "w4a8", BF16, {}),
    (3, 130, 384, 16, "w4a8", FP16, {"bias": False}),
    (17, 70, 384, 32, "w4a8", FP32, {}),
    (17, 129, 128, 48, "w4a4", BF16, {}),
    (3, 33, 384, 128, "w4a4", FP16, {"bias": False}),
    (1, 64, 64, None, "w4a8", BF16, {"group": 64}),
    (17, 130, 384, None, "w4a4", FP32, {"bias": False}),
    (1, 70, 384, 48, "w4a16", BF16, {}),
    (17, 131, 128, 32, "w4a16", FP16, {}),
    (3, 70, 384, 16, "w4a16", FP32, {"bias": False}),
    (3, 70, 128, None, "w4a16", BF16, {}),
    (3, 70, 192, 32, "w4a8", BF16, {"group": 32, "down_group": 96}),
    (3, 70, 192, 64, "w4a16", BF16, {"group": 96, "down_group": 64, "up_groups": 2}),
    (2, 40, 256, 48, "w4a8", FP32, {"up_groups": 3, "scale_dtype": FP32}),
    ((2, 3), 40, 128, 6, "w4a8", BF16, {"scale_dtype": FP16}),
    (260, 140, 128, 32, "w4a8", BF16, {}),
    (100, 140, 1024, 16, "w4a8", BF16, {}),
    (40, 130, 512, 8, "w4a16", BF16, {}),
]

# t, k, rotation block, input scale, dtype; 20000 and 4224 need several chunks.
QUANTIZE_CASES = [
    (1, 128, None, False, BF16),
    (3, 384, None, True, FP16),
    (17, 384, 128, True, BF16),
    (3, 4224, 64, True, FP32),
    (3, 96, 16, False, FP16),
    (1, 20000, None, True, BF16),
    (2, 20480, 32, False, BF16),
    ((2, 3), 64, 64, False, FP32),
    (2, 100, None, False, FP32),
]


def unpacked(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, columns/2) uint8, low nibble first, two's complement -> (rows, columns) float64, scaled."""
    byte = packed.to(torch.int32)
    q = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int32, device=packed.device)
    q[:, 0::2], q[:, 1::2] = byte % 16, byte // 16
    q[q > 7] -= 16
    return q.double() * scale.double().repeat_interleave(q.shape[1] // scale.shape[1], 1)


def _absolute_floor(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2  # rounding error below the normal numbers


def twin_linear_exact(
    x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, act_ratio, dtype, rows=4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, bound), float64 (..., N): the exact result without any rounding, and the error allowed around it.

    Counted in ``bound``: fp32 sums of the residual and of t (int8 sums are exact inside a step; tensor cores
    may cut off instead of round, so 2 units per float product), scaling, t rounded to ``dtype`` and times
    |up|, the sum over R, the final additions, the output rounding. ``rows`` of N at a time limit memory.
    """
    k, n = x.shape[-1], residual.shape[0]
    wide = x.double().reshape(-1, k)
    xs = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    if x_scale is not None:
        xs = x_scale.double().reshape(-1, 1)
    operand = wide
    if act_ratio > 0:  # the 4-bit value is defined by a float32 product
        ratio = torch.tensor(act_ratio, dtype=torch.float32)
        operand = torch.round(x.reshape(-1, k).float() * ratio.item()).clamp(-8, 7).double() / act_ratio
    sums = k // MIN_STEP + MAX_SPLITS + 8 + (0 if x.dtype == torch.int8 else 2 * MAX_STEP)
    half = torch.finfo(dtype).eps / 2
    t = t_error = None
    if down is not None:
        d = unpacked(down, down_scale)
        t = wide @ d.T * xs
        t_error = sums * U32 * (wide.abs() @ d.abs().T * xs)
        t_error = t_error * (1 + half) + half * t.abs() + _absolute_floor(dtype)
    y, bound = [], []
    for i in range(0, n, rows):
        w = unpacked(residual[i : i + rows], residual_scale[i : i + rows])
        part = operand @ w.T * xs
        error = (sums + 4) * U32 * (operand.abs() @ w.abs().T * xs)
        if t is not None:
            u = unpacked(up[i : i + rows], up_scale[i : i + rows])
            part = part + t @ u.T
            error = error + t_error @ u.abs().T
            error = error + (2 * t.shape[1] + 8) * U32 * ((t.abs() + t_error) @ u.abs().T)
        if bias is not None:
            b = bias[i : i + rows].double()
            part = part + b
            error = error + 2 * U32 * b.abs()
        y.append(part)
        bound.append(error * (1 + half) + half * part.abs() + _absolute_floor(dtype))
    shape = (*x.shape[:-1], n)
    return torch.cat(y, 1).reshape(shape), torch.cat(bound, 1).reshape(shape)


def worst_twin_linear(y: torch.Tensor, args: tuple) -> float:
    """Largest |y - exact| / bound: a correct kernel stays at or below 1. NaN anywhere gives infinity."""
    exact, bound = twin_linear_exact(*args)
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}, expected {tuple(exact.shape)}"
    assert y.dtype == args[-1], f"dtype {y.dtype}, expected {args[-1]}"
    ratio = ((y.double() - exact).abs() / bound).nan_to_num(nan=float("inf"))
    return ratio.max().item() if ratio.numel() else 0.0


def worst_quantize_activation(x_q, x_scale, x, input_scale, rotation) -> float:
    """Largest error over bound of the scales and of x_q * x_scale against the transformed x in float64.

    Counted: the sum over a rotation block, then half a quantization step and the roundings of the division.
    """
    assert x_q.shape == x.shape, f"x_q has shape {tuple(x_q.shape)}, expected {tuple(x.shape)}"
    assert x_scale.shape == (*x.shape[:-1], 1), f"x_scale has shape {tuple(x_scale.shape)}"
    assert x_q.dtype == torch.int8, x_q.dtype
    assert x_scale.dtype == torch.float32, x_scale.dtype
    if x.numel() == 0:
        return 0.0
    if input_scale is not None:
        # Defined as rounded, so the rounded product is the exact input of what follows.
        x = (x.float() * input_scale.float()).to(x.dtype)
    h, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
    if rotation is not None:
        b, turn = rotation.shape[0], rotation.to(x.dtype).double()
        error = 2 * b * U32 * (h.unflatten(-1, (-1, b)).abs() @ turn.abs()).flatten(-2)
        h = (h.unflatten(-1, (-1, b)) @ turn).flatten(-2)
    scale = h.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    scale_bound = error.amax(-1, keepdim=True) / 127 + 4 * U32 * scale
    value_bound = x_scale.double() * (0.5 + 127 * 4 * U32) + error
    worst = ((x_scale.double() - scale).abs() / scale_bound).nan_to_num(nan=float("inf")).max()
    off = ((x_q.double() * x_scale.double() - h).abs() / value_bound).nan_to_num(nan=float("inf")).max()
    if x_q.abs().max() > 127 or (x_q == -128).any():
        return float("inf")
    return max(worst.item(), off.item())


def random_twin_args(
    t, n, k, rank, form, dtype, *, group=128, down_group=None, up_groups=1, bias=True,
    device="cpu", scale_dtype=torch.bfloat16, seed=None,
) -> tuple:  # fmt: skip
    """Arguments of twin_linear. form: "w4a8", "w4a4" or "w4a16" (x of ``dtype``); rank None: no low-rank.

    t may be a tuple of leading dimensions. All 16 nibbles and all of -127 .. 127 occur.
    """
    g = torch.Generator(device).manual_seed(next(_seeds) if seed is None else seed)
    lead = t if isinstance(t, tuple) else (t,)

    def packed(rows, columns):
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g, device=device)

    def scales(rows, groups, top):
        return ((torch.rand(rows, groups, generator=g, device=device) + 0.1) * top).to(scale_dtype)

    if form == "w4a16":
        x, x_scale = torch.randn(*lead, k, generator=g, device=device).to(dtype), None
    else:
        x = torch.randint(-127, 128, (*lead, k), generator=g, device=device, dtype=torch.int8)
        x_scale = torch.rand(*lead, 1, generator=g, device=device) * 0.02 + 0.002
    low_rank = (None,) * 4
    if rank is not None:
        d_groups = k // (down_group or group)
        low_rank = (packed(rank, k), scales(rank, d_groups, 0.01))
        low_rank += (packed(n, rank), scales(n, up_groups, 0.05))
    b = torch.randn(n, generator=g, device=device).to(scale_dtype) if bias else None
    ratio = 7 / 127 if form == "w4a4" else 0.0
    return (x, x_scale, packed(n, k), scales(n, k // group, 0.02), *low_rank, b, ratio, dtype)


# t, n, k, groups, dtype, bias; odd T and N, groups of 32 to 256, one and several tiles.
INT8_CASES = [
    (1, 70, 384, 3, BF16, True),
    (3, 130, 256, 1, FP16, False),
    (17, 129, 128, 4, FP32, True),
    (40, 131, 192, 2, BF16, False),
    ((2, 3), 40, 128, 1, BF16, True),
    (100, 33, 128, 1, BF16, True),
    (0, 40, 128, 1, BF16, True),
]


def random_int8_args(t, n, k, groups, dtype, bias, device="cpu", seed=None) -> tuple:
    """Arguments of int8_linear. t may be a tuple of leading dimensions; all of -128 .. 127 occur."""
    g = torch.Generator(device).manual_seed(next(_seeds) if seed is None else seed)
    lead = t if isinstance(t, tuple) else (t,)
    weight = torch.randint(-128, 128, (n, k), generator=g, device=device, dtype=torch.int8)
    scale = ((torch.rand(n, groups, generator=g, device=device) + 0.1) * 0.01).bfloat16()
    b = torch.randn(n, generator=g, device=device).to(dtype) if bias else None
    return torch.randn(*lead, k, generator=g, device=device).to(dtype), weight, scale, b


def worst_int8_linear(y: torch.Tensor, x, weight, weight_scale, bias, rows=16384) -> float:
    """Largest |y - exact| / bound: fp32 sums of exact products (2 units each), scaling, bias, output rounding."""
    assert y.shape == (*x.shape[:-1], len(weight)), f"shape {tuple(y.shape)}"
    assert y.dtype == x.dtype, y.dtype
    k, half, largest = x.shape[-1], torch.finfo(x.dtype).eps / 2, 0.0
    wide, flat = x.double().reshape(-1, k), y.reshape(-1, len(weight))
    for i in range(0, len(weight) if len(flat) else 0, rows):
        w = weight[i : i + rows].double() * weight_scale[i : i + rows].double().repeat_interleave(
            k // weight_scale.shape[1], 1
        )
        exact, error = wide @ w.T, (2 * MAX_STEP + k // MIN_STEP + 8) * U32 * (wide.abs() @ w.abs().T)
        if bias is not None:
            part = bias[i : i + rows].double()
            exact, error = exact + part, error + 2 * U32 * part.abs()
        bound = error * (1 + half) + half * exact.abs() + _absolute_floor(x.dtype)
        ratio = ((flat[:, i : i + rows].double() - exact).abs() / bound).nan_to_num(nan=float("inf"))
        largest = max(largest, ratio.max().item())
    return largest
