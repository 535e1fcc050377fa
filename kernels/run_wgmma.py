"""Launches of the wgmma and of the narrow kernel of ``twin_gemm``: how the tiles are cut, and the arguments."""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tqcompile.kernels.spare_rows import rows_in_storage
from tqcompile.kernels.split_counters import split_counters
from tqcompile.kernels.twin_narrow import twin_narrow
from tqcompile.kernels.twin_wgmma import twin_wgmma

_MAX_REGISTERS = {1: None, 2: 80, 3: 56}  # of a thread at launch, by programs a multiprocessor
_REGISTERS = {1: 240, 2: 104, 3: 72}  # of one that multiplies


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


def _meeting(y, bm: int, low_tiles: int, low_parts: int, shared: int, parts: int, tokens: int) -> tuple:
    """Where programs meet: partials of the tiles of t and of ``shared`` tiles in ``parts`` parts, two counters a tile,
    and the counters of t, one for each of ``tokens`` tiles and one more. y stands for what is not used."""
    if not low_tiles and not shared:
        return y, y, y
    places = low_tiles * low_parts + shared * parts
    partials = torch.empty(places * 2 * 64 * bm, dtype=torch.int32, device=y.device)
    used = -(-(low_tiles + shared) // 2) * 4  # 2 a tile, the next pointer aligned
    counters = split_counters(y.device, used + tokens + 1)
    return partials, counters, counters[used:]


def _shared(rows_bytes: int, bits: int):
    return gl.NVMMASharedLayout(min(128, rows_bytes), bits, rank=2)


def _low(p, x) -> tuple:
    """(down, down_scale, x of t, ratio of its scale), where the kernel makes t; else nothing, and x for itself."""
    if p.low is None:
        return None, None, x, 1.0
    down, down_scale, wide, ratio = p.low
    return down, down_scale, wide.view(-1, p.k), ratio


def of_tokens(x, box: list[int]):
    """Descriptor of an operand (T, K), with its spare rows."""
    layout = _shared(box[1] * x.element_size(), 8 * x.element_size())
    return TensorDescriptor(x, [rows_in_storage(x, box[0]), x.shape[1]], x.stride(), box, layout)


def run_wgmma(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    """Fill y. p and config: a problem and a configuration of twin_gemm.py; the others: arguments of ``twin_gemm``."""
    bm, splits, ctas = config["bm"], config["splits"], config["ctas"]
    x, y2 = x.view(-1, p.k), y.view(-1, p.n)
    down, down_scale, low_x, low_ratio = _low(p, x)
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
    shared = tiles - whole if parts > 1 else 0
    partials, counters, ready = _meeting(y, bm, low_tiles, low_parts, shared, parts, tokens)
    half = p.r // 2 if p.r else 32
    t2 = y2.new_empty(share, half) if t is None else t.view(-1, p.r)
    packed = w.view(torch.int8)
    added = y2 if addend is None else addend.to(y.dtype).view(-1, p.n)
    twin_wgmma[(programs,)](
        TensorDescriptor.from_tensor(packed, [64, 64], _shared(64, 8)),
        of_tokens(x, [bm, 64]),
        TensorDescriptor.from_tensor(t2, [share, half], _shared(2 * half, 16)),
        TensorDescriptor.from_tensor(y2, [share // pieces, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(added, [share // pieces, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(down.view(torch.int8) if low else packed, [64, 64], _shared(64, 8)),
        of_tokens(low_x, [bm, 64]),
        scale, channel, channel if x_scale is None else x_scale, w if up is None else up,
        scale if up is None else up_scale, scale if down is None else down_scale,
        low_ratio, t2, y if bias is None else bias,
        partials, counters, ready, low_parts, whole, parts, p.t, p.n, p.k,
        BM=bm, STAGES=p.stages(bm, ctas), GROUP_STEPS=p.group // 128, R=p.r, LOW=low,
        DOWN_STEPS=p.k // down_scale.shape[1] // 128 if low else 1, SPLIT=parts > 1, SHARES=shares,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, PIECES=pieces, EVEN=steps % (2 * parts) == 0,
        REGISTERS=_REGISTERS[ctas], PDL=p.dependent,
        num_warps=4, launch_pdl=p.dependent, maxnreg=_MAX_REGISTERS[ctas],
    )  # fmt: skip


def run_narrow(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    """As run_wgmma, for the narrow kernel."""
    bm, parts, ctas = config["bm"], config["splits"], config["ctas"]
    x, y2 = x.view(-1, p.k), y.view(-1, p.n)
    down, down_scale, low_x, low_ratio = _low(p, x)
    low, tokens, most = -(-p.r // 64) if p.low else 0, -(-p.t // bm), ctas * p.sms
    tiles, low_tiles = -(-p.n // 128) * tokens, low * tokens
    low_parts = share_of_t(low_tiles, tiles * parts, most, -(-p.k // 256)) if low else 1
    shared = tiles if parts > 1 else 0
    partials, counters, ready = _meeting(y, bm, low_tiles, low_parts, shared, parts, tokens)
    half = p.r // 2 if p.r else 32
    t2 = y2.new_empty(bm, half) if t is None else t.view(-1, p.r)
    packed = w.view(torch.int8)
    added = y2 if addend is None else addend.to(y.dtype).view(-1, p.n)
    twin_narrow[(min(tiles * parts + low_tiles * low_parts, most),)](
        TensorDescriptor.from_tensor(packed, [128, 128], _shared(128, 8)),
        of_tokens(x, [bm, 128]),
        TensorDescriptor.from_tensor(t2, [bm, half], _shared(2 * half, 16)),
        TensorDescriptor.from_tensor(y2, [bm, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(added, [bm, 64], _shared(128, 16)),
        TensorDescriptor.from_tensor(down.view(torch.int8) if low else packed, [128, 128], _shared(128, 8)),
        of_tokens(low_x, [bm, 128]),
        scale, channel, x_scale, w if up is None else up, scale if up is None else up_scale,
        scale if down is None else down_scale, low_ratio, t2, y if bias is None else bias,
        partials, counters, ready, low_parts, parts, p.t, p.n, p.k,
        BM=bm, STAGES=p.narrow_stages(bm, ctas), GROUP_STEPS=p.group // 128,
        PAIRS=p.group == 128 and p.k % 256 == 0 and scale.dtype == torch.bfloat16 and scale.data_ptr() % 4 == 0,
        R=p.r, LOW=low,
        DOWN_STEPS=p.k // down_scale.shape[1] // 128 if low else 1, SPLIT=parts > 1,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, REGISTERS=_REGISTERS[ctas], PDL=p.dependent,
        num_warps=4, launch_pdl=p.dependent, maxnreg=_MAX_REGISTERS[ctas],
    )  # fmt: skip
