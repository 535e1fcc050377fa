"""``tqcompile::int8_linear``: an 8-bit weight-only linear layer, for the output head.

    y = x @ (weight * weight_scale)^T + bias

``weight`` is (N, K) int8 with a scale for every g consecutive elements of a row; x is not rounded.
"""

import torch

from tqcompile.ops.dispatch import kernel_or_reason


def int8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`int8_linear`."""
    grouped = weight.float().unflatten(-1, (weight_scale.shape[1], -1))
    y = torch.matmul(x.float(), (grouped * weight_scale.float().unsqueeze(-1)).flatten(-2).t())
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.custom_op("tqcompile::int8_linear", mutates_args=())
def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear layer with int8 weights and floating-point activations.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        weight: (N, K) int8; weight_scale: (N, K/g) floating point.
        bias: (N,) or None.
    Returns:
        (..., N) in the dtype of x, summed in float32.
    """
    return int8_linear_reference(x, weight, weight_scale, bias)


@int8_linear.register_kernel("cuda")
def _(x, weight, weight_scale, bias):
    launch = kernel_or_reason("int8_linear", x, weight, weight_scale, bias)
    return (launch or int8_linear_reference)(x, weight, weight_scale, bias)


@int8_linear.register_fake
def _(x, weight, weight_scale, bias):
    n, k = weight.shape
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    torch._check(weight.dtype == torch.int8, lambda: f"weight must be int8, got {weight.dtype}")
    torch._check(x.shape[-1] == k, lambda: f"weight must be ({n}, {x.shape[-1]})")
    torch._check(weight_scale.shape[0] == n, lambda: f"weight_scale must have {n} rows")
    torch._check(k % weight_scale.shape[1] == 0, lambda: "weight_scale: groups must divide K")
    if bias is not None:
        torch._check(bias.shape == (n,), lambda: f"bias must be ({n},)")
    return x.new_empty((*x.shape[:-1], n))
