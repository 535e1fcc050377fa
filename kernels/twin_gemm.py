"""The kernels of ``tqcompile::twin_gemm``, and which one a launch uses.

    gemv    one or two int8 tokens                       twin_gemv.py
    skinny  a few tokens, int8 or 16-bit floats          twin_skinny.py
    narrow  9 to 16 int8 tokens of a large layer, Hopper twin_narrow.py
    wgmma   any number of tokens, on Hopper              twin_wgmma.py
    dense   many floating-point tokens: weights are unpacked once, then two dense products
    tile    everything else                              twin_tile.py

A configuration is a dict: {"kernel": name, ...} with the fields that :func:`choose` fills in. It comes from the
caller, from the table of measured ones (tuning.py), or from the rule in :func:`choose`. Nothing is tuned at a launch.
"""

import contextlib
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton

from tqcompile.kernels.low_rank import run_low_rank
from tqcompile.kernels.tuning import config_for, form_of, gpu_name
from tqcompile.kernels.twin_linear import (
    FLOATS,
    INTERPRET,
    MAX_RANK,
    MAX_UP_GROUPS,
    _form,
    _gpu,
    _group_reason,
    device_reason,
)
from tqcompile.kernels.twin_tile import twin_tile, unpack_planes
from tqcompile.ops.twin_gemm import is_deferred

try:
    from triton.experimental.gluon import language as gl

    from tqcompile.kernels.run_wgmma import run_narrow, run_wgmma
    from tqcompile.kernels.twin_gemv import twin_gemv
    from tqcompile.kernels.twin_skinny import twin_skinny

    GLUON_REASON = None
except (ImportError, AttributeError) as error:  # Gluon is experimental: a Triton release may move or rename it
    GLUON_REASON = f"this Triton's Gluon cannot be imported ({error})"

SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor
_HALVES = (torch.float16, torch.bfloat16)
_RANKS = (0, 32, 64, 128)  # of the wgmma form
# Microseconds of one K step of a tile of 128 rows on one H200 multiprocessor, by tokens of the tile. Measured.
_STEP_US = {8: 0.34, 16: 0.34, 32: 0.34, 64: 0.35, 128: 0.43, 256: 0.69}
_FLOAT_STEP_US = {8: 0.34, 16: 0.34, 32: 0.36, 64: 0.68, 128: 0.85, 256: 1.42}  # on an H100
NARROW_TOKENS = 16
NO_FASTER = "bf16 would be about as fast, or faster"
DENSE_TOKENS = 512  # from here unpacking once is cheaper than unpacking in every tile of tokens


def unsupported(
    operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
    down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0,
) -> str | None:  # fmt: skip
    """Why :func:`launch` cannot serve these arguments (those of ``tqcompile::twin_gemm``), or None."""
    reason = device_reason(operand.device)
    if reason:
        return reason
    tensors = (operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, down, down_scale)
    tensors += (wide, addend)
    if any(a is not None and a.device != operand.device for a in tensors):
        return "all tensors must be on one device"
    if any(a is not None and not a.is_contiguous() for a in (operand, *tensors[:-1])):
        return "all tensors must be contiguous"
    if dtype not in FLOATS:
        return f"output dtype must be float32, float16 or bfloat16, got {dtype}"
    if operand.dim() == 0 or (operand.dtype != torch.int8 and operand.dtype not in FLOATS):
        return f"operand must be int8, float32, float16 or bfloat16 with a last dimension, got {operand.dtype}"
    if (operand.dtype == torch.int8) != (operand_scale is not None):
        return "an int8 operand comes with operand_scale, a float operand without"
    n, k, rows = residual.shape[0], operand.shape[-1], operand.shape[:-1]
    if operand_scale is not None and (operand_scale.dtype != torch.float32 or operand_scale.numel() != rows.numel()):
        return f"operand_scale must be float32 {(*rows, 1)}"
    if residual.dtype != torch.uint8 or residual.shape != (n, k // 2) or n == 0:
        return f"residual must be uint8 (N, {k}/2), got {residual.dtype} {tuple(residual.shape)}"
    if residual_scale.dim() != 2 or residual_scale.shape[0] != n or residual_scale.dtype not in FLOATS:
        return f"residual_scale must be ({n}, groups) floating point"
    groups = residual_scale.shape[1]
    if groups == 0 or k % groups or k // groups % 64:
        return f"groups must hold a multiple of 64 channels, got K={k} in {groups} groups"
    if channel_scale is not None and (channel_scale.dtype != torch.float32 or channel_scale.shape != (n,)):
        return f"channel_scale must be ({n},) float32"
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        return f"bias must be ({n},) floating point"
    if addend is not None and (addend.shape != (*rows, n) or addend.dtype not in FLOATS):
        return f"addend must be {(*rows, n)} floating point"
    if len({a is None for a in (t, up, up_scale)}) != 1:
        return "t, up and up_scale come together"
    if t is None:
        return None
    r = t.shape[-1]
    if not 2 <= r <= MAX_RANK or r % 2 or t.dtype != dtype or t.shape[:-1] != rows:
        return f"t must be {(*rows, 'R')} of {dtype}, R even and at most {MAX_RANK}, got {t.dtype} {tuple(t.shape)}"
    if up.dtype != torch.uint8 or up.shape != (n, r // 2):
        return f"up must be uint8 ({n}, {r}/2)"
    up_groups = up_scale.shape[1] if up_scale.dim() == 2 and up_scale.shape[0] == n else 0
    if not 1 <= up_groups <= MAX_UP_GROUPS or r % (2 * up_groups) or up_scale.dtype not in FLOATS:
        return f"up_scale must be floating point ({n}, 1 to {MAX_UP_GROUPS} groups of R={r})"
    if down is None:
        return None
    if down.dtype != torch.uint8 or down.shape != (r, k // 2):
        return f"down must be uint8 ({r}, {k}/2), got {down.dtype} {tuple(down.shape)}"
    if wide is not None and (operand.dtype, wide.dtype, wide.shape) != (torch.int8, torch.int8, operand.shape):
        return f"wide must be int8 {tuple(operand.shape)} beside an int8 operand, got {wide.dtype} {tuple(wide.shape)}"
    return _group_reason("down", k, down_scale, r)


class _Problem:
    """What decides about kernels: T, N, K, R, g (group), the operand's and result's dtypes, and the GPU."""

    def __init__(self, operand, t, residual, residual_scale, channel_scale, up_scale, dtype):
        self.n, self.k = residual.shape[0], operand.shape[-1]
        self.t = operand.numel() // self.k
        self.group = self.k // residual_scale.shape[1]
        self.r = 0 if t is None else t.shape[-1]
        self.operand, self.dtype = operand.dtype, dtype
        self.grid = channel_scale is not None
        self.one_up_group = up_scale is None or up_scale.shape[1] == 1
        self.index = operand.device.index if operand.is_cuda else None
        self.sms = _gpu(self.index).multi_processor_count if operand.is_cuda else 132
        self.major = _gpu(self.index).major if operand.is_cuda else 0
        self.dependent = self.major >= 9  # whether a kernel starts before its prologue has ended
        # Where the product makes t: down, its scale, the operand of t, and its scale over operand_scale.
        self.low = None

    def stages(self, bm: int, ctas: int) -> int:
        """Buffers of the wgmma form that fit into shared memory; it needs two."""
        stage = 128 * 64 + 2 * bm * 64 * self.operand.itemsize
        rest = 2 * bm * max(self.r, 8) + 2 * min(bm, 128) * 64 * 2 + 2048
        return min(8, (SHARED_BYTES // ctas - rest) // stage)

    def narrow_stages(self, bm: int, ctas: int) -> int:
        """As stages, of the narrow form."""
        rest = 2 * bm * max(self.r, 8) + 2 * bm * 64 * 2 + 2048
        return min(8, (SHARED_BYTES // ctas - rest) // (128 * 128 + 2 * bm * 128))

    def kernels(self) -> list[str]:
        """Names of the kernels that can run it; "tile" is always among them."""
        found = ["tile"]
        plain = GLUON_REASON is None and not INTERPRET and self.one_up_group and self.dtype in _HALVES
        int8, power = self.operand == torch.int8, self.group & (self.group - 1) == 0
        aligned = self.k % 128 == 0 and self.group % 128 == 0
        own = int8 or self.operand == self.dtype
        if plain and int8 and self.t <= 4 and power and 64 <= self.group <= 1024 and self.r & (self.r - 1) == 0:
            found.append("gemv")
        if plain and aligned and self.t <= 32 and self.r % 8 == 0 and own:
            found.append("skinny")
        if plain and own and aligned and self.grid and self.major == 9 and self.n % 8 == 0 and self.r in _RANKS:
            found += ["wgmma", "narrow"] if int8 and self.t <= NARROW_TOKENS else ["wgmma"]
        if not int8 and self.operand == self.dtype and self.dtype in _HALVES:
            found.append("dense")
        return found


def fastest_split(tiles: int, steps: int, bm: int, sms: int, step_us: float) -> tuple[float, int]:
    """(microseconds, S): the fastest way to cut each of ``tiles`` into S parts of K, by the measured step time."""

    def cost(s: int) -> float:
        rounds = -(-tiles * s // sms)
        return rounds * (-(-steps // s) * step_us + 1.5) + (1.0 + s * bm / 64 if s > 1 else 0.0)

    return min((cost(s), s) for s in (1, 2, 3, 4, 6, 8) if s <= max(1, steps // 4))


def choose(p: _Problem) -> dict:
    """The configuration of a problem, by rule."""
    can, weights, int8 = p.kernels(), p.n * p.k, p.operand == torch.int8
    # A second token costs the gemv form as much as the first where it is bound by arithmetic.
    few = p.t == 1 or (p.t == 2 and p.k > 8192) or (p.t <= 4 and "wgmma" not in can and "skinny" not in can)
    if "gemv" in can and few:
        return {"kernel": "gemv", "rows": 4 if p.n < 2 * p.k and p.t == 1 else 2, "warps": 4, "unroll": 4}
    # From 9 tokens on the skinny form reads x twice and more often, so it is for small layers.
    small = p.t <= 8 or weights <= 2**24 or (p.t <= 16 and weights < 2**25)
    if "skinny" in can and (small or (p.t <= 16 and "wgmma" not in can)):
        large, deep = int8 and weights >= 2**26, p.k > 8192
        if p.t <= 8:
            return {"kernel": "skinny", "rw": 1, "ks": 4 if large else 8, "unroll": 2 if large or deep else 4}
        return {"kernel": "skinny", "rw": 2 if deep else 1, "ks": 8 if deep else 4, "unroll": 2}
    if "narrow" in can:
        tiles = -(-p.n // 128)
        _, splits = fastest_split(tiles, p.k // 128, 16, p.sms, _STEP_US[16])
        return {"kernel": "narrow", "bm": 16, "splits": splits, "ctas": 2 if tiles * splits > p.sms else 1}
    if "wgmma" in can:
        step_us = _STEP_US if int8 else _FLOAT_STEP_US
        sizes = [bm for bm in step_us if min(p.t, 64) <= bm and (bm < 2 * p.t or bm == 8) and p.stages(bm, 1) >= 2]
        costs = [
            (*fastest_split(-(-p.n // 128) * -(-p.t // bm), p.k // 128, bm, p.sms, step_us[bm]), bm) for bm in sizes
        ]
        _, splits, bm = min(costs)
        # Two programs on a multiprocessor have half the registers each: only where there are that many.
        more = -(-p.n // 128) * -(-p.t // bm) * splits > p.sms
        return {"kernel": "wgmma", "bm": bm, "splits": splits, "ctas": 2 if bm <= 64 and more else 1}
    if "dense" in can and p.t >= DENSE_TOKENS:
        return {"kernel": "dense"}
    bm = next(size for size in (16, 32, 64) if p.t <= size or size == 64)
    return {"kernel": "tile", "bm": bm, "bn": 64, "warps": 4, "stages": 3}


def candidates(n: int, k: int, t: int, form: str) -> list[dict]:
    """Configurations that ``tqcompile tune`` tries for a shape; form: see tuning.form_of."""
    found = []
    if form.startswith("int8"):
        if t <= 4:
            found += [
                {"kernel": "gemv", "rows": rows, "warps": 4, "unroll": unroll}
                for rows in (1, 2, 4)
                for unroll in (2, 4)
            ]
    if "grid" in form:
        for bm in (8, 16, 32, 64, 128, 256):
            if min(t, 64) <= bm <= max(4 * t, 16):
                ctas = (1, 2, 3) if bm <= 16 else (1, 2) if bm <= 64 else (1,)
                splits = (1, 2, 4, 8) if t <= 512 else (1,)
                found += [{"kernel": "wgmma", "bm": bm, "splits": s, "ctas": c} for s in splits for c in ctas]
        if form.startswith("int8") and t <= NARROW_TOKENS:
            bm = 8 if t <= 8 else 16
            found += [{"kernel": "narrow", "bm": bm, "splits": s, "ctas": c} for s in (1, 2, 4, 8) for c in (1, 2)]
    if t <= 32:
        found += [
            {"kernel": "skinny", "rw": rw, "ks": ks, "unroll": 4 if t <= 8 else 2}
            for rw, ks in ((1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 1))
        ]
    if not form.startswith("int8"):
        found += [{"kernel": "dense"}]
        found += [
            {"kernel": "tile", "bm": 16 if t <= 16 else 64, "bn": bn, "warps": 4, "stages": 3} for bn in (64, 128)
        ]
    return found


def launch(
    operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend, dtype,
    down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0, config=None,
) -> torch.Tensor:  # fmt: skip
    """Run a kernel on arguments for which :func:`unsupported` returned None.

    Args: those of ``tqcompile::twin_gemm``; ``config`` overrides the choice (tests, tuning).
    Returns: (..., N) of ``dtype``.
    Raises: ValueError: ``config`` names a kernel that cannot run this problem.
    """
    y = operand.new_empty((*operand.shape[:-1], residual.shape[0]), dtype=dtype)
    if y.numel() == 0:
        return y
    p = _Problem(operand, t, residual, residual_scale, channel_scale, up_scale, dtype)
    if config is not None and not _fits(p, config):
        raise ValueError(f"twin_gemm: {config} cannot run this problem; possible kernels: {p.kernels()}")
    config = config or _configuration(p)
    addend = None if addend is None else addend.contiguous()
    run = {"gemv": _run_gemv, "skinny": _run_skinny, "narrow": _run_narrow}
    run |= {"wgmma": _run_wgmma, "dense": _run_dense, "tile": _run_tile}
    with torch.cuda.device(operand.device) if operand.is_cuda else contextlib.nullcontext():
        if down is not None and is_deferred(operand, defer_from):
            t = torch.empty_like(t)
            least = {"narrow": 8, "wgmma": 16}.get(config["kernel"])  # tokens of a tile that makes t
            of_t, ratio = (operand, 1.0) if wide is None else (wide, wide_ratio)
            if least and config["bm"] >= least and p.k // down_scale.shape[1] % 128 == 0:
                p.low = (down, down_scale, of_t, ratio)
            else:
                run_low_rank(of_t, operand_scale, down, down_scale, t, p.sms, p.dependent, ratio)
        run[config["kernel"]](
            p, config, y, operand, operand_scale, t, residual, residual_scale, channel_scale, up, up_scale, bias, addend
        )
    return y


def describe(*args) -> str:
    """The name of the kernel that :func:`launch` uses for these arguments of ``tqcompile::twin_gemm``."""
    operand, _, t, residual, residual_scale, channel_scale, _, up_scale, _, _, dtype = args[:11]
    return _configuration(_Problem(operand, t, residual, residual_scale, channel_scale, up_scale, dtype))["kernel"]


def remark(
    operand, operand_scale, t, residual, residual_scale=None, channel_scale=None, up=None, up_scale=None, bias=None,
    addend=None, dtype=None, down=None, down_scale=None, defer_from=0, wide=None, wide_ratio=0.0,
) -> str | None:  # fmt: skip
    """Where bf16 weights would not be slower, on an H200: with 16-bit activations both do the same multiply-adds; with
    integers on small layers, at a few tokens more than a power of two, most of the last tile is empty, and 4-bit ones
    (``wide`` is there) cost their prologue more. First of all, why the forms for Hopper are missing, if they are."""
    tokens, weights = operand.numel() // operand.shape[-1], residual.numel() * 2
    below = triton.next_power_of_2(tokens) // 2
    if operand.dtype in _HALVES:
        slow = tokens >= (64 if weights <= 2**24 else 256)
    elif wide is not None and weights <= 2**24:
        slow = 64 < tokens <= 640
    else:
        on_layer = 64 <= below <= 512 if weights <= 2**25 else below == 256 and weights <= 2**26
        slow = on_layer and 4 * tokens <= 5 * below
    return GLUON_REASON or (NO_FASTER if slow else None)


def _configuration(p: _Problem) -> Mapping:
    """What was measured for the problem or its class, where that can run it; else what the rule says."""
    if p.index is not None:
        form = form_of(p.operand, p.grid, p.group, p.r)
        found = config_for("twin_gemm", gpu_name(p.index), p.n, p.k, p.t, form)
        if found is not None and _fits(p, found):
            return found
    return choose(p)


def _fits(p: _Problem, config: Mapping) -> bool:
    stages = {"narrow": p.narrow_stages, "wgmma": p.stages}.get(config["kernel"])
    in_memory = stages is None or stages(config["bm"], config["ctas"]) >= 2
    return in_memory and config["kernel"] in p.kernels()


def _run_gemv(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    rows, warps = config["rows"], config["warps"]
    twin_gemv[(-(-p.n // (rows * warps)),)](
        x.view(torch.int32), x_scale, y if t is None else t, w.view(torch.int32), scale,
        w if up is None else up, scale if up is None else up_scale, _or(bias, y), _or(addend, y), y, p.n, p.k // 8,
        TOKENS=p.t, ROWS=rows, WARPS=warps, UNROLL=config["unroll"], G=p.k // p.group, WORDS=p.group // 8, R=p.r,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, PDL=p.dependent,
        num_warps=warps, launch_pdl=p.dependent,
    )  # fmt: skip


def warp_share(units: int, warps: int, unroll: int, scale_each: bool) -> tuple[int, int]:
    """(V, OWN) of the skinny kernels, for ``units`` of 128 columns that ``warps`` share. scale_each: every unit has a
    scale; those of V neighbours are loaded at once, so units a warp are rounded up to what that needs."""
    vector = math.gcd(units, unroll, 8) if scale_each else 1
    return vector, -(-units // (warps * vector)) * vector


def _run_skinny(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    rw, ks = config["rw"], config["ks"]
    kind = {torch.int8: None, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[p.operand]
    words, groups = w.view(torch.int32), p.k // 128
    vector, own = warp_share(groups, ks, config["unroll"], p.group == 128)
    twin_skinny[(-(-p.n // (16 * rw)),)](
        x.view(torch.int32), scale if x_scale is None else x_scale, words if t is None else t.view(torch.int32), words,
        scale, words if up is None else up.view(torch.int32), scale if up is None else up_scale,
        _or(bias, y), _or(addend, y), y, p.t, p.n, p.k // 8,
        TILES=-(-p.t // 8), RW=rw, KS=ks, UNROLL=config["unroll"], V=vector, G=groups, OWN=own,
        GROUP_STEPS=p.group // 128, R=p.r, FLOAT=kind,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, PDL=p.dependent,
        num_warps=rw * ks, launch_pdl=p.dependent,
    )  # fmt: skip


def _run_narrow(*args) -> None:
    run_narrow(*args)  # a name that is missing where Gluon is


def _run_wgmma(*args) -> None:
    run_wgmma(*args)


def _run_dense(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    dense = _unpacked(w, scale, p.k, y.dtype)
    out = F.linear(x.view(-1, p.k), dense, None if bias is None else bias.to(y.dtype))
    if t is not None:
        out.addmm_(t.view(-1, p.r), _unpacked(up, up_scale, p.r, y.dtype).t())
    if addend is not None:
        out.add_(addend.view(-1, p.n))
    y.view(-1, p.n).copy_(out)


def _unpacked(packed: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    unpack_planes[(packed.shape[0], -(-columns // 2 // 1024))](
        packed, scale, y, columns, GROUP=columns // scale.shape[1], BLOCK=1024, INTERPRET=INTERPRET
    )
    return y


def _run_tile(p, config, y, x, x_scale, t, w, scale, channel, up, up_scale, bias, addend) -> None:
    int8, wide = p.operand == torch.int8, p.operand == torch.float32 or (p.r > 0 and p.dtype == torch.float32)
    bm, bn = (16, 64) if wide else (config["bm"], config["bn"])
    step = 64 if wide or not int8 else min(128, p.group & -p.group)
    padded = max(32, triton.next_power_of_2(p.r)) if p.r else 0
    twin_tile[(-(-p.n // bn) * -(-p.t // bm),)](
        x, x_scale if int8 else y, y if t is None else t, w, scale, w if up is None else up,
        scale if up is None else up_scale, _or(bias, y), _or(addend, y), y, p.t, p.n, p.k, 1 / 16 if int8 else 1.0,
        GROUP=p.group, UP_GROUPS=up_scale.shape[1] if p.r else 1, BM=bm, BN=bn, BK=math.gcd(step, p.group),
        R=p.r, RP=padded, INT=int8, HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None,
        FORM=_form(p.operand), UP_FORM=_form(p.dtype), INTERPRET=INTERPRET,
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip


def _or(tensor, other):
    """A tensor for an argument that the kernel does not read when there is none."""
    return other if tensor is None else tensor
