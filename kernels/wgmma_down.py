"""Tiles of t = down x^T of ``twin_wgmma``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from tqcompile.kernels.wgmma_tiles import add_parts, advance, float_operand, give_t, int8_operand


@gluon.jit
def multiply_down(
    HALF: gl.constexpr, x_desc, ws, xs, full, empty, x_scale, low_ratio, down_scale, t, partials, counters, ready, slot,
    phase, tile, part, parts, steps, T, BM: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr,
    LOW: gl.constexpr, DOWN_STEPS: gl.constexpr,
):  # fmt: skip
    """A warpgroup's share of a part of a tile of t: 64 rows of down, half of the BM tokens. Returns slot and phase."""
    TOKENS: gl.constexpr = BM // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    mma16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    INT: gl.constexpr = x_desc.dtype == gl.int8
    weights16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
    weights: gl.constexpr = gl.DotOperandLayout(0, mma, 4) if INT else weights16
    n0, m0 = tile % LOW * 64, tile // LOW * BM
    begin, end = steps * part // parts, steps * (part + 1) // parts
    one = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, weights))
    r = n0 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    scale_at = down_scale + gl.minimum(r, R - 1) * (steps // DOWN_STEPS)
    s = gl.load(scale_at + begin // DOWN_STEPS)
    total = gl.zeros([64, TOKENS], gl.float32, mma)
    for step in range(begin, end):
        s_next = gl.load(scale_at + gl.minimum(step + 1, steps - 1) // DOWN_STEPS)
        mbarrier.wait(full.index(slot), phase)
        w = ws.index(2 * slot).load(weights)
        low, high = int8_operand(w, one, one) if INT else float_operand(w, one, one, x_desc.dtype)
        even = xs.index(2 * slot).slice(HALF * TOKENS, TOKENS).permute((1, 0))
        odd = xs.index(2 * slot + 1).slice(HALF * TOKENS, TOKENS).permute((1, 0))
        acc = gl.zeros([64, TOKENS], gl.int32, mma) if INT else gl.zeros([64, TOKENS], gl.float32, mma16)
        acc = warpgroup_mma(low, even, acc, use_acc=False, is_async=True)
        acc = warpgroup_mma(high, odd, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot), count=1)
        total += gl.convert_layout(acc.to(gl.float32), mma, assert_trivial=True) * gl.expand_dims(s.to(gl.float32), 1)
        s = s_next
        slot, phase = advance(slot, phase, STAGES)
    finish = True
    if parts > 1:
        counter = counters + 2 * tile + HALF
        finish, total = add_parts(total, 2 * tile * parts + HALF, part, parts, partials, counter, 2, BM)
    if finish:
        m = m0 + HALF * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, mma))
        give_t(total * low_ratio, m, r, x_scale, t, ready + tile // LOW, T, R, INT)
    return slot, phase
