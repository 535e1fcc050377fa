"""Float64 results of ``prologue`` (kind "none") and ``twin_gemm``, and how far a correct kernel may be from them.

As tests/kernel_bounds.py: nothing here calls the project, and every bound is a worst case of named roundings.
"""

import torch
from kernel_bounds import MAX_SPLITS, MAX_STEP, MIN_STEP, U32, _absolute_floor, unpacked, worst_quantize_activation


def natural_order(planes: torch.Tensor) -> torch.Tensor:
    """Even channels first, then odd ones -> channels in their own order."""
    half = planes.shape[-1] // 2
    values = torch.empty_like(planes)
    values[..., 0::2], values[..., 1::2] = planes[..., :half], planes[..., half:]
    return values


def worst(value: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """Largest |value - exact| / bound; NaN anywhere gives infinity."""
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    ratio = ((value.double() - exact).abs() / bound).nan_to_num(nan=float("inf"))
    return ratio.max().item() if ratio.numel() else 0.0


def worst_twin_gemm(
    y, operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
    down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0, rows=4096, dense=False,
) -> float:  # fmt: skip
    """Largest error of y over its bound. ``rows`` of N at a time limit memory. ``dense``: the kernel rounds unpacked
    weights, and the two products, to ``dtype``. With ``down`` and enough tokens t is what it should be, and off by its
    own sums and its rounding to ``dtype``; made from ``wide`` where that is given.

    Counted: fp32 sums over K (int8 sums are exact inside a step; two units a product of floats, which tensor cores may
    cut off), scaling, the sum over R, the additions of bias and addend, the output rounding.
    """
    assert y.dtype == dtype, f"dtype {y.dtype}, expected {dtype}"
    n, k = residual.shape[0], operand.shape[-1]
    values = natural_order(operand.double().reshape(-1, k))
    scale = torch.ones(1, 1, dtype=torch.float64, device=operand.device)
    if operand_scale is not None:
        scale = operand_scale.double().reshape(-1, 1)
    sums = k // MIN_STEP + MAX_SPLITS + 12 + (0 if operand.dtype == torch.int8 else 2 * MAX_STEP)
    half, largest = torch.finfo(dtype).eps / 2, 0.0
    narrow = t_error = None
    if down is not None and 0 < defer_from <= values.shape[0]:
        d, of_t, t_scale = unpacked(down, down_scale), values, scale
        if wide is not None:
            of_t, t_scale = natural_order(wide.double().reshape(-1, k)), scale * wide_ratio
        narrow = of_t @ d.T * t_scale
        t_error = sums * U32 * (of_t.abs() @ d.abs().T * t_scale)
        t_error = t_error * (1 + half) + half * narrow.abs() + _absolute_floor(dtype)
    elif t is not None:
        narrow = natural_order(t.double().reshape(-1, t.shape[-1]))
        t_error = torch.zeros_like(narrow)
    flat = y.reshape(-1, n)
    for i in range(0, n, rows):
        some = slice(i, i + rows)
        w = unpacked(residual[some], residual_scale[some])
        exact = values @ w.T * scale
        largest_sum = values.abs() @ w.abs().T * scale
        error = (sums * U32 + dense * half) * largest_sum + dense * half * exact.abs()
        if t is not None:
            u = unpacked(up[some], up_scale[some])
            exact = exact + narrow @ u.T
            error = error + ((2 * t.shape[-1] + 8) * U32 + dense * half) * ((narrow.abs() + t_error) @ u.abs().T)
            error = error + t_error @ u.abs().T + dense * half * exact.abs()
        for term in (bias, addend):
            if term is not None:
                part = term.double().reshape(-1, n)[:, some]
                exact, error = exact + part, error + 4 * U32 * part.abs()
        bound = error * (1 + half) + half * exact.abs() + _absolute_floor(dtype)
        largest = max(largest, worst(flat[:, some], exact, bound))
    return largest


def worst_plain_prologue(results, x, input_scale, rotation, down, down_scale, act_bits, act_ratio) -> dict[str, float]:
    """Largest error over bound of the operand with its scale, and of t, for kind "none".

    t is held against the operand that came back where that is what t reads (8 and 16 bits), and against the exactly
    rounded 8-bit values at 4 bits, whose operand no longer shows them.
    """
    operand, operand_scale, t, *_ = results
    k = x.shape[-1]
    if act_bits == 16:
        wide = x if input_scale is None else (x.float() * input_scale.float()).to(x.dtype)
        error = torch.zeros_like(wide, dtype=torch.float64)
        exact = wide.double()
        if rotation is not None:
            b, turn = rotation.shape[0], rotation.to(x.dtype).double()
            blocks = exact.unflatten(-1, (-1, b))
            error, exact = 2 * b * U32 * (blocks.abs() @ turn.abs()).flatten(-2), (blocks @ turn).flatten(-2)
        half = torch.finfo(x.dtype).eps / 2
        natural = natural_order(operand)
        found = {"operand": worst(natural, exact, error * (1 + half) + half * exact.abs() + _absolute_floor(x.dtype))}
        wide, scale = natural.double(), torch.ones(1, 1, dtype=torch.float64, device=x.device)
    else:
        q, scale = natural_order(operand), operand_scale
        if act_bits == 4:
            # The 8-bit scale comes back divided by the ratio, and every code within the rounding of both steps.
            eight = operand_scale.double() * act_ratio
            assert input_scale is rotation is None, "4 bits are checked without a transform"
            exact = (x.double().abs().amax(-1, keepdim=True) / 127 / act_ratio).clamp_min(1e-30)
            steps = x.double() / operand_scale.double()
            off = (q.double() - steps.clamp(-8, 7)).abs()
            allowed = 0.5 + act_ratio * 0.5 + 1e-4
            found = {"operand": max(worst(operand_scale, exact, 8 * U32 * exact), (off / allowed).max().item())}
            wide, scale = torch.round(x.float() / eight.float()).double(), eight
        else:
            found = {"operand": worst_quantize_activation(q, operand_scale, x, input_scale, rotation)}
            wide = q.double()
    if down is None:
        assert t.shape == (*x.shape[:-1], 0)
        return found
    d, half = unpacked(down, down_scale), torch.finfo(x.dtype).eps / 2
    wide, scale = wide.reshape(-1, k), scale.double().reshape(-1, 1)
    exact = wide @ d.T * scale
    sums = k // MIN_STEP + MAX_SPLITS + 12 + (2 * MAX_STEP if act_bits == 16 else 0)
    error = sums * U32 * (wide.abs() @ d.abs().T * scale)
    if act_bits == 4:  # a value halfway between two codes may go either way, with the last bits of the scale
        steps = (x.double().reshape(-1, k) / scale).abs()
        halfway = ((steps - steps.floor() - 0.5).abs() < 127 * 16 * U32).double()
        error = error + halfway @ d.abs().T * scale
    bound = error * (1 + half) + half * exact.abs() + _absolute_floor(x.dtype)
    return {**found, "t": worst(natural_order(t).reshape(-1, d.shape[0]), exact, bound)}


def random_down(rank: int, k: int, group: int, dtype, device="cpu", seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, down_scale) with any scales."""
    g = torch.Generator(device).manual_seed(seed + 1)
    packed = torch.randint(0, 256, (rank, k // 2), dtype=torch.uint8, generator=g, device=device)
    return packed, ((torch.rand(rank, k // group, generator=g, device=device) + 0.1) * 0.01).to(dtype)


def grid_scales(rows: int, groups: int, top: float, generator: torch.Generator, device="cpu"):
    """(scale (rows, groups) bfloat16, unit (rows,) float32): scale = unit * m exactly, m an integer in 1 .. 16."""
    unit = 2.0 ** round(torch.log2(torch.tensor(top / 16)).item())
    significand = torch.randint(8, 16, (rows, 1), generator=generator, device=device) / 8
    m = torch.randint(1, 17, (rows, groups), generator=generator, device=device)
    scale = significand * unit * m
    return scale.bfloat16(), (significand * unit)[:, 0].float()


def random_gemm_args(
    t, n, k, rank, operand, dtype, *, group=128, grid=True, bias=True, addend=False, device="cpu", seed=0
) -> tuple:
    """Arguments of twin_gemm. operand: torch.int8 or a floating dtype; rank None: no low-rank component. t may be a
    tuple of leading dimensions. All 16 nibbles and all of -127 .. 127 occur."""
    g = torch.Generator(device).manual_seed(seed)
    lead = t if isinstance(t, tuple) else (t,)

    def packed(rows, columns):
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g, device=device)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    x, x_scale = normal(*lead, k).to(operand if operand.is_floating_point else dtype), None
    if operand == torch.int8:
        x = torch.randint(-127, 128, (*lead, k), generator=g, device=device, dtype=torch.int8)
        x_scale = torch.rand(*lead, 1, generator=g, device=device) * 0.02 + 0.002
    scale, unit = grid_scales(n, k // group, 0.02, g, device)
    if not grid:
        scale, unit = ((torch.rand(n, k // group, generator=g, device=device) + 0.1) * 0.02).bfloat16(), None
    low_rank = (None, None, None)
    if rank is not None:
        up_scale = ((torch.rand(n, 1, generator=g, device=device) + 0.1) * 0.05).bfloat16()
        low_rank = (normal(*lead, rank).to(dtype), packed(n, rank), up_scale)
    b = normal(n).bfloat16() if bias else None
    added = normal(*lead, n).to(dtype) if addend else None
    return (x, x_scale, low_rank[0], packed(n, k), scale, unit, *low_rank[1:], b, added, dtype)
