"""``tqcompile::twin_gemm``: the matrix products of a two-component linear, after ``prologue`` has made its operands.

    y = (operand @ residual^T) * operand_scale + t @ up^T + bias + addend

Together with ``prologue`` it is ``twin_linear`` for a GPU: the rank-R intermediate t is computed once per token
and not once per tile of N, and the operand is already what the tensor core reads. Operand and t come in plane
order, because a byte of the canonical 4-bit layout (ops/packing.py) holds an even and an odd channel: its low
nibbles are one plane of K/2 channels, its high nibbles the other.
"""

import torch

from tqcompile.ops.dispatch import kernel_or_reason
from tqcompile.ops.packing import dequantize_int4


def to_planes(values: torch.Tensor) -> torch.Tensor:
    """(..., K), K even, in natural order -> plane order: channels 0, 2, 4, ..., then 1, 3, 5, ..."""
    return torch.cat((values[..., 0::2], values[..., 1::2]), -1)


def from_planes(planes: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`to_planes`."""
    return torch.stack(planes.tensor_split(2, -1), -1).flatten(-2)


def defer_from_of(n: int, k: int) -> int:
    """Number of tokens from which ``twin_gemm`` makes t of an (N, K) layer beside its own product: where a Hopper GPU
    takes its ``narrow`` or ``wgmma`` kernel (kernels/twin_gemm.py). A ``prologue`` of fewer tokens makes t in its one
    launch."""
    weights = n * k
    return 33 if weights <= 2**24 else 17 if weights < 2**25 else 9


def is_deferred(operand: torch.Tensor, defer_from: int) -> bool:
    """Whether ``prologue`` leaves t of these (..., K) tokens to ``twin_gemm``."""
    return 0 < defer_from <= operand.shape[:-1].numel()


def twin_gemm_reference(
    operand: torch.Tensor,
    operand_scale: torch.Tensor | None,
    t: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor,
    channel_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    dtype: torch.dtype,
    down: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    defer_from: int = 0,
    wide: torch.Tensor | None = None,
    wide_ratio: float = 0.0,
) -> torch.Tensor:
    """Plain-torch definition of the op; also the CPU kernel. See :func:`twin_gemm`."""
    y = torch.matmul(from_planes(operand).float(), dequantize_int4(residual, residual_scale).t())
    if operand_scale is not None:
        y = y * operand_scale
    if down is not None and is_deferred(operand, defer_from):
        of_t, scale = (operand, operand_scale) if wide is None else (wide, operand_scale * wide_ratio)
        low = torch.matmul(from_planes(of_t).float(), dequantize_int4(down, down_scale).t())
        t = to_planes((low if scale is None else low * scale).to(t.dtype))
    if t is not None:
        y = y + torch.matmul(from_planes(t).float(), dequantize_int4(up, up_scale).t())
    if bias is not None:
        y = y + bias.float()
    if addend is not None:
        y = y + addend.float()
    return y.to(dtype)


@torch.library.custom_op("tqcompile::twin_gemm", mutates_args=())
def twin_gemm(
    operand: torch.Tensor,
    operand_scale: torch.Tensor | None,
    t: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor,
    channel_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    dtype: torch.dtype,
    down: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    defer_from: int = 0,
    wide: torch.Tensor | None = None,
    wide_ratio: float = 0.0,
) -> torch.Tensor:
    """Residual product, up projection of t, bias and addend, rounded once at the end.

    Args:
        operand: (..., K) in plane order, int8 with ``operand_scale``, or float32/float16/bfloat16 without.
        operand_scale: (..., 1) float32, or None for a floating-point operand.
        t: (..., R) floating point, the rank-R intermediate, in plane order. None together with ``up``: no low-rank
            component.
        residual: (N, K/2) packed int4; residual_scale: (N, K/g) floating point.
        channel_scale: (N,) float32, or None. A promise that ``residual_scale`` is exactly channel_scale times an
            integer in 1 .. 16, so that a kernel may sum in int32 over all of K. The result does not depend on it.
        up: (N, R/2) packed int4; up_scale: (N, R/g'').
        bias: (N,) or None.
        addend: (..., N), the residual stream, or None.
        dtype: dtype of the result.
        down, down_scale, defer_from: those of the ``prologue`` that made operand and t, or None, None and 0. From
            ``defer_from`` tokens on, if that is not 0, the values of t are not read but made here, from the operand.
        wide: of the same ``prologue``, (..., K) int8, where the operand has 4 bits: what t is made from instead.
        wide_ratio: its ``act_ratio``, with ``wide``; else 0.
    Returns:
        (..., N) of ``dtype``.
    """
    args = (operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype)
    return twin_gemm_reference(*args, down, down_scale, defer_from, wide, wide_ratio)


@twin_gemm.register_kernel("cuda")
def _(
    operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
    down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0,
):  # fmt: skip
    args = (
        operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
        down, down_scale, defer_from, wide, wide_ratio,
    )  # fmt: skip
    launch = kernel_or_reason("twin_gemm", *args)
    return (launch or twin_gemm_reference)(*args)


@twin_gemm.register_fake
def _(
    operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
    down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0,
):  # fmt: skip
    k, n, rows = operand.shape[-1], residual.shape[0], operand.shape[:-1]
    integer = operand.dtype == torch.int8
    torch._check(integer == (operand_scale is not None), lambda: "int8 operand comes with operand_scale, float without")
    torch._check(residual.dtype == torch.uint8, lambda: f"residual must be uint8, got {residual.dtype}")
    torch._check(residual.shape[1] * 2 == k, lambda: f"residual must be ({n}, {k}/2)")
    torch._check(residual_scale.shape[0] == n, lambda: f"residual_scale must have {n} rows")
    torch._check(k % residual_scale.shape[1] == 0, lambda: "residual_scale: groups must divide K")
    torch._check((t is None) == (up is None) == (up_scale is None), lambda: "t, up and up_scale come together")
    if t is not None:
        r = t.shape[-1]
        torch._check(t.shape[:-1] == rows, lambda: f"t must have the leading dimensions {tuple(rows)}")
        torch._check(up.shape == (n, r // 2), lambda: f"up must be ({n}, {r}/2), got {tuple(up.shape)}")
        if down is not None:
            torch._check(down.shape == (r, k // 2), lambda: f"down must be ({r}, {k}/2), got {tuple(down.shape)}")
    torch._check((down is None) == (down_scale is None), lambda: "down and down_scale come together")
    torch._check(down is None or t is not None, lambda: "down without t")
    torch._check((wide is None) == (wide_ratio == 0), lambda: "wide and wide_ratio come together")
    if wide is not None:
        torch._check(down is not None and integer, lambda: "wide is for t of an int8 operand")
        torch._check(
            wide.shape == operand.shape, lambda: f"wide must be {tuple(operand.shape)}, got {tuple(wide.shape)}"
        )
        torch._check(wide.dtype == torch.int8, lambda: f"wide must be int8, got {wide.dtype}")
    for name, vector in (("channel_scale", channel_scale), ("bias", bias)):
        if vector is not None:
            torch._check(vector.shape == (n,), lambda name=name: f"{name} must be ({n},)")
    if addend is not None:
        torch._check(addend.shape == (*rows, n), lambda: f"addend must be {(*rows, n)}, got {tuple(addend.shape)}")
    return operand.new_empty((*rows, n), dtype=dtype)
