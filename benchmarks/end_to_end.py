"""A whole 8B model, quantized against bf16: decode, prefill and memory. Prints nothing that did not pass its gate.

    python benchmarks/end_to_end.py [--models llama-3-8b,qwen3-8b] [--cases decode-b1-512,...] [--json FILE]

Both sides are the same transformers model with the same attention, the same static cache, one CUDA graph of the
compiled step and the same timing; they differ in the linear layers alone, and in who compiles them:

* bf16: ``nn.Linear``, plain ``torch.compile``;
* twin: the decoder's linears are ``TwinLinear`` (twin-w4a8), ``torch.compile`` with the backend "twinquant".

Weights are random (no speed depends on their values), made on the GPU in the form that ``tqcompile.compile`` leaves:
packed codes, group scales on a grid, one transform and one down-projection a site.

The gate, for every timed shape: the last token's logits are computed eagerly with the ops' plain-torch definitions,
once in float32 and once in bf16. The distance of the second from the first is what bf16 rounding alone does to this
model; the compiled step, a third evaluation with the same roundings in another order, may be at most twice as far.

A decode step fills the last slot of a cache of ``context`` entries, all in use, so attention needs no mask; it feeds
its token back, as greedy decoding does. Prefill fills an empty cache and computes the last token's logits.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import json
import multiprocessing
import pathlib
import re
import statistics
import sys
import threading
import time
import traceback
from queue import Empty
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tqcompile import backend, ops, tuner
from tqcompile.config import HEADS
from tqcompile.methods.components import LinearSpec
from tqcompile.methods.hadamard import random_signs, rotation_block
from tqcompile.modules import PackedWeight, TwinLinear
from tqcompile.output_head import round_head

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
QWEN3 = {
    **LLAMA,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
}
MODELS = {"llama-3-8b": ("Llama", LLAMA), "qwen3-8b": ("Qwen3", QWEN3)}
# The linears of one decoder layer by the tensor they read.
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SIDES = ("bf16", "twin")
GATE = 2.0  # see the gate above: two independent roundings of one computation differ by sqrt(2) of one, plus a margin
DTYPE = torch.bfloat16
DECODE_REPLAYS, PREFILL_REPLAYS = 50, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """``decode``: one token for each of ``batch`` sequences that have ``length`` - 1. Else prefill of ``length``."""

    decode: bool
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"decode-b{self.batch}-{self.length}" if self.decode else f"prefill-{self.batch}x{self.length}"

    @property
    def tokens(self) -> int:
        return self.batch * (1 if self.decode else self.length)


CASES = (
    Case(True, 1, 512),
    Case(True, 1, 2048),
    Case(True, 16, 512),
    Case(True, 16, 2048),
    Case(False, 1, 2048),
    Case(False, 4, 2048),
)
TINY_CASES = (Case(True, 1, 24), Case(True, 2, 40), Case(False, 2, 24))


# ---------------------------------------------------------------------------------------------------- the two models


def attention_name(choice: str) -> str:
    """The attention both sides run. "sdpa" is transformers' own; "full" is the same function without a mask.

    With a static cache transformers always builds a mask at decode, which makes it copy each key and value head four
    times and keeps it off the flash kernel. No mask is needed here: a decode step sees a full cache.
    """
    if choice == "sdpa":
        return "sdpa"
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # No mask function of that name exists, so transformers hands down attention_mask=None.
    AttentionInterface.register("sdpa_full_cache", sdpa_attention_forward)
    return "sdpa_full_cache"


def build(name: str, options) -> nn.Module:
    """The bf16 model with random weights, made on its device."""
    import transformers

    family, sizes = MODELS[name]
    sizes = (
        sizes if options.geometry == "full" else {**sizes, **TINY, **({"head_dim": 32} if "head_dim" in sizes else {})}
    )
    if options.layers:
        sizes = {**sizes, "num_hidden_layers": options.layers}
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=DTYPE, attn_implementation=attention_name(options.attention)
        )
    return model.eval().requires_grad_(False)


def random_codes_(weight: PackedWeight, std: float, generator: torch.Generator) -> None:
    """Fill with random codes, and group scales c * m with m in 4 .. 16, so that the values have roughly this spread.

    c has four significant bits, so the product is exact in bfloat16: the grid that the learned method stores.
    """
    weight.weight_packed.random_(0, 256, generator=generator)
    rows, groups = weight.weight_scale.shape
    device = weight.weight_scale.device
    significand = torch.randint(8, 16, (rows, 1), generator=generator, device=device) / 8
    unit = 2.0 ** round(torch.log2(torch.tensor(std / (4.6 * 10 * 1.5))).item())  # codes 4.6, m 10, significand 1.5
    m = torch.randint(4, 17, (rows, groups), generator=generator, device=device)
    weight.weight_scale.copy_(significand * unit * m)


def random_site(linears: list[nn.Linear], options, rotated: bool, generator: torch.Generator) -> list[TwinLinear]:
    """TwinLinears in the place of linears that read one tensor: they share its transform and the down-projection."""
    k = linears[0].in_features
    block = rotation_block(k) if rotated else 0
    signs = random_signs(block, torch.Generator().manual_seed(0)) if block else ""
    layers = []
    for linear in linears:
        spec = LinearSpec(
            out_features=linear.out_features,
            in_features=k,
            rank=options.rank,
            group_size=options.group_size,
            act_bits=8,
            rotation_block=block,
            rotation_signs=signs,
        )
        layer = TwinLinear(spec, device=linear.weight.device)
        random_codes_(layer.residual, 0.02, generator)
        if layers:
            layer.down.load_state_dict(layers[0].down.state_dict())
        else:
            random_codes_(layer.down, k**-0.5, generator)
        random_codes_(layer.up, 0.1 * 0.02 * k**0.5 / options.rank**0.5, generator)
        layers.append(layer)
    return layers


def quantize(model: nn.Module, options) -> None:
    """Replace every linear of every decoder layer, one layer at a time; embeddings and norms stay, and the head does
    unless an option rounds it."""
    generator = torch.Generator(options.device).manual_seed(1)
    for layer in model.model.layers:
        for site, names in SITES.items():
            linears = [layer.get_submodule(name) for name in names]
            made = random_site(linears, options, site in options.rotations, generator)
            for name, new in zip(names, made, strict=True):
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, new)
    if options.lm_head != "keep":
        model.lm_head = round_head(model.lm_head, int(options.lm_head[1]), options.group_size, None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ------------------------------------------------------------------------------------------------------------ a step


@functools.cache  # one class: compiled code is kept for it, not for another of the same name
def layer_class() -> type:
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):
        """transformers' own counts in a tensor of its own, one small kernel a layer; here the positions are given."""

        def update(self, key_states, value_states, *args, **kwargs):
            self.keys.index_copy_(2, self.positions, key_states)
            self.values.index_copy_(2, self.positions, value_states)
            return self.keys, self.values

    return Layer


def make_cache(config, case: Case, dtype: torch.dtype, device: str):
    """A static cache of random keys and values that is written at the positions of the step; and these positions."""
    from transformers.cache_utils import Cache

    first = case.length - 1 if case.decode else 0
    positions = torch.arange(first, case.length, device=device)
    generator = torch.Generator(device).manual_seed(2)
    heads, dim = config.num_key_value_heads, config.head_dim
    layers = []
    for _ in range(config.num_hidden_layers):
        layer = layer_class()(max_cache_len=case.length)
        layer.positions, layer.is_initialized, layer.dtype, layer.device = positions, True, dtype, device
        for name in ("keys", "values"):
            shape = (case.batch, heads, case.length, dim)
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(DTYPE).to(dtype)
            if case.decode:
                torch._dynamo.mark_dynamic(values, 2)  # one graph serves every context length
            setattr(layer, name, values)
        layers.append(layer)
    return Cache(layers=layers), positions


class Step:
    """One decode or prefill step on fixed tensors: the same for both sides, compiled or not."""

    def __init__(self, config, case: Case, device: str, dtype: torch.dtype = DTYPE):
        tokens = 1 if case.decode else case.length
        ids = torch.randint(0, config.vocab_size, (case.batch, tokens), generator=torch.Generator().manual_seed(3))
        self.decode, self.ids = case.decode, ids.to(device)
        self.cache, positions = make_cache(config, case, dtype, device)
        self.position_ids = positions.expand(case.batch, -1).contiguous()

    def logits(self, forward) -> torch.Tensor:
        """(B, 1, vocabulary): those of the last token alone."""
        return forward(
            input_ids=self.ids,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def run(self, forward) -> torch.Tensor:
        """The timed step: logits, the greedy token, and in decoding its way back into the input."""
        token = self.logits(forward)[:, -1].argmax(-1, keepdim=True)
        if self.decode:
            self.ids.copy_(token)
        return token


# ---------------------------------------------------------------------------------------------------------- the gate


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||; infinite where anything is not finite."""
    difference = (value.double() - reference.double()).norm() / reference.double().norm()
    return difference.item() if torch.isfinite(difference) else float("inf")


@contextlib.contextmanager
def reference_ops():
    """TwinLinear's forward runs the plain-torch definitions, on any device."""
    with (
        mock.patch.object(ops, "twin_linear", ops.twin_linear_reference),
        mock.patch.object(ops, "quantize_activation", ops.quantize_activation_reference),
        mock.patch.object(ops, "int8_linear", ops.int8_linear_reference),
    ):
        yield


@contextlib.contextmanager
def in_float32(model: nn.Module):
    """Parameters in float32, which is exact, and back."""
    parameters = list(model.parameters())
    for p in parameters:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p in parameters:
            p.data = p.data.to(DTYPE)


def references(model: nn.Module, cases: list[Case], device: str) -> dict[str, tuple[torch.Tensor, float]]:
    """Case name -> (float32 logits, distance of the bf16 evaluation from them), both eager, plain torch ops."""
    config, exact, found = model.config, {}, {}
    with reference_ops():
        with in_float32(model):
            for case in cases:
                exact[case.name] = Step(config, case, device, torch.float32).logits(model.forward).cpu()
        for case in cases:
            rounded = Step(config, case, device).logits(model.forward).cpu()
            found[case.name] = exact[case.name], relative(rounded, exact[case.name])
    return found


# ---------------------------------------------------------------------------------------------------------- the clock


def capture(call, device: str):
    """(replay, result): ``call`` in a CUDA graph; on a CPU the call itself."""
    return (call, call()) if device == "cpu" else tuner.capture(call)


def milliseconds(replay, count: int, device: str) -> tuple[float, float]:
    """(median, 10 % quantile distance) of ``count`` runs after a warm-up of a tenth as many."""

    def once() -> float:
        if device == "cpu":
            start = time.perf_counter()
            replay()
            return (time.perf_counter() - start) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for _ in range(max(2, count // 10)):
        once()
    times = sorted(once() for _ in range(count))
    return statistics.median(times), times[(9 * count) // 10 - (count > 1)] - times[count // 10]


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def compile_side(model: nn.Module, side: str, options) -> None:
    torch._dynamo.reset()
    if side == "bf16":
        mode = None if options.baseline_mode == "default" else options.baseline_mode
        model.compile(backend=options.inner, mode=mode, dynamic=False)
    else:
        model.compile(
            backend="twinquant", dynamic=False, options={"quantize": False, "inner": options.inner, "lower": True}
        )


class Wrong(Exception):
    """A result that is not what it must be; its case gets no time, the others go on."""


def first_call(model: nn.Module, side: str, case: Case, expected: tuple | None, options) -> dict:
    """Compile (or reuse) the graph for a case and hold it against the gate; what there is to report of it."""
    device = options.device
    row = {"side": side, "case": case.name, "tokens": case.tokens, "weights_gb": weight_bytes(model) / 1e9}
    step = Step(model.config, case, device)
    began = time.perf_counter()
    logits = step.logits(model)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    row["compile_seconds"] = time.perf_counter() - began
    if expected is not None:
        exact, rounding = expected
        row |= {"error": relative(logits.cpu(), exact), "bf16_error": rounding}
        if not row["error"] <= GATE * rounding:
            raise Wrong(f"the compiled step is off by {row['error']:.2e}, allowed {GATE} * {rounding:.2e}")
    del logits
    step.run(model)
    if device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if side == "twin":
        row["implementations"] = implementations()
    return row


def timed(model: nn.Module, case: Case, options) -> dict:
    """Median time of the compiled step, replayed as a CUDA graph."""
    step = Step(model.config, case, options.device)
    replay, token = capture(lambda: step.run(model), options.device)
    count = options.replays or (DECODE_REPLAYS if case.decode else PREFILL_REPLAYS)
    ms, spread = milliseconds(replay, count, options.device)
    if not ((token >= 0) & (token < model.config.vocab_size)).all():
        raise Wrong("the timed graph produced a token outside of the vocabulary")
    return {"ms": ms, "spread_ms": spread, "tokens_per_second": case.tokens / ms * 1e3}


def implementations() -> dict[str, int]:
    """Op and implementation -> how many nodes, from the backend's latest report."""
    counts: dict[str, int] = {}
    for node, how in backend.reports[-1].lowered.items() if backend.reports else ():
        key = f"{re.sub('(_default)?(_[0-9]+)?$', '', node)}: {how}"
        counts[key] = counts.get(key, 0) + 1
    return counts


# ----------------------------------------------------------------------------------------------------------- the run


@torch.no_grad()
def run_side(name: str, side: str, cases: list[Case], options, record, turn) -> None:
    """Build and compile one side of a model, every case, then time them all when it is this side's ``turn``."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {name} {side} {text}", flush=True)

    model, expected = build(name, options), {}
    if side == "twin":
        quantize(model, options)
        free(options.device)
        if not options.no_gate:
            expected = references(model, cases, options.device)
            free(options.device)
    say(f"built, {weight_bytes(model) / 1e9:.2f} GB")
    compile_side(model, side, options)
    rows = {}

    def attempt(case: Case, call) -> dict | None:
        """What ``call`` returns; or None, after recording why there is nothing."""
        try:
            return call()
        except Exception as error:
            if not isinstance(error, Wrong):
                traceback.print_exc()
            record({"model": name, "side": side, "case": case.name, "failed": f"{type(error).__name__}: {error}"[:500]})
            say(f"{case.name} FAILED")
            return None
        finally:
            free(options.device)

    for case in cases:
        row = attempt(case, lambda case=case: first_call(model, side, case, expected.get(case.name), options))
        if row is not None:
            rows[case] = {"model": name, **row}
            say(f"{case.name} compiled in {row['compile_seconds']:.0f} s")
    with turn():
        for case, row in rows.items():
            times = attempt(case, lambda case=case: timed(model, case, options))
            if times is not None:
                record(row | times)
        say("timed")
    torch._dynamo.reset()


def worker(name: str, side: str, cases: list[Case], options, queue, barrier, lock) -> None:
    """A process for one side: compiling takes minutes of one core each, so the processes compile side by side."""
    leave_own_folder()

    @contextlib.contextmanager
    def turn():
        barrier.wait()  # nobody is compiling any more
        with lock:
            yield

    try:
        run_side(name, side, cases, options, lambda row: queue.put(("row", row)), turn)
    except BaseException as error:
        barrier.abort()
        if not isinstance(error, threading.BrokenBarrierError):  # the other one failed, and says so itself
            traceback.print_exc()
        queue.put(("failed", f"{name} {side}: {type(error).__name__}: {error}"))
    else:
        queue.put(("done", side))


def run_sides_together(name: str, cases: list[Case], options, record) -> None:
    context = multiprocessing.get_context("spawn")
    parts = [[c for c in cases if c.decode], [c for c in cases if not c.decode]] if options.jobs >= 4 else [cases]
    jobs = [(side, part) for side in options.sides for part in parts if part]
    queue, barrier, lock = context.Queue(), context.Barrier(len(jobs)), context.Lock()
    workers = [
        context.Process(target=worker, args=(name, side, part, options, queue, barrier, lock)) for side, part in jobs
    ]
    for process in workers:
        process.start()
    failures, open_sides = [], len(workers)
    while open_sides:
        try:
            kind, value = queue.get(timeout=10)
        except Empty:
            if any(process.exitcode not in (None, 0) for process in workers):
                barrier.abort()  # killed, so that it could not say why
                sys.exit(f"{name}: a process was killed; exit codes {[process.exitcode for process in workers]}")
            continue
        if kind == "row":
            record(value)
            continue
        open_sides -= 1
        if kind == "failed":
            failures.append(value)
    for process in workers:
        process.join()
    if failures:
        sys.exit("\n".join(failures))


def table(rows: list[dict]) -> str:
    """One line a model and case: both sides' times, the ratio, memory."""
    sides = {(row["model"], row["case"], row["side"]): row for row in rows if "failed" not in row}
    lines = [
        f"{'model':12}{'case':18}{'bf16 ms':>10}{'twin ms':>10}{'speed':>8}{'tokens/s':>10}"
        f"{'weights':>9}{'peak GB':>16}{'error':>10}{'of bf16':>9}"
    ]
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in rows):
        bf16, twin = (sides.get((model, case, side)) for side in SIDES)

        def cell(row, key, form):
            return format(row[key], form) if row and key in row else "-"

        both = bf16 and twin
        speed = f"{bf16['ms'] / twin['ms']:.2f}x" if both else "-"
        weights = f"{twin['weights_gb'] / bf16['weights_gb']:.3f}x" if both else "-"
        peak = f"{cell(bf16, 'peak_gb', '.2f')} / {cell(twin, 'peak_gb', '.2f')}"
        relation = f"{twin['error'] / twin['bf16_error']:.2f}" if twin and twin.get("bf16_error") else "-"
        lines.append(
            f"{model:12}{case:18}{cell(bf16, 'ms', '.3f'):>10}{cell(twin, 'ms', '.3f'):>10}{speed:>8}"
            f"{cell(twin or bf16, 'tokens_per_second', '.0f'):>10}{weights:>9}{peak:>16}"
            f"{cell(twin, 'error', '.2e'):>10}{relation:>9}"
        )
    return "\n".join(lines)


def choose(text: str, known: dict, what: str) -> list:
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            sys.exit(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return [known[name] for name in names]


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="all", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--cases", default="all", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--sides", default="all", help="of bf16, twin")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file, anew after every case")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--rotations", default="all", help=f"sites that rotate their input, of {', '.join(SITES)}; none"
    )
    parser.add_argument("--lm-head", choices=HEADS, default="keep", help="the twin side's output head")
    parser.add_argument("--attention", choices=("full", "sdpa"), default="full", help="sdpa: as transformers does it")
    parser.add_argument("--baseline-mode", default="default", help="mode of torch.compile for the bf16 side")
    parser.add_argument("--inner", default="inductor", help="who compiles, on both sides: inductor, aot_eager, eager")
    parser.add_argument("--layers", type=int, default=0, help="fewer decoder layers, to try things out")
    parser.add_argument("--geometry", choices=("full", "tiny"), default="full")
    parser.add_argument("--replays", type=int, default=0, help="timed runs; default 50 of decode and 20 of prefill")
    parser.add_argument("--no-gate", action="store_true", help="to look for a fault; the table then says unchecked")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--jobs", type=int, default=2, help="1: one side after the other, in this process; 4: decode and prefill apart"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "needs an NVIDIA GPU: torch.cuda.is_available() is False. --device cpu --geometry tiny tries the script"
        )
    rotated = "" if options.rotations == "none" else options.rotations
    options.rotations = choose(rotated, {site: site for site in SITES}, "site") if rotated else []
    options.sides = choose(options.sides, {side: side for side in SIDES}, "side")
    return options


def leave_own_folder() -> None:
    """This folder holds a kernels.py, and transformers looks for a package of that name."""
    here = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if pathlib.Path(path).resolve() != here]


def main(arguments: list[str] | None = None) -> list[dict]:
    leave_own_folder()
    options = parse(arguments)
    models = choose(options.models, {name: name for name in MODELS}, "model")
    available = CASES if options.geometry == "full" else TINY_CASES
    cases = choose(options.cases, {case.name: case for case in available}, "case")
    import transformers

    about = {
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scheme": "twin-w4a8",
        "rank": options.rank,
        "group_size": options.group_size,
        "rotations": options.rotations,
        "lm_head": options.lm_head,
        "attention": options.attention,
        "baseline_mode": options.baseline_mode,
        "layers": options.layers or "all",
        "gate": "unchecked" if options.no_gate else f"error <= {GATE} * bf16_error",
    }
    rows: list[dict] = []

    def record(row: dict) -> None:
        rows.append(copy.deepcopy(row))
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            partial.replace(options.json)

    for name in models:
        if options.jobs > 1:
            run_sides_together(name, cases, options, record)
        else:
            for side in options.sides:
                run_side(name, side, cases, options, record, contextlib.nullcontext)
                free(options.device)
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    print(table(rows))
    failed = [f"{row['model']} {row['side']} {row['case']}: {row['failed']}" for row in rows if "failed" in row]
    if failed:
        sys.exit("\n".join(failed))
    return rows


if __name__ == "__main__":
    main()
