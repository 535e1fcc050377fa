"""``tqcompile::quantize_activation``: scale, rotate and quantize activations to int8, one scale per token.

    h = x * input_scale                    rounded to the dtype of x
    h = h[:, block] @ rotation             for every block of b consecutive channels
    x_scale = max|h| / 127                 per token
    x_q     = round_half_even(h / x_scale)

4-bit activations are derived from this by ``twin_linear`` (``act_ratio``), so one int8 tensor serves both the
low-rank branch, which always reads 8 bits, and a 4-bit residual.
"""

import torch

from tqcompile.ops.dispatch import kernel_or_reason


def transform_activation(
    x: torch.Tensor, input_scale: torch.Tensor | None, rotation: torch.Tensor | None
) -> torch.Tensor:
    """The on-line part of the learned transform, in plain torch: (..., K) -> (..., K), dtype of x.

    Args:
        x: (..., K) floating point.
        input_scale: (K,) float32 multiplier (the reciprocal of the smoothing scale), or None when absorbed.
        rotation: (b, b) matrix applied to each block of b channels, b divides K, or None.
    """
    if input_scale is not None:
        x = (x.float() * input_scale).to(x.dtype)
    if rotation is not None:
        blocks = x.unflatten(-1, (-1, rotation.shape[0]))
        x = torch.matmul(blocks, rotation.to(x.dtype)).flatten(-2)
    return x


def quantize_activation_reference(
    x: torch.Tensor, input_scale: torch.Tensor | None = None, rotation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`quantize_activation`."""
    # The rotated values stay in float32 until they are quantized, as in a fused kernel's accumulator.
    if input_scale is not None:
        x = (x.float() * input_scale).to(x.dtype)
    h = x.float()
    if rotation is not None:
        blocks = h.unflatten(-1, (-1, rotation.shape[0]))
        h = torch.matmul(blocks, rotation.to(x.dtype).float()).flatten(-2)
    scale = h.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127.0
    q = torch.round(h / scale).clamp(-127, 127).to(torch.int8)
    return q, scale


def check_transform(k: int, input_scale: torch.Tensor | None, rotation: torch.Tensor | None) -> None:
    """Refuse a scale or rotation that does not fit K channels; used by the fake kernels of all ops that transform."""
    if input_scale is not None:
        torch._check(input_scale.shape == (k,), lambda: f"input_scale must be ({k},)")
    if rotation is not None:
        b = rotation.shape[0]
        torch._check(rotation.dim() == 2 and rotation.shape[1] == b, lambda: "rotation must be square")
        torch._check(k % b == 0, lambda: f"rotation block {b} must divide K={k}")


@torch.library.custom_op("tqcompile::quantize_activation", mutates_args=())
def quantize_activation(
    x: torch.Tensor, input_scale: torch.Tensor | None = None, rotation: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform and quantize activations to int8 with one scale per token.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        input_scale: (K,) float32, or None.
        rotation: (b, b) floating point, b divides K; read in the dtype of x. Or None.
    Returns:
        x_q (..., K) int8 in [-127, 127] and x_scale (..., 1) float32; x is close to x_q * x_scale.
    """
    return quantize_activation_reference(x, input_scale, rotation)


@quantize_activation.register_kernel("cuda")
def _(x, input_scale=None, rotation=None):
    launch = kernel_or_reason("quantize_activation", x, input_scale, rotation)
    return (launch or quantize_activation_reference)(x, input_scale, rotation)


@quantize_activation.register_fake
def _(x, input_scale=None, rotation=None):
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    check_transform(x.shape[-1], input_scale, rotation)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
