"""Triton kernels of ``tqcompile::prologue``: norm or gate, transform, quantization and down projection.

``_rows`` holds one token on chip from load to store. Few tokens: P programs share a token; each repeats its (cheap)
norm and quantization, computes R / P values of t, and the first stores the rest. So there is one launch, nothing
waits for another program, and the order of every sum is fixed. Many tokens: one program each, without t, and
``low_rank`` multiplies the stored operand with ``down`` on tensor cores.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tqcompile.kernels.low_rank import run_low_rank
from tqcompile.kernels.quantize_activation import ROTATION_BLOCKS
from tqcompile.kernels.spare_rows import empty_with_spare_rows
from tqcompile.kernels.token_t import down_rows, in_planes, t_values, words_of
from tqcompile.kernels.twin_linear import (
    FLOATS,
    INTERPRET,
    MAX_RANK,
    _gpu,
    _group_reason,
    _round_to_4_bits,
    device_reason,
    round_to,
)
from tqcompile.ops.prologue import keeps_wide
from tqcompile.ops.twin_gemm import is_deferred

MAX_K = 32768
_ROW_PROGRAMS = 128  # programs that fill the GPU; more would only repeat more work
_MOST_ROWS = {True: 32, False: 16}  # tokens up to which the repeated work costs less than a second launch, of words,
_MOST_REPEATED = {True: 2**18, False: 2**17}  # if their values are no more than this
_LEAST_APART = 8 * 8192  # values of all tokens from which programs that share a token gain, where they can
# That, as many programs as gain, and their warps, for K above 8192: with more warps lattice_linear begins later.
_APART_OF_LONG_ROWS = (3 * 8192, 256, 2)


@triton.jit
def _load(at, mask, EXACT: tl.constexpr):
    """Values at pointers; EXACT: all of them exist."""
    return tl.load(at) if EXACT else tl.load(at, mask=mask, other=0)


@triton.jit
def _store(at, value, mask, WHOLE: tl.constexpr):
    """WHOLE: all of it."""
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def _widened(v, INTERPRET: tl.constexpr):
    """To fp32. In front of the ``to`` of 16-bit floats the compiler changes the layout for each reader of what is
    computed from it, and so computes it once for each."""
    if INTERPRET or v.dtype == tl.float32:
        return v.to(tl.float32)
    kind: tl.constexpr = "bf16" if v.dtype == tl.bfloat16 else "f16"
    return tl.inline_asm_elementwise("cvt.f32." + kind + " $0, $1;", "=f,h", [v], tl.float32, True, 1)


@triton.jit
def _flat(x):
    """All values in one dimension, in any order: one reduction in place of two."""
    return tl.reshape(x, [x.shape[0] * x.shape[1]], can_reorder=True)


@triton.jit
def _norm(x, gain, K, eps, INTERPRET: tl.constexpr):
    """RMSNorm of one token in the dtype of x, rounded where transformers rounds."""
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.div_rn(tl.sum(_flat(wide * wide)), K.to(tl.float32)) + eps)
    normed = round_to(wide * inverse, x.dtype, INTERPRET).to(tl.float32)
    return round_to(gain.to(tl.float32) * normed, x.dtype, INTERPRET)


@triton.jit
def _gate(x, other, INTERPRET: tl.constexpr):
    """silu(x) * other in the dtype of x, rounded after each."""
    wide = x.to(tl.float32)
    if INTERPRET:
        gate = wide / (1.0 + tl.exp(-wide))
    else:  # x / (1 + 2^(-x log2 e)) in five instructions; tl.exp and the division spend as many on denormals
        gate = tl.inline_asm_elementwise(
            """{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e; }""",
            "=f,f", [wide], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    gate = round_to(gate, x.dtype, INTERPRET).to(tl.float32)
    return round_to(gate * other.to(tl.float32), x.dtype, INTERPRET)


@triton.jit
def _token(
    token, row0, first, x, other, g, s, turn, operand, operand_scale, q8, q8_scale, h,
    K, x_stride, other_stride, eps, act_ratio,
    ROWS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr,
    KEEP8: tl.constexpr, KIND: tl.constexpr, HAS_OTHER: tl.constexpr, SCALE: tl.constexpr, ROTATE: tl.constexpr,
    PLANES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Everything but t of a token's rows from row0 on, stored where ``first``. Returns two planes (ROWS, COLS / 2) and
    the scale. g, s, turn: values of gain, input_scale and rotation. WHOLE: EXACT, and ``first`` is true."""
    half: tl.constexpr = COLS // 2
    row = row0 + tl.arange(0, ROWS)[:, None]
    at = row * COLS + tl.arange(0, COLS)[None, :]
    pair = row * half + tl.arange(0, half)[None, :]
    live = at < K
    v = _load(x + token * x_stride + at, live, EXACT)
    if HAS_OTHER:
        o = _load(other + token * other_stride + at, live, EXACT)
    if KIND == "rms_norm":
        if HAS_OTHER:
            v = round_to(v.to(tl.float32) + o.to(tl.float32), x.dtype.element_ty, INTERPRET)
            _store(h + token * K + at, v, live & first, WHOLE)
        v = _norm(v, g, K, eps, INTERPRET)
    elif KIND == "silu_mul":
        v = _gate(v, o, INTERPRET)
    if SCALE:
        v = round_to(v.to(tl.float32) * s.to(tl.float32), x.dtype.element_ty, INTERPRET)
    if ROTATE:
        if INTERPRET:  # the interpreter's bf16 dot is wrong
            v, turn = v.to(tl.float32), turn.to(tl.float32)
        # Transposed: the token's values are then the operand that tensor cores read from shared memory, and the
        # compiler does not move their change of layout up to the loads, where one load would wait for the other.
        v = tl.trans(tl.dot(tl.trans(turn), tl.trans(v)))
    v = _widened(v, INTERPRET)

    scale = 1.0
    if BITS == 16:
        v = round_to(v, x.dtype.element_ty, INTERPRET).to(tl.float32)
        even, odd = tl.split(v.reshape(ROWS, half, 2))
        planes, store = token * K + pair, (pair < K // 2) & first
        if PLANES:
            _store(operand + planes, round_to(even, x.dtype.element_ty, INTERPRET), store, WHOLE)
            _store(operand + planes + K // 2, round_to(odd, x.dtype.element_ty, INTERPRET), store, WHOLE)
        else:
            _store(operand + token * K + at, round_to(v, x.dtype.element_ty, INTERPRET), live & first, WHOLE)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(_flat(tl.abs(v))), 1e-30), 127.0)
        # One division a token, not one a value: off by an ulp, as a sum in another order is. Adding 1.5 * 2**23
        # leaves the integer, rounded to nearest even, in the low bits. No value exceeds 127.
        q = (v * tl.div_rn(1.0, scale) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        even, odd = tl.split(q.reshape(ROWS, half, 2))
        planes, store = token * K + pair, (pair < K // 2) & first
        if BITS == 8 or KEEP8:
            _store(q8 + planes, even.to(tl.int8), store, WHOLE)
            _store(q8 + planes + K // 2, odd.to(tl.int8), store, WHOLE)
            tl.store(q8_scale + token, scale, mask=first)
        if BITS == 4:
            _store(operand + planes, _round_to_4_bits(even, act_ratio, INTERPRET), store, WHOLE)
            _store(operand + planes + K // 2, _round_to_4_bits(odd, act_ratio, INTERPRET), store, WHOLE)
            tl.store(operand_scale + token, tl.div_rn(scale, act_ratio), mask=first)
    return even, odd, scale


@triton.jit(do_not_specialize=["T"])
def _rows(
    x, other, gain, input_scale, rotation, down, down_scale, operand, operand_scale, q8, q8_scale, t, h,
    T, K, R, x_stride, other_stride, turn_stride, turn_step, eps, act_ratio,
    P: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, BITS: tl.constexpr, KEEP8: tl.constexpr,
    KIND: tl.constexpr, HAS_OTHER: tl.constexpr, SCALE: tl.constexpr, ROTATE: tl.constexpr, PLANES: tl.constexpr,
    WORDS: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RP > 0: program p of the P of a token computes RP values of t from p * RP on, STEP at a time.
    RP 0: without t; P more than 1 programs share a token's rows where none needs the others'."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # twin_gemm may start; it waits by itself for what is stored here
    row0 = tl.program_id(0) % P * ROWS if RP == 0 else 0
    row = row0 + tl.arange(0, ROWS)[:, None]
    at = row * COLS + tl.arange(0, COLS)[None, :]
    # What is asked for before the token is there when the token has been reduced.
    if RP > 0:
        token = (tl.program_id(0) // P).to(tl.int64)
        part = tl.program_id(0) % P
        r = part * RP + tl.arange(0, STEP)
        d, ds = down_rows(down, down_scale, r, row, K, R, COLS, GROUP, WORDS)
    g, s, turn = gain, input_scale, rotation
    if KIND == "rms_norm":
        g = _load(gain + at, at < K, EXACT)
    if SCALE:
        s = _load(input_scale + at, at < K, EXACT)
    if ROTATE:
        turn = tl.load(rotation + tl.arange(0, COLS)[:, None] * turn_stride + tl.arange(0, COLS)[None, :] * turn_step)
        turn = round_to(turn.to(tl.float32), x.dtype.element_ty, INTERPRET)
    if PDL:
        tl.extra.cuda.gdc_wait()  # x comes from the kernel before; weights, gains and the rotation do not
    if RP > 0:
        even, odd, scale = _token(
            token, 0, part == 0, x, other, g, s, turn, operand, operand_scale, q8, q8_scale, h,
            K, x_stride, other_stride, eps, act_ratio,
            ROWS, COLS, EXACT, False, BITS, KEEP8, KIND, HAS_OTHER, SCALE, ROTATE, PLANES, INTERPRET,
        )  # fmt: skip
        if WORDS:
            even, odd = words_of(even, INTERPRET), words_of(odd, INTERPRET)
        limit = tl.minimum(R, part * RP + RP)
        for _ in tl.range(0, RP, STEP, num_stages=1):
            now, s_now = d, ds
            if STEP < RP:  # the next rows, while these are multiplied
                d, ds = down_rows(down, down_scale, r + STEP, row, K, limit, COLS, GROUP, WORDS)
            value = t_values(now, s_now, even, odd, scale, GROUP % COLS == 0, BITS != 16, WORDS, INTERPRET)
            tl.store(t + token * R + in_planes(r, R), round_to(value, t.dtype.element_ty, INTERPRET), mask=r < limit)
            r += STEP
    else:
        _token(
            (tl.program_id(0) // P).to(tl.int64), row0, True,
            x, other, g, s, turn, operand, operand_scale, q8, q8_scale, h, K, x_stride, other_stride, eps, act_ratio,
            ROWS, COLS, EXACT, EXACT, BITS, KEEP8, KIND, HAS_OTHER, SCALE, ROTATE, PLANES, INTERPRET,
        )  # fmt: skip


class Plan(NamedTuple):
    """How a launch is cut. ``parts`` programs a token, ``ranks`` values of t each; 0 where t is a launch of its own, or
    where there is none and each of the parts has ``rows`` rows."""

    parts: int
    ranks: int
    step: int
    rows: int
    columns: int
    warps: int


def _in_words(k: int, group: int, columns: int, act_bits: int) -> bool:
    """Whether t is made of integers, and of words of down that lie in one group and one row."""
    return act_bits != 16 and (k | group | columns) % 8 == 0


def choose_plan(t: int, k: int, rank: int, group: int, block: int, act_bits: int = 8, apart: bool = False) -> Plan:
    """The plan for a shape, by rule; block is 0 without rotation, rank 0 without down. apart: nothing is summed or
    compared over the values of a token."""
    # Rows of one group, where no rotation asks for another width: one scale a row.
    columns = block or min(128, group & -group)
    rows = max(16, triton.next_power_of_2(-(-k // columns)))  # 16 rows are the smallest matrix of a dot
    if apart and rank == 0:
        least, most, few = (_LEAST_APART, _ROW_PROGRAMS, 4) if k <= 8192 else _APART_OF_LONG_ROWS
        if t * k > least and t * (rows // 16) <= most:
            return Plan(-(-k // (16 * columns)), 0, 1, 16, columns, few)
    warps = 4 if rows * columns <= 2048 else 8 if rows * columns <= 8192 else 16
    words = _in_words(k, group, columns, act_bits)
    if rank == 0 or ((t > _MOST_ROWS[words] or t * k > _MOST_REPEATED[words]) and group % 64 == 0):
        return Plan(1, 0, 1, rows, columns, warps)
    padded = triton.next_power_of_2(rank)
    ranks = max(padded * t // _ROW_PROGRAMS, 1 if rows * columns > 8192 else 2)
    ranks = min(triton.next_power_of_2(ranks), padded)
    # At most 16 bytes or words of down a thread at a time, and as many on their way: more would not stay in registers.
    step = max(1, min(ranks, (4096 if words else 1024) * warps // (rows * columns)))
    return Plan(padded // ranks, ranks, step, rows, columns, warps)


def unsupported(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes=True, defer_from=0
) -> str | None:
    """Why :func:`launch` cannot serve these arguments (those of ``tqcompile::prologue``), or None."""
    reason = device_reason(x.device)
    if reason:
        return reason
    if any(a is not None and a.device != x.device for a in (other, gain, input_scale, rotation, down, down_scale)):
        return "all tensors must be on one device"
    if x.dtype not in FLOATS or x.dim() == 0:
        return f"x must be float32, float16 or bfloat16 with a last dimension, got {x.dtype}"
    k = x.shape[-1]
    if k == 0 or k % 2 or k > MAX_K:
        return f"K must be even and at most {MAX_K}, got {k}"
    for name, value, shape in (("other", other, x.shape), ("gain", gain, (k,))):
        if value is not None and (value.dtype != x.dtype or value.shape != shape):
            return f"{name} must be {tuple(shape)} of the dtype of x, got {value.dtype} {tuple(value.shape)}"
    if input_scale is not None and (input_scale.shape != (k,) or input_scale.dtype not in FLOATS):
        return f"input_scale must be ({k},) floating point, got {tuple(input_scale.shape)}"
    if rotation is not None:
        b = rotation.shape[0]
        if b not in ROTATION_BLOCKS or k % b or rotation.shape != (b, b) or not rotation.is_floating_point():
            return f"rotation must be (b, b), b in {ROTATION_BLOCKS} dividing K={k}, got {tuple(rotation.shape)}"
        if x.dtype == torch.float32:
            return "a float32 rotation does not run on tensor cores"
    if down is None:
        return None
    r = down.shape[0]
    if down.dtype != torch.uint8 or down.dim() != 2 or down.shape[1] != k // 2 or not 2 <= r <= MAX_RANK:
        return f"down must be uint8 (2 to {MAX_RANK}, {k}/2), got {down.dtype} {tuple(down.shape)}"
    if not (down.is_contiguous() and down_scale.is_contiguous()):
        return "down and down_scale must be contiguous"
    return _group_reason("down", k, down_scale, r)


def launch(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes=True, defer_from=0,
    plan=None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Run the kernels on arguments for which :func:`unsupported` returned None.

    Args: those of ``tqcompile::prologue``; ``plan`` overrides :func:`choose_plan` (tests, tuning).
    Returns: operand, operand_scale, t, h, wide.
    """
    lead, k = x.shape[:-1], x.shape[-1]
    rank = 0 if down is None else down.shape[0]
    stream = kind == "rms_norm" and other is not None
    operand = empty_with_spare_rows(x, (*lead, k), x.dtype if act_bits == 16 else torch.int8)
    operand_scale = x.new_empty(0 if act_bits == 16 else (*lead, 1), dtype=torch.float32)
    t, h = x.new_empty((*lead, rank)), x.new_empty((*lead, k) if stream else 0)
    keep = keeps_wide(down, act_bits, defer_from)
    wide = empty_with_spare_rows(x, (*lead, k), torch.int8) if keep else x.new_empty(0, dtype=torch.int8)
    deferred = is_deferred(x, defer_from)
    if deferred:
        down = down_scale = None
    eight = (wide, torch.empty_like(operand_scale)) if keep and deferred else None
    if operand.numel():
        args = (_as_rows(x), None if other is None else _as_rows(other), gain, input_scale, rotation)
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            args += (down, down_scale, kind, eps, act_bits, act_ratio, planes)
            _run(*args, operand, operand_scale, t, h, eight, plan)
    return operand, operand_scale, t, h, wide


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (T, K), without a copy where the rows have one stride."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _run(
    x, other, gain, input_scale, rotation, down, down_scale, kind, eps, act_bits, act_ratio, planes,
    operand, operand_scale, t, h, eight, plan,
) -> None:  # fmt: skip
    """eight: where the 8-bit integers and their scale go beside 4-bit ones, or None."""
    tokens, k = x.shape
    rank = 0 if down is None else down.shape[0]
    group = k // down_scale.shape[1] if rank else 128
    separate = act_bits == 16 and kind != "rms_norm"
    block = 0 if rotation is None else rotation.shape[0]
    plan = plan or choose_plan(tokens, k, rank, group, block, act_bits, separate)
    apart = rank > 0 and plan.ranks == 0
    words = plan.ranks > 0 and _in_words(k, group, plan.columns, act_bits)
    if apart and act_bits == 4:
        eight = torch.empty_like(operand), torch.empty_like(operand_scale)
    q8, q8_scale = eight or (operand, operand_scale)
    # Programmatic dependent launch: this kernel starts before the one in front has ended, and twin_gemm before this.
    dependent = x.is_cuda and _gpu(x.device.index).major >= 9
    launch_options = {"launch_pdl": True} if dependent else {}
    nothing = x  # stands for tensors that are not read
    _rows[(tokens * plan.parts,)](
        x, nothing if other is None else other, nothing if gain is None else gain.contiguous(),
        nothing if input_scale is None else input_scale.contiguous(),
        nothing if rotation is None else rotation,
        (down.view(torch.int32) if words else down) if rank else nothing, down_scale if rank else nothing,
        operand, operand_scale, q8, q8_scale, t, h,
        tokens, k, rank, x.stride(0), 0 if other is None else other.stride(0),
        *((0, 0) if rotation is None else rotation.stride()), float(eps), float(act_ratio),
        P=plan.parts, RP=plan.ranks, STEP=plan.step, GROUP=group,
        ROWS=plan.rows, COLS=plan.columns, EXACT=plan.rows * plan.columns * (1 if plan.ranks else plan.parts) == k,
        BITS=act_bits, KEEP8=eight is not None, KIND=kind, HAS_OTHER=other is not None,
        SCALE=input_scale is not None, ROTATE=rotation is not None, PLANES=planes, WORDS=words, INTERPRET=INTERPRET,
        PDL=dependent,
        num_warps=plan.warps, **launch_options,
    )  # fmt: skip
    if apart:
        sms = _gpu(x.device.index).multi_processor_count if x.is_cuda else 16
        run_low_rank(q8, q8_scale, down, down_scale, t, sms, dependent)
