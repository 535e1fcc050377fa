"""Times of the kernels against bf16 on one GPU; prints nothing that did not pass the correctness gate.

    python benchmarks/kernels.py [--json FILE] [--tokens 1,16] [--layers qkv,o] [--rank 64] [--forms w4a8]

One run: for every layer shape and number of tokens ``prologue`` and ``twin_gemm`` are checked against float64
(worst-case bounds, tests/gemm_bounds.py), then timed together beside bf16 ``F.linear`` and a composition of stock
kernels. A time of ours includes the activation quantization and the low-rank component. Times are of CUDA graphs of
one call per weight copy; together the copies exceed the L2 cache, so every call reads its weights from memory, as in
a model. What is compared takes turns, so it meets one clock. From 8192 tokens on, where the GPU lowers its clock to
stay within its power limit, each also runs alone for a second, at its own clock, as in a long prefill, and for 50 ms
after half a second of rest (the median of three), as a prompt that comes to an idle GPU. The shape of a 70B model is
checked and not timed.
"""

import argparse
import importlib
import json
import pathlib
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tqcompile import tuner
from tqcompile.ops.prologue import keeps_wide
from tqcompile.ops.twin_gemm import defer_from_of, is_deferred

SHAPES = {
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up_70b": (57344, 8192),
}
TOKENS = (1, 16, 64, 256, 512, 2048, 8192)
HEAD, HEAD_TOKENS = (128256, 4096), (1, 16, 64)
CHECKED_TOKENS = {"gate_up_70b": (16, 512)}  # not timed
ACT_BITS = {"w4a8": 8, "w4a4": 4, "w4a16": 16}
GROUP = 128
DTYPE = torch.bfloat16
ALONE_TOKENS = 8192  # products that bring the GPU to its power limit
COMPOSITION_TOKENS = 2048  # tinygemm is made for few tokens; more take seconds


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))


def copies_of(weights: list) -> list[list]:
    """Enough clones of ``weights`` (tensors or None) that together they exceed the L2 cache."""
    count = max(2, min(32, int(tuner.COLD_BYTES / bytes_of(weights)) + 1))
    clones = [[None if w is None else w.clone() for w in weights] for _ in range(count - 1)]
    return [weights, *clones]


def timers_of(calls: dict[str, tuple]) -> dict[str, tuple]:
    """For :func:`tuner.times_in_turns`, of ``call(weights)`` given as (call, weight copies)."""
    timers = {}
    for key, (call, copies) in calls.items():
        if copies[0][0].device.type == "cpu":  # only to try the script
            timers[key] = cpu_timer(call, copies)
        else:
            call(copies[0])
            timers[key] = tuner.timer(call, copies)
    return timers


def ratios(us: dict[str, float]) -> dict[str, float]:
    return {key: us["bf16"] / time for key, time in us.items() if key != "bf16"}


def cpu_timer(call, copies: list[list]):
    def once() -> float:
        start = time.perf_counter()
        call(copies[0])
        return (time.perf_counter() - start) * 1e3

    return once, 1


def composition(n: int, k: int, rank: int):
    """Stock kernels: 4-bit tinygemm of the residual, two bf16 matmuls of the low-rank part, one addition.

    Returns (call, weights), or (None, []) where this torch has no tinygemm for the GPU.
    """
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    try:
        tiny = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    except (AttributeError, RuntimeError) as error:
        print(f"no composition column: {error}", file=sys.stderr)
        return None, []
    weights = [
        tiny,
        torch.rand(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16) * 0.02,
        torch.randn(rank, k, device="cuda", dtype=torch.bfloat16),
        torch.randn(n, rank, device="cuda", dtype=torch.bfloat16),
    ]

    def call(w, x):
        residual = torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1])
        return residual + F.linear(F.linear(x, w[2]), w[3])

    return call, weights


class Ours:
    """The two lowered ops for one form: ``weights`` are residual, its scales, channel scale, up, down and theirs."""

    def __init__(self, form: str, transform: tuple, kernels: dict, n: int, k: int):
        self.act_bits, self.transform, self.kernels = ACT_BITS[form], transform, kernels
        self.ratio = 7 / 127 if form == "w4a4" else 0.0
        self.defer_from = defer_from_of(n, k)

    def prologue_args(self, w: list, x: torch.Tensor) -> tuple:
        transform = (None, None) if self.act_bits == 4 else self.transform
        return (x, None, None, *transform, w[5], w[6], "none", 0.0, self.act_bits, self.ratio, True, self.defer_from)

    def gemm_args(self, w: list, operands: tuple, defer_from: int | None = None) -> tuple:
        """defer_from: another number of tokens than the layer's."""
        operand, scale, t, _, wide = operands
        scale = scale if self.act_bits < 16 else None
        t = t if w[3] is not None else None
        wide = (wide, self.ratio) if keeps_wide(w[5], self.act_bits, self.defer_from) else (None, 0.0)
        defer_from = self.defer_from if defer_from is None else defer_from
        return (operand, scale, t, *w[:5], None, None, DTYPE, w[5], w[6], defer_from, *wide)

    def why_not(self, w: list, x: torch.Tensor) -> str | None:
        """The reason why a kernel does not serve these arguments: what would run then is no kernel of ours."""
        operands = self.kernels["prologue"].reference(*self.prologue_args(w, x))
        arguments = {"prologue": self.prologue_args(w, x), "twin_gemm": self.gemm_args(w, operands)}
        for name, given in arguments.items():
            reason = self.kernels[name].unsupported(*given)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def prologue(self, w: list, x: torch.Tensor) -> tuple:
        return self.kernels["prologue"].launch(*self.prologue_args(w, x))

    def gemm(self, w: list, operands: tuple) -> torch.Tensor:
        return self.kernels["twin_gemm"].launch(*self.gemm_args(w, operands))

    def both(self, w: list, x: torch.Tensor) -> torch.Tensor:
        return self.gemm(w, self.prologue(w, x))

    def errors(self, w: list, x: torch.Tensor) -> dict[str, float]:
        """Error over bound of each stage, on at most 1024 of the tokens; the calls are those that are timed."""
        from gemm_bounds import worst_plain_prologue, worst_twin_gemm

        t, some = x.shape[0], torch.arange(x.shape[0], device=x.device)
        some = some if t <= 1024 else torch.cat((some[:512], some[-512:]))
        operands = self.prologue(w, x)
        y = self.gemm(w, operands)
        kept = tuple(part[some] if part.dim() == 2 else part for part in operands)
        results, args = kept, self.prologue_args(w, x[some])
        down, deferred = args[5:7], is_deferred(x, self.defer_from)
        if deferred:  # y answers for t
            results, down = (*kept[:2], kept[2][:, :0], *kept[3:]), (None, None)
        found = worst_plain_prologue(results, args[0], *args[3:5], *down, self.act_bits, self.ratio)
        dense = self.gemm_form(w, operands) == "dense"
        gemm_args = self.gemm_args(w, kept, 1 if deferred else 0)
        return {**found, "y": worst_twin_gemm(y[some], *gemm_args, dense=dense)}

    def gemm_form(self, w: list, operands: tuple) -> str:
        """Which of its kernels twin_gemm uses."""
        describe = self.kernels["twin_gemm"].describe
        return describe(*self.gemm_args(w, operands)) if describe else "reference"


class Kernel:
    """An op's kernel module and its plain-torch definition. On a CPU (to try the script) the latter runs."""

    def __init__(self, op: str, device: str):
        from tqcompile import ops

        self.reference = getattr(ops, f"{op}_reference")
        self.launch, self.unsupported, self.describe = self.reference, lambda *args: None, None
        if device == "cuda":
            try:
                module = importlib.import_module(f"tqcompile.kernels.{op}")
            except ModuleNotFoundError as error:
                self.unsupported = lambda *args, why=str(error): f"no kernel ({why})"
            else:
                self.launch, self.unsupported = module.launch, module.unsupported
                self.describe = getattr(module, "describe", None)


def random_weights(n: int, k: int, rank: int, grid: bool, device: str) -> list:
    """residual, residual_scale, channel_scale, up, up_scale, down, down_scale; without a low rank the last 4 None.

    Normally distributed, as bf16's, and rounded to the nearest code: a GPU at its power limit multiplies small numbers
    faster than codes that are all equally frequent."""
    from tqcompile.methods.rounding import four_bits_above, group_scales, round_to_codes
    from tqcompile.ops.packing import pack_int4

    g = torch.Generator(device).manual_seed(n + k)

    def quantized(rows, columns, group, top):
        """packed, scales, unit or None, with codes of every group from about -7 to 7."""
        w = torch.randn(rows, columns, generator=g, device=device)
        scale, unit = group_scales(w, group, search=False), None
        if grid:  # multiples of one number a row; 15, so that none exceeds 16
            unit = four_bits_above(scale.amax(1) / 15)
            scale = unit[:, None] * torch.round(scale / unit[:, None]).clamp_min(1)
        packed = pack_int4(round_to_codes(w, scale))
        return packed, (scale * top).to(DTYPE), None if unit is None else unit * top

    residual, residual_scale, channel = quantized(n, k, GROUP, 2.0**-5)
    low_rank = [None] * 4
    if rank:
        up, up_scale, _ = quantized(n, rank, rank, 2.0**-4)
        down, down_scale, _ = quantized(rank, k, GROUP, 2.0**-6)
        low_rank = [up, up_scale, down, down_scale]
    return [residual, residual_scale, channel, *low_rank]


def transform_of(options, k: int) -> tuple:
    """(input_scale, rotation) as in a model whose scales are absorbed: none, or a Hadamard rotation."""
    from tqcompile.methods.hadamard import hadamard_matrix

    return (None, hadamard_matrix(128).to(options.device, DTYPE)) if options.rotation else (None, None)


def measure(name: str, tokens: tuple, options) -> list[dict]:
    """One row per number of tokens and layer: errors over bounds, and microseconds of what passed."""
    n, k = options.shapes[name]
    device = options.device
    kernels = {op: Kernel(op, device) for op in ("prologue", "twin_gemm")}
    timed = name not in CHECKED_TOKENS
    weights = random_weights(n, k, options.rank, options.scales == "grid", device)
    copies = copies_of(weights) if timed else [weights]
    dense, stock, stock_copies = [], None, []
    if timed:
        dense = copies_of([torch.randn(n, k, device=device, dtype=DTYPE)])
        stock, stock_weights = composition(n, k, options.rank or 64) if device == "cuda" else (None, [])
        stock_copies = copies_of(stock_weights) if stock else []
    forms = {form: Ours(form, transform_of(options, k), kernels, n, k) for form in options.forms}
    rows = []
    for t in tokens:
        x = torch.randn(t, k, device=device, dtype=DTYPE)
        row = {"layer": name, "N": n, "K": k, "T": t, "R": options.rank, "us": {}, "error_over_bound": {}, "left": {}}
        row["kernel"] = {}
        for form, ours in forms.items():
            reason = ours.why_not(weights, x[:1].expand(t, k).contiguous())
            if reason is not None:
                row["left"][form] = reason
                print(f"{name} T={t} {form} left out: {reason}", file=sys.stderr)
                continue
            row["error_over_bound"][form] = found = ours.errors(weights, x)
            row["kernel"][form] = ours.gemm_form(weights, ours.prologue(weights, x[:t]))
            if not max(found.values()) <= 1:
                sys.exit(f"{name} T={t} {form}: an error exceeds its bound, no times are printed: {found}")
        if timed:
            calls = {"bf16": (lambda w, x=x: F.linear(x, w[0]), dense)}
            if stock and t <= COMPOSITION_TOKENS:
                calls["composed"] = (lambda w, x=x: stock(w, x), stock_copies[: 32 if t <= 100 else 2])
            for form in row["error_over_bound"]:
                ours = forms[form]
                operands = ours.prologue(weights, x)
                calls[f"{form} prologue"] = (lambda w, o=ours, x=x: o.prologue(w, x), copies)
                calls[f"{form} gemm"] = (lambda w, o=ours, z=operands: o.gemm(w, z), copies)
                calls[form] = (lambda w, o=ours, x=x: o.both(w, x), copies)
            if options.portable:
                calls["portable"] = (lambda w, x=x: portable(w, x), copies)
            timers = timers_of(calls)
            row["us"] = tuner.times_in_turns(timers)
            row["ratio_to_bf16"] = ratios(row["us"])
            if options.alone and t >= ALONE_TOKENS:
                whole = {key: timers[key] for key in ("bf16", *row["error_over_bound"])}
                row["alone_us"] = tuner.times_alone(whole, options.alone)
                row["rested_us"] = tuner.times_alone(whole, 0.05, pause=0.5, rounds=3)
                for how in ("alone", "rested"):
                    row[f"{how}_ratio_to_bf16"] = ratios(row[f"{how}_us"])
        rows.append(row)
    return rows


def measure_head(options) -> list[dict]:
    """The output head of Llama-3-8B with 8-bit weights (int8_linear) beside bf16; the last token of each sequence."""
    from kernel_bounds import random_int8_args, worst_int8_linear

    n, k = HEAD if options.device == "cuda" else (512, 256)
    kernel = Kernel("int8_linear", options.device)
    copies = copies_of(list(random_int8_args(1, n, k, k // GROUP, DTYPE, False, options.device)[1:]))
    dense = copies_of([torch.randn(n, k, device=options.device, dtype=DTYPE)])
    rows = []
    for t in HEAD_TOKENS:
        x = torch.randn(t, k, device=options.device, dtype=DTYPE)
        row = {"layer": "lm_head", "N": n, "K": k, "T": t, "R": 0, "us": {}, "error_over_bound": {}, "left": {}}
        reason = kernel.unsupported(x, *copies[0])
        if reason is not None:
            sys.exit(f"lm_head T={t}: int8_linear cannot run: {reason}")
        found = worst_int8_linear(kernel.launch(x, *copies[0]), x, *copies[0])
        row["error_over_bound"]["w8a16"] = {"y": found}
        if not found <= 1:
            sys.exit(f"lm_head T={t}: an error exceeds its bound, no times are printed: {found}")
        calls = {
            "bf16": (lambda w, x=x: F.linear(x, w[0]), dense),
            "w8a16": (lambda w, x=x: kernel.launch(x, *w), copies),
        }
        row["us"] = tuner.times_in_turns(timers_of(calls))
        row["ratio_to_bf16"] = ratios(row["us"])
        rows.append(row)
    return rows


def portable(w: list, x: torch.Tensor) -> torch.Tensor:
    """The W4A8 layer by the two portable kernels; tests/gpu hold these against float64."""
    from tqcompile.kernels import quantize_activation, twin_linear

    q, scale = quantize_activation.launch(x, None, None)
    return twin_linear.launch(q, scale, w[0], w[1], w[5], w[6], w[3], w[4], None, 0.0, DTYPE)


def table(rows: list[dict]) -> str:
    """Times, speed over bf16, and the largest error over its bound of the matrix products and of t."""
    columns = list(dict.fromkeys(key for row in rows for key in row["us"]))
    lines = [f"{'layer':12}{'T':>6}" + "".join(f"{c:>16}" for c in columns) + f"{'error/bound':>13}"]
    for row in rows:
        cells = []
        for c in columns:
            us, ratio = row["us"].get(c), row.get("ratio_to_bf16", {}).get(c)
            shown = ratio and not c.endswith(("prologue", "gemm"))
            cells.append("-" if us is None else f"{us:.1f}" + (f" ({ratio:.2f}x)" if shown else ""))
        found = row["error_over_bound"].values()
        # Rounding to codes always comes close to its bound, half a step; so the operand is left out here.
        largest = max((v for errors in found for key, v in errors.items() if key != "operand"), default=float("nan"))
        lines.append(f"{row['layer']:12}{row['T']:6}" + "".join(f"{c:>16}" for c in cells) + f"{largest:13.3f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file, anew after every layer")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layers", default="", help=f"of {', '.join(SHAPES)}; default all")
    parser.add_argument("--shapes", default="", help="instead of --layers: NxK,NxK")
    parser.add_argument("--forms", default="w4a8,w4a4,w4a16", help="of w4a8, w4a4, w4a16")
    parser.add_argument("--scales", choices=("grid", "free"), default="grid", help="grid: one number a row times 1..16")
    parser.add_argument("--rotation", action="store_true", help="the prologue also rotates blocks of 128 channels")
    parser.add_argument("--portable", action="store_true", help="also time quantize_activation + twin_linear")
    parser.add_argument("--head", action="store_true", help="also an output head with 8-bit weights")
    parser.add_argument("--rank", type=int, default=64, help="0: no low-rank component")
    parser.add_argument(
        "--alone", type=float, default=1.0, metavar="SECONDS", help="of each from 8192 tokens on; 0: also no rest"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; torch.cuda.is_available() is False")
    names = [name for name in options.layers.split(",") if name] or list(SHAPES)
    options.tokens = tuple(int(t) for t in options.tokens.split(","))
    options.forms = options.forms.split(",")
    for value, known in ((names, SHAPES), (options.forms, ACT_BITS)):
        for name in value:
            if name not in known:
                sys.exit(f"unknown {name!r}; known: {', '.join(known)}")
    if options.shapes:
        options.shapes = {text: tuple(int(part) for part in text.split("x")) for text in options.shapes.split(",")}
    else:
        options.shapes = {name: SHAPES[name] for name in names}
    return options


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(arguments)
    start, rows = time.time(), []
    about = {"torch": torch.__version__, "group": GROUP, "scales": options.scales, "rotation": options.rotation}
    if options.device == "cuda":
        import triton

        about |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    for name in options.shapes:
        rows += measure(name, CHECKED_TOKENS.get(name, options.tokens), options)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        about["seconds"] = round(time.time() - start, 1)
        if options.json:
            options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if options.head:
        rows += measure_head(options)
        if options.json:
            options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    print("microseconds (speed over bf16); every row passed its error bound first")
    print(table(rows))
    for how, what in (("alone", f"for {options.alone:g} s"), ("rested", "for 50 ms after a rest")):
        found = [r | {key: r[f"{how}_{key}"] for key in ("us", "ratio_to_bf16")} for r in rows if f"{how}_us" in r]
        if found:
            print(f"each alone {what}\n{table(found)}")
    return rows


if __name__ == "__main__":
    main()
