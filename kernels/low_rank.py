"""Triton kernel of the down projection t = x @ down^T of stored operands, for ``prologue`` with many tokens."""

import torch
import triton
import triton.language as tl

from tqcompile.kernels.split_counters import split_counters
from tqcompile.kernels.token_t import in_planes
from tqcompile.kernels.twin_linear import INTERPRET, _form, _nibbles, round_to


@triton.jit
def _store_t(acc, x_scale, t, m, r, T, R, factor, INT: tl.constexpr, INTERPRET: tl.constexpr):
    if INT:
        acc *= (tl.load(x_scale + m, mask=m < T, other=0.0) * factor)[None, :]
    live = (m < T)[None, :] & (r < R)[:, None]
    at = t + m.to(tl.int64)[None, :] * R + in_planes(r, R)[:, None]
    tl.store(at, round_to(acc, t.dtype.element_ty, INTERPRET), mask=live)


@triton.jit(do_not_specialize=["T"])
def _low_rank(
    x, x_scale, down, down_scale, t, partials, counters, T, K, R, factor,
    GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    INT: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """t (T, R) of operands x (T, K), int8 or floating; both in plane order. Transposed: t^T = D x^T.
    S programs share a tile of BM tokens; the last to arrive adds their partials in order, as in ``twin_linear``."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile, split = tl.program_id(0) // S, tl.program_id(0) % S
    m = tile * BM + tl.arange(0, BM)
    r, byte = tl.arange(0, RP), tl.arange(0, BK // 2)
    m_live, r_live = m < T, r < R
    x_row = x + m.to(tl.int64)[:, None] * K
    d_at = down + r[:, None] * (K // 2) + byte[None, :]
    ds_at = down_scale + r * (K // GROUP)
    acc = tl.zeros((RP, BM), tl.float32)
    steps = K // BK
    for step in tl.range(steps * split // S, steps * (split + 1) // S):
        d = tl.load(d_at + step * (BK // 2), mask=r_live[:, None], other=0)
        ds = tl.load(ds_at + step * BK // GROUP, mask=r_live, other=0.0).to(tl.float32)
        even_at = x_row + step * (BK // 2) + byte[None, :]
        even = tl.load(even_at, mask=m_live[:, None], other=0)
        odd = tl.load(even_at + K // 2, mask=m_live[:, None], other=0)
        if INTERPRET and not INT:
            even, odd = even.to(tl.float32), odd.to(tl.float32)  # the interpreter's bf16 dot is wrong
        low, high = _nibbles(d.to(tl.int8, bitcast=True), FORM)
        if INT:
            part = tl.dot(low, even.T, out_dtype=tl.int32)
            part = tl.dot(high, odd.T, acc=part, out_dtype=tl.int32).to(tl.float32)
        else:
            part = tl.dot(low, even.T, input_precision="ieee")
            part = tl.dot(high, odd.T, acc=part, input_precision="ieee")
        acc += part * ds[:, None]
    if S == 1:
        _store_t(acc, x_scale, t, m, r, T, R, factor, INT, INTERPRET)
    else:
        block: tl.constexpr = RP * BM
        at = partials + tile * S * block + (r[:, None] * BM + tl.arange(0, BM)[None, :])
        tl.store(at + split * block, acc)
        if not INTERPRET:
            tl.debug_barrier()  # every thread's stores come before the one thread's release
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == S - 1:
            acc = tl.zeros((RP, BM), tl.float32)
            for i in tl.range(0, S, num_stages=1):
                # .cg: from L2, where the other programs' stores are, never from this SM's L1.
                acc += tl.load(at + i * block, cache_modifier=".cg")
            _store_t(acc, x_scale, t, m, r, T, R, factor, INT, INTERPRET)
            tl.store(counters + tile, 0)  # clean for the next launch and for graph replay


def choose_splits(tiles: int, steps: int, sms: int) -> int:
    """Programs that share a tile of ``_low_rank``: up to four on each SM while tiles are few, else two, and two a tile
    where they do not keep a program waiting; no fewer than 4 steps of K each."""
    wanted = 4 * sms // tiles if tiles < 64 else max(2, 2 * sms // tiles)
    return max(1, min(wanted, steps // 4, 16))


def run_low_rank(x, x_scale, down, down_scale, t, sms: int, dependent: bool, ratio: float = 1.0) -> None:
    """Fill t (T, R) from x (..., K), int8 with x_scale or floating; both in plane order.

    dependent: launch it before the kernel in front has ended, which it then waits for. ratio: of the scale of an int8 x
    over x_scale.
    """
    tokens, k, rank = x.numel() // x.shape[-1], x.shape[-1], down.shape[0]
    group = k // down_scale.shape[1]
    wide = x.dtype == torch.float32  # no tensor core
    step = min(32 if wide else 128, group & -group)
    tile = 16 if wide or tokens < 1024 else 32
    tiles, padded = -(-tokens // tile), max(32, triton.next_power_of_2(rank))
    splits = choose_splits(tiles, k // step, sms)
    partials = counters = t  # not read when splits is 1
    if splits > 1:
        partials = torch.empty(tiles * splits * padded * tile, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device, tiles)
    _low_rank[(tiles * splits,)](
        x, x_scale, down, down_scale, t, partials, counters, tokens, k, rank,
        ratio / 16,  # int8 weights enter the dot as 16 * q
        GROUP=group, BM=tile, BK=step, RP=padded, S=splits,
        INT=x.dtype == torch.int8, FORM=_form(x.dtype), INTERPRET=INTERPRET, PDL=dependent,
        num_warps=4, num_stages=4, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
