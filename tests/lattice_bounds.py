"""Random arguments of ``lattice_linear``, and how far a result may be from the float64 one: for both kernel tests."""

import numpy as np
import torch

from tqcompile.ops.lattice_linear import ZERO_STEPS
from tqcompile.ops.packing import unpack_codes

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# (T, N, K, groups, bits, dtype, shift, bias): shift is "zero", "offset" or "none".
CASES = [
    (1, 40, 128, 1, 2, torch.bfloat16, "zero", True),
    (3, 130, 384, 3, 2, torch.bfloat16, "offset", False),
    (5, 70, 256, 4, 3, torch.bfloat16, "zero", True),
    (17, 33, 128, 1, 3, torch.float16, "offset", True),
    (2, 96, 192, 3, 2, torch.float32, "none", True),
    (9, 64, 256, 2, 3, torch.float32, "zero", False),
    (130, 50, 128, 2, 2, torch.bfloat16, "offset", True),
    (140, 45, 192, 1, 3, torch.bfloat16, "zero", False),
    (131, 30, 128, 1, 2, torch.float32, "zero", True),
]


def random_arguments(t, n, k, groups, bits, dtype, shift, bias, device="cpu", seed=0) -> tuple:
    g = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=g, device=device, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=g, device=device) * 0.1 + 0.01).to(torch.bfloat16)
    zero = offset = None
    if shift == "zero":
        zero = torch.randint(0, 32 << bits, (n, groups), generator=g, device=device).to(torch.uint8)
    if shift == "offset":
        offset = torch.randn(4, generator=g, device=device) - 1.5
    x = torch.randn(t, k, generator=g, device=device).to(dtype)
    return x, codes, scale, zero, offset, torch.randn(n, generator=g, device=device) if bias else None, bits


def worst(y, x, codes, scale, zero, offset, bias, bits, form="exact") -> float:
    """The largest error of ``y`` over its bound: one rounding of the result, and fp32 sums of the products of x with
    codes and with shifts (a tensor core may lose a bit an addition). form: "dense" and "wgmma" round the weights too,
    and "wgmma" what an offset adds to the middle of the codes, times the scale."""
    k, groups = x.shape[-1], scale.shape[1]
    wide, c = x.double(), unpack_codes(codes, bits).double()
    s = scale.double().repeat_interleave(k // groups, 1)
    shift = torch.zeros_like(c)
    if zero is not None:
        shift = -zero.double().repeat_interleave(k // groups, 1) / ZERO_STEPS
    if offset is not None:
        shift = offset.double().repeat(k // len(offset)).expand_as(c)
    exact = wide @ ((c + shift) * s).t()
    size = wide.abs() @ ((c + shift.abs()) * s).t()
    bound = (k // 16 + 40) * 2.0**-23 * size
    rounded_weights = form in ("dense", "wgmma")
    if form == "wgmma" and offset is not None:
        beyond = (offset.double() + ((1 << bits) - 1) / 2).abs().repeat(k // len(offset)).expand_as(c)
        bound = bound + EPS[x.dtype] / 2 * (wide.abs() @ (beyond * s).t())
    if rounded_weights:
        bound = bound + EPS[x.dtype] * (wide.abs() @ ((c + shift).abs() * s).t())
    if bias is not None:
        exact = exact + bias.double()
        # Written-out weights go through a product of one dtype, bias included.
        bound = bound + (EPS[x.dtype] if rounded_weights else 2.0**-24) * bias.double().abs()
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    bound = bound + (2 if rounded_weights else 1) * EPS[x.dtype] * (exact.abs() + bound)
    return float(np.max(((y.double() - exact).abs() / bound).cpu().numpy()))
