"""Kernels of ``tqcompile::lattice_linear``: 2-bit or 3-bit codes, floating-point activations.

    gemv    one token, 16-bit x, groups of 128          lattice_gemv.py
    skinny  these up to 16                              lattice_skinny.py
    wgmma   these up to 1024, on Hopper                 lattice_wgmma.py
    fused   other arguments up to 128                   lattice_tile.py
    dense   more: weights are written out, then a dense product

Many tokens: no 16-bit product on integer codes is faster than one on 16-bit weights, so the weights are
written out once, by a second kernel, and cuBLAS multiplies (:data:`DENSE_TOKENS`, :data:`WGMMA_TOKENS`).
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton

from tqcompile.kernels.lattice_tile import lattice_tile, write_planes, write_weights
from tqcompile.kernels.spare_rows import empty_with_spare_rows
from tqcompile.kernels.split_counters import split_counters
from tqcompile.kernels.twin_gemm import GLUON_REASON, NO_FASTER, SHARED_BYTES, fastest_split, warp_share
from tqcompile.kernels.twin_linear import FLOATS, INTERPRET, Tile, _gpu, device_reason
from tqcompile.ops.lattice_linear import ZERO_STEPS

if GLUON_REASON is None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tqcompile.kernels.lattice_gemv import lattice_gemv
    from tqcompile.kernels.lattice_skinny import lattice_skinny
    from tqcompile.kernels.lattice_wgmma import lattice_wgmma
    from tqcompile.kernels.run_wgmma import of_tokens

SKINNY_TOKENS = 16
UNIT = 128  # columns of K that the skinny form takes at a time
PLAIN_TOKENS = 16  # up to this many x is read as it is
DENSE_TOKENS = 128  # beyond this many the weights are written out,
WGMMA_TOKENS = 1024  # where the wgmma form can run beyond this many
MANY_ROWS = 8192
MAX_OFFSET = 4
# (tokens of a tile, programs a multiprocessor) -> microseconds of a K step of a tile of 128 rows. On an H200, 2 bits.
STEP_US = {(32, 1): 0.61, (64, 1): 0.62, (128, 1): 0.81, (256, 1): 1.3, (32, 2): 1.0, (64, 2): 1.05}


def choose_tile(t: int, n: int, k: int, group: int, wide: bool, sms: int = 132) -> Tile:
    """The tile for T tokens. group: what a K step divides; wide: fp32 operands, so no tensor core."""
    step = min(128, group & -group)
    bm = 16 if t <= 16 else 32 if t <= 32 else 64
    bn = 64 if wide else 128
    tiles = -(-n // bn) * -(-t // bm)
    # Split K only while two programs an SM are not there.
    splits = max(1, min(2 * sms // tiles, k // step // 4, 8))
    return Tile(bn, bm, step, splits, 4, 3 if wide else 4)


def unsupported(x, codes, scale, zero, offset, bias, bits) -> str | None:
    """Why :func:`launch` cannot compute these arguments (shapes, dtypes and devices only), or None if it can."""
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if codes.dim() != 2 or scale.dim() != 2 or codes.dtype != torch.uint8 or bits not in (2, 3):
        return f"codes must be 2-D uint8 of 2 or 3 bits, got {codes.dtype} {tuple(codes.shape)}, {bits} bits"
    k, groups = x.shape[-1], scale.shape[1]
    if codes.shape[1] * 8 != k * bits or k % groups or (k // groups) % 64:
        return f"groups of K / {groups} with K = {k} are no multiple of 64"
    if any(a is not None and not a.is_contiguous() for a in (codes, scale, zero, offset, bias)):
        return "codes, scale, zero, offset and bias must be contiguous"
    if any(a is not None and a.dtype not in FLOATS for a in (scale, offset, bias)):
        return "scale, offset and bias must be float32, float16 or bfloat16"
    if zero is not None and offset is not None:
        return "a zero point and an offset exclude each other"
    if offset is not None and MAX_OFFSET % offset.shape[0]:
        return f"an offset of {offset.shape[0]} numbers does not divide the {MAX_OFFSET} planes"
    return None


def describe(x, codes, scale, zero, offset, bias, bits) -> str:
    """Which form :func:`launch` takes: "gemv", "skinny", "wgmma", "fused", or "dense" (weights written out, cuBLAS)."""
    k = x.shape[-1]
    t, group = x.numel() // k, k // scale.shape[1]
    whole = GLUON_REASON is None and not INTERPRET and x.dtype in (torch.float16, torch.bfloat16) and group % UNIT == 0
    if whole and t == 1:
        cut = choose_gemv(scale.shape[0], k, bits)
        if gemv_bytes(k, cut, bits) <= SHARED_BYTES:
            return "gemv"
    hopper = x.is_cuda and _gpu(x.device.index).major == 9
    wgmma = whole and hopper and t <= WGMMA_TOKENS and scale.dtype == x.dtype and scale.shape[0] % 8 == 0
    # More than 8 tokens, zero points and many rows: the skinny form is short of registers (40 us where wgmma takes 34).
    crowded = t > 8 and bits == 2 and zero is not None and scale.shape[0] >= MANY_ROWS
    if whole and t <= SKINNY_TOKENS and not (wgmma and crowded):
        return "skinny"
    if wgmma:
        return "wgmma"
    return "dense" if t > DENSE_TOKENS else "fused"


def remark(x, codes, scale, zero, offset, bias, bits) -> str | None:
    """Where bf16 weights would not be slower: both do the same multiply-adds, these unpack too. On an H200. First of
    all, why the forms for Hopper are missing, if they are."""
    k = x.shape[-1]
    small = scale.shape[0] * k < 2**25
    return GLUON_REASON or (NO_FASTER if x.numel() // k >= (64 if small or bits == 3 else 256) else None)


class Gemv(NamedTuple):
    """A launch of the gemv form: RT tiles of 16 rows a warp, RW warps beside each other in N, KS in K; UNROLL pairs of
    units of codes a step, to registers, or with ``depth`` the codes of so many steps on their way to shared memory; at
    most so many registers a thread."""

    row_tiles: int
    row_warps: int
    k_warps: int
    unroll: int
    depth: int = 0
    registers: int | None = None


def choose_gemv(n: int, k: int, bits: int, sms: int = 132) -> Gemv:
    """The configuration for a shape, by rule. Fitted to an H200: of long rows more has to be on its way than registers
    hold."""
    if k > 8192:
        return Gemv(2, 1, 8, 1, 3) if bits == 2 else Gemv(1, 1, 4, 2, 2)
    return Gemv(2, 1, 4, 2) if n > 64 * sms else Gemv(2, 1, 8, 2)


def gemv_share(units: int, warps: int, unroll: int, scale_each: bool) -> tuple[int, int, int]:
    """(V, OWN, S) of the gemv form, for ``units`` that ``warps`` share in pairs: scales that are loaded at once, pairs
    of a warp, places for units. scale_each: every unit has a scale."""
    vector = max(1, math.gcd(units, 2 * unroll, 8) // 2 * 2) if scale_each else 1
    step = max(1, vector // 2)
    own = triton.cdiv(triton.cdiv(units, 2), warps * step) * step
    return vector, own, triton.next_power_of_2(warps * max(4, 2 * own))


def gemv_bytes(k: int, cut: Gemv, bits: int) -> int:
    """Shared memory that x and codes take in the gemv form, at most."""
    x = gemv_share(k // UNIT, cut.k_warps, cut.unroll, True)[2] * (4 * UNIT + 8)
    lanes = 32 * cut.row_warps * cut.k_warps
    return x + cut.depth * cut.unroll * 2 * cut.row_tiles * lanes * 8 * bits


class Skinny(NamedTuple):
    """A launch of the skinny form: RT tiles of 16 rows a warp, RW warps beside each other in N, KS in K; UNROLL units
    of codes asked for at once; at most so many registers a thread."""

    row_tiles: int
    row_warps: int
    k_warps: int
    unroll: int
    registers: int | None = None


def choose_skinny(t: int, n: int, k: int, bits: int, zero: bool, sms: int = 132) -> Skinny:
    """The configuration for T tokens, by rule. Fitted to an H200: two tiles of rows share what x costs, where there are
    rows enough for it. With K above 8192 there is one program a multiprocessor, and only codes of 2 bits without zero
    points leave registers for 16 warps of it."""
    wide = n > 32 * sms
    if k > 8192:
        return Skinny(2, 1, 16, 1) if t <= 8 and bits == 2 and not zero else Skinny(2, 1, 8, 2)
    if t <= 8 and wide:
        return Skinny(2, 1, 8, 4, 128 if bits == 2 else None)
    if t <= 8:
        return Skinny(1, 1, 8, 4, 128) if t <= 4 else Skinny(2, 1, 16, 2)
    return Skinny(2, 1, 4, 4) if wide else Skinny(2, 1, 8, 1 if bits == 2 else 4)


class Wgmma(NamedTuple):
    """A launch of the wgmma form: tiles of 128 rows times ``tokens``, K split in so many parts, programs a
    multiprocessor."""

    tokens: int
    splits: int
    programs: int


def choose_wgmma(t: int, n: int, k: int, sms: int = 132) -> Wgmma:
    """The configuration for T tokens: what the step times of tiles say."""
    costs = []
    for (bm, programs), step_us in STEP_US.items():
        if min(t, 64) <= bm and (bm < 2 * t or bm == 32):
            tiles = -(-n // 128) * -(-t // bm)
            cost, splits = fastest_split(tiles, k // UNIT, bm, programs * sms, step_us)
            costs.append((cost, splits, bm, programs))
    _, splits, bm, programs = min(costs)
    return Wgmma(bm, splits, programs)


def stages(tokens: int, programs: int) -> int:
    """Buffers of the wgmma form that fit into the shared memory of one of so many programs; it needs two."""
    return min(8, (SHARED_BYTES // programs - 2 * min(tokens, 128) * 64 * 2 - 2048) // (128 * 32 + 4 * tokens * 32 * 2))


def planes(x: torch.Tensor) -> torch.Tensor:
    """(T, K) -> (4, T, K / 4): element i of every four consecutive ones in plane i."""
    return x.unflatten(-1, (-1, 4)).movedim(-1, 0).contiguous()


def launch(x, codes, scale, zero, offset, bias, bits, tile: Tile | Gemv | Skinny | Wgmma | None = None) -> torch.Tensor:
    """Run the kernel; the arguments are those of the op and must be supported.

    With a ``tile`` the kernel that it belongs to runs whatever the number of tokens (tests, tuning).
    """
    (n, groups), k = scale.shape, x.shape[-1]
    flat = x.reshape(-1, k)
    t = flat.shape[0]
    if t == 0:
        return x.new_empty((*x.shape[:-1], n))
    options = {
        "GROUP": k // groups,
        "BITS": bits,
        "D": 0 if offset is None else offset.shape[0],
        "ZERO_STEPS": ZERO_STEPS,
        "HAS_ZERO": zero is not None,
        "INTERPRET": INTERPRET,
    }
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        weights = [codes, scale, codes if zero is None else zero, scale if offset is None else offset]
        if tile is None:
            form = describe(x, codes, scale, zero, offset, bias, bits)
        else:
            form = {Gemv: "gemv", Skinny: "skinny", Wgmma: "wgmma", Tile: "fused"}[type(tile)]
        run = {"gemv": _gemv, "skinny": _skinny, "wgmma": _wgmma, "fused": _fused, "dense": _through_dense}[form]
        y = run(flat, weights, n, k, bias, options, tile)
    return y.reshape(*x.shape[:-1], n)


def _gemv(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    x = x.contiguous()
    codes, scale, zero, offset = weights
    gpu, group, bits = _gpu(x.device.index), options["GROUP"], options["BITS"]
    cut = tile or choose_gemv(n, k, bits, gpu.multi_processor_count)
    row_tiles, row_warps, k_warps, unroll, depth, registers = cut
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    dependent = gpu.major >= 9
    vector, own, slots = gemv_share(k // UNIT, k_warps, unroll, group == UNIT)
    lattice_gemv[(-(-n // (16 * row_tiles * row_warps)),)](
        x, codes.view(torch.int32), scale, zero, offset, y if bias is None else bias, y, n,
        RT=row_tiles, RW=row_warps, KS=k_warps, UNROLL=unroll, V=vector, U=k // UNIT,
        OWN=own, S=slots, GROUP_UNITS=group // UNIT, BITS=bits, D=options["D"], ZERO_STEPS=ZERO_STEPS,
        HAS_ZERO=options["HAS_ZERO"], HAS_BIAS=bias is not None, DEPTH=min(depth, -(-own // unroll)), PDL=dependent,
        num_warps=row_warps * k_warps, launch_pdl=dependent, maxnreg=registers,
    )  # fmt: skip
    return y


def _skinny(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t, x = x.shape[0], x.contiguous()
    codes, scale, zero, offset = weights
    bits, group = options["BITS"], options["GROUP"]
    gpu = _gpu(x.device.index)
    row_tiles, row_warps, k_warps, unroll, registers = tile or choose_skinny(
        t, n, k, bits, options["HAS_ZERO"], gpu.multi_processor_count
    )
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    # Programmatic dependent launch: this kernel starts, and loads its first codes, before the one in front has ended.
    dependent = gpu.major >= 9
    warps, units = row_warps * k_warps, k // UNIT
    vector, own = warp_share(units, k_warps, unroll, group == UNIT)
    lattice_skinny[(-(-n // (16 * row_tiles * row_warps)),)](
        x.view(torch.int32), codes.view(torch.int32), scale, zero, offset, y if bias is None else bias, y, t, n,
        TILES=-(-t // 8), RT=row_tiles, RW=row_warps, KS=k_warps, UNROLL=unroll, V=vector, U=units, OWN=own,
        GROUP_UNITS=group // UNIT,
        BITS=bits, D=options["D"], ZERO_STEPS=ZERO_STEPS, HAS_ZERO=options["HAS_ZERO"], HAS_BIAS=bias is not None,
        FLOAT=gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16, PDL=dependent,
        num_warps=warps, launch_pdl=dependent, maxnreg=registers,
    )  # fmt: skip
    return y


def _in_four_planes(x: torch.Tensor) -> torch.Tensor:
    """(T, K) -> (T, K), for the wgmma form: column i of every four in plane i, the four planes one after the other."""
    t, k = x.shape
    out = empty_with_spare_rows(x, (t, k), x.dtype)
    write_planes[(t, triton.cdiv(k, 1024))](x, out, k, BLOCK=1024, num_warps=2, launch_pdl=True)
    return out


def _wgmma(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t = x.shape[0]
    codes, scale, zero, offset = weights
    gpu = _gpu(x.device.index)
    bm, splits, ctas = tile or choose_wgmma(t, n, k, gpu.multi_processor_count)
    pieces = 2 if bm == 256 else 1
    x = _in_four_planes(x.contiguous())
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    tiles = -(-n // 128) * -(-t // bm)
    programs = tiles * splits if splits > 1 else min(tiles, ctas * gpu.multi_processor_count)
    partials = counters = y
    if splits > 1:
        partials = torch.empty(programs * 2 * 64 * bm, dtype=torch.float32, device=y.device)
        counters = split_counters(y.device, 2 * tiles)
    codes = codes.view(torch.int8)
    lattice_wgmma[(programs,)](
        TensorDescriptor.from_tensor(codes, [64, 32], gl.NVMMASharedLayout(32, 8, rank=2)),
        of_tokens(x, [bm, 32]),
        TensorDescriptor.from_tensor(y, [bm // pieces, 64], gl.NVMMASharedLayout(128, 16, rank=2)),
        codes, scale, zero, offset, y if bias is None else bias, partials, counters, t, n, k,
        BM=bm, STAGES=stages(bm, ctas), GROUP_STEPS=options["GROUP"] // UNIT, BITS=options["BITS"], D=options["D"],
        ZERO_STEPS=ZERO_STEPS, SPLIT=splits > 1, HAS_ZERO=options["HAS_ZERO"], HAS_BIAS=bias is not None,
        PIECES=pieces, REGISTERS={1: 240, 2: 104}[ctas], PDL=True,
        num_warps=4, launch_pdl=True, **({} if ctas == 1 else {"maxnreg": 80}),
    )  # fmt: skip
    return y


def _through_dense(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    w = torch.empty(n, k, dtype=x.dtype, device=x.device)
    step = min(128, options["GROUP"] & -options["GROUP"])
    write_weights[(triton.cdiv(n, 32), k // step)](*weights, w, n, k, BN=32, BK=step, num_warps=4, **options)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def _fused(x, weights, n, k, bias, options, tile) -> torch.Tensor:
    t = x.shape[0]
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    tile = tile or choose_tile(t, n, k, options["GROUP"], x.dtype == torch.float32)
    tiles = -(-n // tile.bn) * -(-t // tile.bm)
    partials = counters = y  # not read when S is 1
    if tile.splits > 1:
        partials = torch.empty(tiles * tile.splits * tile.bn * tile.bm, dtype=torch.float32, device=x.device)
        counters = split_counters(x.device, tiles)
    in_planes = t > PLAIN_TOKENS
    x = planes(x) if in_planes else x.contiguous()
    form = "fp32" if INTERPRET or x.dtype == torch.float32 else "bf16" if x.dtype == torch.bfloat16 else "fp16"
    lattice_tile[(tiles * tile.splits,)](
        x, *weights, y if bias is None else bias, y, partials, counters, t, n, k,
        BM=tile.bm, BN=tile.bn, BK=tile.step, S=tile.splits, PLANES=in_planes, HAS_BIAS=bias is not None, FORM=form,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return y
