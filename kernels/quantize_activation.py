"""Triton kernel of ``tqcompile::quantize_activation``: scale, rotate and quantize one token per program.

A row of up to ``_MAX_CHUNK`` channels is held on chip from load to store. A longer one is walked twice, and
the second walk recomputes the rotation: that costs less than a float32 round trip through global memory.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.twin_linear import FLOATS, INTERPRET, device_reason, round_to

ROTATION_BLOCKS = (16, 32, 64, 128)
_MAX_CHUNK = 16384


@triton.jit
def _scaled(x_row, input_scale, at, K, SCALE: tl.constexpr, INTERPRET: tl.constexpr):
    """Channels ``at`` of a token times input_scale, in the dtype of x (fp32 in the interpreter); 0 past K."""
    h = tl.load(x_row + at, mask=at < K, other=0.0)
    if SCALE:
        # Rounded to the dtype of x, as the definition says, also where no rotation follows.
        h = h.to(tl.float32) * tl.load(input_scale + at, mask=at < K, other=0.0)
        h = round_to(h, x_row.dtype.element_ty, INTERPRET)
    if INTERPRET:
        h = h.to(tl.float32)  # the interpreter's bf16 dot is wrong
    return h


@triton.jit
def _transformed(
    x_row, input_scale, rotation, start, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, SLICE: tl.constexpr,
    SCALE: tl.constexpr, ROTATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Channels start .. start + ROWS * COLS of a token, transformed, fp32 (ROWS, COLS); 0 past K."""
    row, col = start + tl.arange(0, ROWS)[:, None] * COLS, tl.arange(0, COLS)
    if ROTATE:
        h = tl.zeros((ROWS, COLS), tl.float32)
        for j in range(0, COLS, SLICE):
            inner = j + tl.arange(0, SLICE)
            part = _scaled(x_row, input_scale, row + inner[None, :], K, SCALE, INTERPRET)
            turn = tl.load(rotation + inner[:, None] * COLS + col[None, :])
            h += tl.dot(part, turn.to(part.dtype), input_precision="ieee")
    else:
        h = _scaled(x_row, input_scale, row + col[None, :], K, SCALE, INTERPRET).to(tl.float32)
    return h


@triton.jit
def _store_quantized(h, scale, q_row, start, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    # Adding and taking away 1.5 * 2**23 rounds to integers, ties to even.
    q = (tl.div_rn(h, scale) + 12582912.0) - 12582912.0
    q = tl.minimum(tl.maximum(q, -127.0), 127.0)
    tl.store(q_row + at, q.to(tl.int8), mask=at < K)


@triton.jit
def _quantize(
    x, input_scale, rotation, x_q, x_scale, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, SLICE: tl.constexpr, CHUNKS: tl.constexpr,
    SCALE: tl.constexpr, ROTATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x (T, K) -> x_q (T, K) int8, x_scale (T,) fp32. COLS: the rotation's block, or the whole chunk."""
    token = tl.program_id(0).to(tl.int64)
    x_row, q_row = x + token * K, x_q + token * K
    SIZE: tl.constexpr = ROWS * COLS
    h = _transformed(x_row, input_scale, rotation, 0, K, ROWS, COLS, SLICE, SCALE, ROTATE, INTERPRET)
    top = tl.max(tl.max(tl.abs(h), axis=1), axis=0)
    for i in range(1, CHUNKS):
        h = _transformed(x_row, input_scale, rotation, i * SIZE, K, ROWS, COLS, SLICE, SCALE, ROTATE, INTERPRET)
        top = tl.maximum(top, tl.max(tl.max(tl.abs(h), axis=1), axis=0))
    scale = tl.div_rn(tl.maximum(top, 1e-30), 127.0)
    tl.store(x_scale + token, scale)
    # After the loop h is the last chunk: with one chunk, the only one.
    _store_quantized(h, scale, q_row, (CHUNKS - 1) * SIZE, K, ROWS, COLS)
    for i in range(CHUNKS - 1):
        h = _transformed(x_row, input_scale, rotation, i * SIZE, K, ROWS, COLS, SLICE, SCALE, ROTATE, INTERPRET)
        _store_quantized(h, scale, q_row, i * SIZE, K, ROWS, COLS)


def unsupported(x, input_scale, rotation) -> str | None:
    """Why :func:`launch` cannot serve these arguments of ``tqcompile::quantize_activation``, or None."""
    reason = device_reason(x.device)
    if reason:
        return reason
    if any(a is not None and a.device != x.device for a in (input_scale, rotation)):
        return "all tensors must be on one device"
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] == 0:
        return f"x must be float32, float16 or bfloat16 with a last dimension, got {x.dtype} {tuple(x.shape)}"
    k = x.shape[-1]
    if input_scale is not None and (input_scale.shape != (k,) or input_scale.dtype not in FLOATS):
        return f"input_scale must be ({k},) floating point, got {tuple(input_scale.shape)}"
    if rotation is not None:
        b = rotation.shape[0] if rotation.dim() == 2 and rotation.shape[0] == rotation.shape[1] else 0
        if b not in ROTATION_BLOCKS or k % b or not rotation.is_floating_point():
            return f"rotation must be (b, b), b in {ROTATION_BLOCKS} dividing K={k}, got {tuple(rotation.shape)}"
    return None


def launch(x, input_scale, rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on arguments for which :func:`unsupported` returned None.

    Args: those of ``tqcompile::quantize_activation``; x (..., K).
    Returns: x_q (..., K) int8 and x_scale (..., 1) float32.
    """
    x_q = x.new_empty(x.shape, dtype=torch.int8)
    x_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _run(x, input_scale, rotation, x_q, x_scale)
    return x_q, x_scale


class Chunk(NamedTuple):
    """A chunk of rows * columns channels; ``slice`` of a block's channels enter one step of the rotation."""

    rows: int
    columns: int
    slice: int
    chunks: int
    warps: int


def choose_chunk(k: int, dtype: torch.dtype, block: int) -> Chunk:
    """How K channels are walked, by rule; block is 0 without rotation."""
    # fp32 products do not run on tensor cores: short slices and small chunks keep them in registers.
    wide = block > 0 and dtype == torch.float32
    most = 4096 if wide else _MAX_CHUNK if k <= _MAX_CHUNK else _MAX_CHUNK // 2
    # 16 rows are the smallest matrix of a dot.
    chunk = max(min(triton.next_power_of_2(k), most), 16 * block, 128)
    columns = block or chunk
    warps = 8 if chunk >= 4096 else 4
    return Chunk(chunk // columns, columns, 16 if wide else columns, -(-k // chunk), warps)


def _run(x, input_scale, rotation, x_q, x_scale) -> None:
    k = x.shape[-1]
    if x.numel() == 0:
        return
    chunk = choose_chunk(k, x.dtype, 0 if rotation is None else rotation.shape[0])
    _quantize[(x.numel() // k,)](
        x.contiguous(), x if input_scale is None else input_scale.contiguous(),
        x if rotation is None else rotation.to(x.dtype).contiguous(), x_q, x_scale, k,
        ROWS=chunk.rows, COLS=chunk.columns, SLICE=chunk.slice, CHUNKS=chunk.chunks,
        SCALE=input_scale is not None, ROTATE=rotation is not None, INTERPRET=INTERPRET,
        num_warps=chunk.warps,
    )  # fmt: skip
