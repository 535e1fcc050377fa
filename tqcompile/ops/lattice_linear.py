"""``tqcompile::lattice_linear``: a linear layer with 2-bit or 3-bit codes and floating-point activations.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g] / 32 + offset[k mod d])        g the group of column k
    y       = x @ w^T + bias

A weight is a point of an integer lattice, shifted and scaled. A lattice with another basis, w = scale * T (code +
offset) for every d columns, is the same product with T applied to x in front (x_k -> T^T x_k), where it is a part of
the rotation that is applied there anyway: the op itself multiplies by plain small integers.
"""

import torch

from tqcompile.ops.dispatch import kernel_or_reason
from tqcompile.ops.packing import unpack_codes

ZERO_STEPS = 32  # zero points are stored in steps of 1/32 of a code


def dequantize_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offset: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """(N, K) float32 weights of packed codes; arguments as in :func:`lattice_linear`."""
    grouped = unpack_codes(codes, bits).float().unflatten(-1, (scale.shape[1], -1))
    if zero is not None:
        grouped = grouped - zero.float().unsqueeze(-1) / ZERO_STEPS
    if offset is not None:
        grouped = (grouped.unflatten(-1, (-1, offset.shape[0])) + offset).flatten(-2)
    return (grouped * scale.float().unsqueeze(-1)).flatten(-2)


def lattice_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`lattice_linear`."""
    y = torch.matmul(x.float(), dequantize_codes(codes, scale, zero, offset, bits).t())
    return (y if bias is None else y + bias.float()).to(x.dtype)


def mix_outputs(
    y: torch.Tensor, rotation: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What follows the product of a layer whose rows were rotated: (..., N) -> (..., N), dtype of y.

    rotation: (b, b), applied to each block of b outputs; scale, bias: (N,).
    """
    y = torch.matmul(y.unflatten(-1, (-1, rotation.shape[0])), rotation.to(y.dtype)).flatten(-2) * scale.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


@torch.library.custom_op("tqcompile::lattice_linear", mutates_args=())
def lattice_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """Linear layer on integer codes below four bits.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        codes: (N, K * bits / 8) uint8, see ``packing.pack_codes``; bits: 2 or 3.
        scale: (N, K/g) floating point. zero: (N, K/g) uint8 in steps of 1/32, or None for 0.
        offset: (d,) float32, d divides g, or None for 0.
        bias: (N,) or None.
    Returns:
        (..., N) in the dtype of x, summed in float32.
    """
    return lattice_linear_reference(x, codes, scale, zero, offset, bias, bits)


@lattice_linear.register_kernel("cuda")
def _(x, codes, scale, zero, offset, bias, bits):
    launch = kernel_or_reason("lattice_linear", x, codes, scale, zero, offset, bias, bits)
    return (launch or lattice_linear_reference)(x, codes, scale, zero, offset, bias, bits)


@lattice_linear.register_fake
def _(x, codes, scale, zero, offset, bias, bits):
    n, k = codes.shape[0], x.shape[-1]
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    torch._check(bits in (2, 3), lambda: f"bits must be 2 or 3, got {bits}")
    torch._check(codes.dtype == torch.uint8, lambda: f"codes must be uint8, got {codes.dtype}")
    torch._check(codes.shape[1] * 8 == k * bits, lambda: f"codes must be ({n}, {k} * {bits} / 8)")
    torch._check(scale.shape[0] == n, lambda: f"scale must have {n} rows")
    torch._check(k % scale.shape[1] == 0, lambda: "scale: groups must divide K")
    if zero is not None:
        torch._check(zero.shape == scale.shape, lambda: f"zero must be {tuple(scale.shape)}")
        torch._check(zero.dtype == torch.uint8, lambda: f"zero must be uint8, got {zero.dtype}")
    if offset is not None:
        d = offset.shape[0]
        torch._check(k // scale.shape[1] % d == 0, lambda: f"an offset of {d} numbers must divide the groups")
    if bias is not None:
        torch._check(bias.shape == (n,), lambda: f"bias must be ({n},)")
    return x.new_empty((*x.shape[:-1], n))
