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

# t, k, rank, group, rotation block, input scale, kind, other, dtype, act_bits: every kind, both ways to t (from 65
# tokens on it is a launch of its own), groups wider and narrower than the block, odd T, K and R no power of two.
PROLOGUE_CASES = [
    (1, 384, 16, 128, None, False, "none", False, BF16, 8),
    (3, 384, 6, 128, 128, True, "rms_norm", True, BF16, 8),
    (17, 384, 48, 64, 128, False, "rms_norm", False, FP16, 8),
    (2, 768, 16, 256, 64, False, "silu_mul", True, BF16, 8),
    (3, 192, 8, 96, None, True, "rms_norm", True, FP32, 8),
    (5, 256, 32, 32, 32, False, "silu_mul", True, FP16, 4),
    (2, 384, 64, 128, 128, False, "rms_norm", True, BF16, 4),
    (3, 384, 16, 128, 128, True, "silu_mul", True, BF16, 16),
    (2, 128, None, 128, None, False, "rms_norm", True, FP32, 16),
    (2, 4224, None, 64, 64, False, "rms_norm", True, BF16, 8),
    ((2, 3), 128, 6, 128, 64, False, "none", False, BF16, 8),
    (66, 384, 48, 128, 128, False, "rms_norm", True, BF16, 8),
    (70, 256, 16, 64, None, True, "silu_mul", True, FP16, 4),
    (67, 256, 32, 128, 128, False, "none", False, BF16, 16),
    (65, 128, 8, 32, None, False, "rms_norm", False, BF16, 8),
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


def random_prologue_args(
    t, k, rank, group, block, scaled, kind, other, dtype, act_bits, *, device="cpu", seed=None
) -> tuple:  # fmt: skip
    """Arguments of prologue; x and other are the halves of one tensor, as of a merged gate and up."""
    g = torch.Generator(device).manual_seed(next(_seeds) if seed is None else seed)
    lead = t if isinstance(t, tuple) else (t,)
    both = (torch.randn(*lead, 2 * k, generator=g, device=device) * 3).to(dtype)
    gain = (torch.rand(k, generator=g, device=device) + 0.5).to(dtype) if kind == "rms_norm" else None
    scale = torch.rand(k, generator=g, device=device) + 0.5 if scaled else None
    rotation = None
    if block is not None:
        rotation = torch.linalg.qr(torch.randn(block, block, generator=g, device=device))[0].to(dtype)
    down = down_scale = None
    if rank is not None:
        down = torch.randint(0, 256, (rank, k // 2), dtype=torch.uint8, generator=g, device=device)
        down_scale = ((torch.rand(rank, k // group, generator=g, device=device) + 0.1) * 0.01).bfloat16()
    ratio = 7 / 127 if act_bits == 4 else 0.0
    added = both[..., k:] if other else None
    return (both[..., :k], added, gain, scale, rotation, down, down_scale, kind, 1e-5, act_bits, ratio)


def _prologue_exact(x, other, gain, input_scale, rotation, kind, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """(transformed value, bound of its error before quantization), float64 (..., K).

    Counted: the sum of squares, its root and product; exp and the division of silu; every rounding to the dtype of x,
    of which a value moved by an earlier one may go the other way; the sum over a rotation block.
    """
    k, half, floor = x.shape[-1], torch.finfo(x.dtype).eps / 2, _absolute_floor(x.dtype)
    value, error = x.double(), torch.zeros_like(x, dtype=torch.float64)

    def rounded(value, error):
        return error * (1 + half) + half * value.abs() + floor

    if kind == "rms_norm":
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
        error = rounded(value, (k + 16) * U32 * value.abs()) * gain.double().abs()
        value = value * gain.double()
        error = rounded(value, error + U32 * value.abs())
    elif kind == "silu_mul":
        gate = value * torch.sigmoid(value)
        error = rounded(gate, (value.abs() + 16) * U32 * gate.abs()) * other.double().abs()
        value = gate * other.double()
        error = rounded(value, error + U32 * value.abs())
    if input_scale is not None:
        value = value * input_scale.double()
        error = rounded(value, error * input_scale.double() + U32 * value.abs())
    if rotation is not None:
        b, turn = rotation.shape[0], rotation.to(x.dtype).double()
        error = error + 2 * b * U32 * (value.abs() + error)
        error = (error.unflatten(-1, (-1, b)) @ turn.abs()).flatten(-2)
        value = (value.unflatten(-1, (-1, b)) @ turn).flatten(-2)
    return value, error


def worst_prologue(result, args, result8=None) -> float:
    """Largest error over bound of operand, operand_scale and t; h must be exact. ``result8``: of the same arguments
    with 8 bits, from which the 4-bit operand and its t follow exactly."""
    operand, scale, t, h, *_ = result
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, ratio = args
    k, rank = x.shape[-1], 0 if down is None else down.shape[0]
    stream = kind == "rms_norm" and other is not None
    shapes = (*(tuple(tensor.shape) for tensor in (operand, t, h)), operand.dtype, t.dtype)
    expected = (tuple(x.shape), (*x.shape[:-1], rank), tuple(x.shape) if stream else (0,))
    assert shapes == (*expected, x.dtype if act_bits == 16 else torch.int8, x.dtype)
    assert tuple(scale.shape) == ((0,) if act_bits == 16 else (*x.shape[:-1], 1))
    if x.numel() == 0:
        return 0.0
    if stream:
        x = x + other  # one rounding, the same on every device
        assert torch.equal(h, x)
    if act_bits == 4:
        q8, scale8, t8, *_ = result8
        assert torch.equal(operand, torch.round(q8.float() * ratio).clamp(-8, 7).to(torch.int8))
        torch.testing.assert_close(scale, scale8 / ratio, rtol=4 * U32, atol=0)
        assert torch.equal(t, t8)
        return 0.0
    value, error = _prologue_exact(x, other, gain, input_scale, rotation, kind, eps)
    half = torch.finfo(x.dtype).eps / 2
    q, natural_t = torch.empty_like(operand), torch.empty_like(t)
    q[..., 0::2], q[..., 1::2] = operand[..., : k // 2], operand[..., k // 2 :]
    natural_t[..., 0::2], natural_t[..., 1::2] = t[..., : rank // 2], t[..., rank // 2 :]
    if act_bits == 16:
        q = q.double()
        off = (q - value).abs() / (error * (1 + half) + half * value.abs() + _absolute_floor(x.dtype))
        worst, step = off.max(), 1.0
    else:
        assert q.min() >= -127
        q, step = q.double(), scale.double()
        exact = value.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        worst = ((step - exact).abs() / (error.amax(-1, keepdim=True) / 127 + 4 * U32 * exact)).max()
        off = (q * step - value).abs() / (step * (0.5 + 127 * 4 * U32) + error)
        worst = torch.maximum(worst, off.max())
    if rank:
        d = unpacked(down, down_scale)
        exact = q @ d.T * step
        sums = (k // MIN_STEP + 8 + (2 * k if act_bits == 16 else 0)) * U32
        bound = sums * (q.abs() @ d.abs().T * step) * (1 + half) + half * exact.abs() + _absolute_floor(x.dtype)
        worst = torch.maximum(worst, ((natural_t.double() - exact).abs() / bound).max())
    return worst.nan_to_num(nan=float("inf")).item()
