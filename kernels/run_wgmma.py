"""Launches of the wgmma kernel of ``twin_gemm``: how the tiles are cut, and the arguments."""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tqcompile.kernels.split_counters import split_counters
from tqcompile.kernels.twin_wgmma import twin_wgmma


def last_round(tiles: int, programs: int, steps: int) -> tuple[int, int]:
    """(whole, parts): tiles that programs take whole, and in how many parts of K the rest, which then keeps more of
    them busy; (tiles, 1) where that gains less than the parts cost."""
    rest = tiles % programs
    parts = min(programs // rest, 4) if rest and tiles > programs else 1
    return (tiles - rest, parts) if steps * (parts - 1) // parts >= 12 else (tiles, 1)


def share_of_t(low_tiles: int, items: int, programs: int, steps: int) -> int:
    """In how many parts of K the wgmma form makes a tile of t: as many as keep the programs busy that have an item
    less than others, for all others wait for t."""
    free = -items % programs
    return max(1, min(free // low_tiles, 8, steps // 2))


def _shared(rows_bytes: int, bits: int):
    return gl.NVMMASharedLayout(min(128, rows_bytes), bits, rank=2)


def run_wgmma(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    """Fill y. p and config: a problem and a configuration of twin_gemm.py; the others: arguments of ``twin_gemm``."""
    bm, splits, ctas = config["bm"], config["splits"], config["ctas"]
    x, y2 = x.view(-1, p.k), y.view(-1, p.n)
    down, down_scale = p.low or (None, None)
    low, tokens = -(-p.r // 64) if p.low else 0, -(-p.t // bm)
    tiles, low_tiles = -(-p.n // 128) * tokens, low * tokens
    steps, most = p.k // 128, ctas * p.sms  # most: programs that run at once
    whole, parts = (0, splits) if splits > 1 else last_round(tiles, most, steps)
    items = whole + (tiles - whole) * parts
    low_parts = share_of_t(low_tiles, items, most, steps) if low else 1
    wanted = items + low_tiles * low_parts
    programs = min(wanted, most)
    # Programs with one part of one tile can wait for each other.
    shares = splits if splits in (2, 4) and bm // splits >= 16 and wanted <= most else 1
    share = bm // shares
    pieces = 2 if share == 256 else 1
    partials = counters = ready = y
    if parts > 1 or low:
        shared = tiles - whole
        places = low_tiles * low_parts + shared * parts
        partials = torch.empty(places * 2 * 64 * bm, dtype=torch.int32, device=y.device)
        used = -(-(low_tiles + shared) // 2) * 4  # 2 a tile, the next pointer aligned
        counters = split_counters(y.device, used + tokens + 1)
        ready = counters[used:]
    half = p.r // 2 if p.r else 32
    t2 = y2.new_empty(share, half) if t is None else t.view(-1, p.r)
    packed = w.view(torch.int8)
    added = y2 if addend is None else addend.to(y.dtype).view(-1, p.n)
    registers = {} if ctas == 1 else {"maxnreg": {2: 80, 3: 56}[ctas]}
    twin_wgmma[(programs,)](
        TensorDescriptor.from_tensor(packed, [64, 64], _shared(64, 8)),
        TensorDescriptor.from_tensor(x, [bm, 64], _shared(64 * x.element_size(), 8 * x.element_size())),
        TensorDescriptor.from_tensor(t2, [share, half], _shared(2 * half, 16)),
        TensorDescriptor.from_tensor(y2, [share // pieces, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(added, [share // pieces, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(down.view(torch.int8) if low else packed, [64, 64], _shared(64, 8)),
        scale, channel, channel if x_scale is None else x_scale, w if up is None else up,
        scale if up is None else up_scale, scale if down is None else down_scale, t2, y if bias is None else bias,
        partials, counters, ready, low_parts, whole, parts, p.t, p.n, p.k,
        BM=bm, STAGES=p.stages(bm, ctas), GROUP_STEPS=p.group // 128, R=p.r, LOW=low,
        DOWN_STEPS=p.k // down_scale.shape[1] // 128 if low else 1, SPLIT=parts > 1, SHARES=shares,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, PIECES=pieces,
        REGISTERS={1: 240, 2: 104, 3: 72}[ctas], PDL=p.dependent,
        num_warps=4, launch_pdl=p.dependent, **registers,
    )  # fmt: skip
