"""Perplexity of every scheme on held-out text: mean and spread over seeds, against the unquantized model.

    python benchmarks/accuracy.py --json accuracy.json                  # every method, embedded model
    python benchmarks/accuracy.py --ablation --json ablation.json       # what each part of twin brings
    python benchmarks/accuracy.py --low-bit --json low_bit.json         # every scheme below four bits, and their parts
    python benchmarks/accuracy.py --model DIR --device cuda --jobs 8 --inject

A run is one (model, scheme, seed, variant), made in a process of its own. Finished runs are in the JSON file and are
not repeated, so an interrupted call can be continued. A seed decides the calibration text and every random choice.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# This folder holds a kernels.py, which transformers would take for the PyPI package of that name.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks")]

METHODS = ("rtn", "gptq", "quarot", "spinquant", "svdquant", "twin")
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 128, 64
OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 30.0

# What an ablation changes: constants of modules ("module.NAME"), fields of the recipe, settings, or a function here.
ABLATIONS = {
    "everything": {},
    "no learned rotation": {"constants": {"learn.LR_ROTATION": 0.0}},
    "rotation learned at every site": {"constants": {"select.ROTATION_BUDGET": float("inf")}},
    "no learned scale": {"constants": {"learn.LR_SCALE": 0.0}},
    "no learned clips": {"constants": {"learn.LR_CLIP": 0.0}},
    "V fixed at the SVD": {"constants": {"learn.LR_FRAME": 0.0}},
    "G fixed": {"constants": {"learn.LR_FACTOR": 0.0}},
    "V and G fixed": {"constants": {"learn.LR_FRAME": 0.0, "learn.LR_FACTOR": 0.0}},
    "no low rank": {"recipe": {"low_rank_bits": 0}},
    "no GPTQ": {"recipe": {"gptq": False}},
    "residual stream rotated": {"settings": {"rotate_stream": True}},
    "low rank reads 4-bit input": {"call": "coarse_low_rank"},
    "tokens not balanced": {"recipe": {"balance": False}},
    "free group scales": {"recipe": {"grid": False}},
    "no block tuning": {"settings": {"tune": 0}},
    "closed form": {"settings": {"steps": 0, "tune": 0}},
}

_PLAIN = {"choose": False, "rotate": False, "smooth": False, "balance": False, "passes": 0}
_UNTUNED = {"tune": 0}
# Below four bits: D2Quant's two parts on plain GPTQ, and what else is in each method.
LOW_BIT_ABLATIONS = {
    "d2": {
        "untuned": {"settings": _UNTUNED},
        "GPTQ": {"recipe": {**_PLAIN, "dual": False, "correct": False}, "settings": _UNTUNED},
        "GPTQ, column scale": {"recipe": {**_PLAIN, "correct": False}, "settings": _UNTUNED},
        "GPTQ, mean correction": {"recipe": {**_PLAIN, "dual": False}, "settings": _UNTUNED},
        "GPTQ, both": {"recipe": _PLAIN, "settings": _UNTUNED},
        "GPTQ, both, tuned": {"recipe": _PLAIN},
        "untuned, no column scale": {"recipe": {"dual": False}, "settings": _UNTUNED},
        "untuned, no mean correction": {"recipe": {"correct": False}, "settings": _UNTUNED},
        "untuned, no coordinate passes": {"recipe": {"passes": 0}, "settings": _UNTUNED},
        "no mean correction": {"recipe": {"correct": False}},
    },
    "unisvq": {
        "untuned": {"settings": _UNTUNED},
        "untuned, T = I": {"recipe": {"learn_lattice": False}, "settings": _UNTUNED},
        "untuned, rows mixed too": {"recipe": {"mix_outputs": True}, "settings": _UNTUNED},
        "untuned, no rescaling": {"recipe": {"smooth": False}, "settings": _UNTUNED},
        "untuned, no coordinate passes": {"recipe": {"passes": 0}, "settings": _UNTUNED},
        "T = I": {"recipe": {"learn_lattice": False}},
        "rows mixed too": {"recipe": {"mix_outputs": True}},
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One measurement. model: the folder's name; variant: a key of ABLATIONS; settings: of ``tqcompile.Config``."""

    model: str
    scheme: str
    seed: int
    inject: bool = False
    variant: str = "everything"
    settings: tuple[tuple[str, int | float], ...] = ()

    def key(self) -> str:
        return json.dumps([self.model, self.scheme, self.seed, self.inject, self.variant, list(self.settings)])


def load(folder: str, device: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def inject_outliers(model, seed: int) -> None:
    """Multiply a few gains of every norm in front of linears and divide the linears' columns: the same function."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        for norm, readers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIER_CHANNELS]
            norm.weight[channels] *= OUTLIER_FACTOR
            for linear in readers:
                linear.weight[:, channels] /= OUTLIER_FACTOR


def coarse_low_rank() -> None:
    """Let the low-rank branch of 4-bit activations read the residual's 4 bits, in learning and in the layer."""
    import importlib

    from tqcompile import block_tuning
    from tqcompile.methods import learn, select, twin

    op = importlib.import_module("tqcompile.ops.twin_linear")  # the package's attribute of that name is the op
    exact, operands, fake = op.twin_linear_reference, twin.quantized_operands, learn.fake_quantize_activation

    def reference(x, x_scale, *rest):
        ratio = rest[-2]
        if ratio > 0:
            x = torch.round(x.float() * ratio).clamp(-8, 7) / ratio
        return exact(x, x_scale, *rest)

    def coarse_only(x, bits, ratio):
        coarse, _ = operands(x, bits, ratio)
        return coarse, coarse

    op.twin_linear_reference, op.kernel_or_reason = reference, lambda *_: None
    twin.quantized_operands = select.quantized_operands = coarse_only
    # The objective asks for 8 bits in the low-rank branch only where the residual reads 4.
    learn.fake_quantize_activation = lambda x, bits, clip=0.85: fake(x, 4, clip)
    block_tuning.fake_quantize_activation = learn.fake_quantize_activation


def apply_variant(variant: str, scheme: str) -> dict:
    """Change the modules of this process as the variant says; returns its settings."""
    import importlib

    from tqcompile.methods.recipe import LOW_BIT_RECIPES, RECIPES

    method, _, bits = scheme.partition("-")
    recipes = RECIPES if bits.startswith("w4") else LOW_BIT_RECIPES
    change = {**ABLATIONS, **LOW_BIT_ABLATIONS.get(method, {})}[variant]
    for name, value in change.get("constants", {}).items():
        module, _, constant = name.partition(".")
        module = importlib.import_module(f"tqcompile.methods.{module}")
        if not hasattr(module, constant):
            raise SystemExit(f"{variant}: {name} does not exist")
        setattr(module, constant, value)
    if "recipe" in change:
        recipes[method] = dataclasses.replace(recipes[method], **change["recipe"])
    if "call" in change:
        globals()[change["call"]]()
    return change.get("settings", {})


def measure(run: Run, folder: str, device: str) -> dict:
    """Perplexity, bits and seconds of one run; scheme "fp32" measures the model as it is."""
    import tqcompile
    from tqcompile import demo
    from tqcompile.evaluate import perplexity

    torch.manual_seed(run.seed)
    model, tokenizer = load(folder, device)
    if run.inject:
        inject_outliers(model, run.seed)
    held_out = demo.held_out_windows(tokenizer, EVALUATION_WINDOWS)
    result = {"seconds": 0.0, "bits": 32.0, "learned": None}
    if run.scheme != "fp32":
        texts = demo.calibration_texts(CALIBRATION_WINDOWS * demo.WINDOW * 5, run.seed)
        windows = demo.windows(tokenizer, texts, CALIBRATION_WINDOWS)
        settings = apply_variant(run.variant, run.scheme) | dict(run.settings)
        begin = time.perf_counter()
        tqcompile.compile(model, windows, scheme=run.scheme, seed=run.seed, backend=None, progress=False, **settings)
        result["seconds"] = time.perf_counter() - begin
        report = tqcompile.report(model)
        result["bits"] = report.bits_per_weight
        chosen = [r.learned_error < r.closed_error for r in report.layers if r.learned_error is not None]
        result["learned"] = sum(chosen) / len(chosen) if chosen else None
    return {**result, "perplexity": perplexity(model, held_out)}


def in_process(run: Run, args) -> dict:
    """:func:`measure` in a fresh interpreter."""
    one = json.dumps(dataclasses.asdict(run))
    command = [sys.executable, __file__, "--one", one, "--model", args.model, "--device", args.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{run.key()} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_all(runs: list[Run], args) -> dict[str, dict]:
    """All runs, at most ``args.jobs`` at a time; every finished one is written before the next is waited for."""
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    todo = [run for run in runs if run.key() not in found]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them already in the file", file=sys.stderr)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(in_process, run, args): run for run in todo}
        for future in concurrent.futures.as_completed(pending):
            run = pending[future]
            if future.exception():
                failed.append(str(future.exception()))
                print(failed[-1], file=sys.stderr)
                continue
            found[run.key()] = {**dataclasses.asdict(run), **future.result()}
            print(f"{run.scheme} seed {run.seed} {run.variant}: {found[run.key()]['perplexity']:.4f}", file=sys.stderr)
            if args.json:
                partial = args.json.with_suffix(".partial")
                partial.write_text(json.dumps(found, indent=1) + "\n")
                partial.replace(args.json)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed")
    return found


def table(runs: list[Run], found: dict[str, dict], baseline: float) -> str:
    """One line a scheme and variant: mean and spread (largest minus smallest) over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        if run.scheme != "fp32":
            groups.setdefault((run.scheme, run.variant), []).append(found[run.key()])
    lines = ["| scheme | variant | perplexity | vs fp32 | spread | bits/weight | learned sites | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (scheme, variant), rows in groups.items():
        values = [100 * (row["perplexity"] / baseline - 1) for row in rows]
        mean, spread = statistics.mean(values), max(values) - min(values)
        perplexity = statistics.mean(row["perplexity"] for row in rows)
        bits, seconds = (statistics.mean(row[name] for row in rows) for name in ("bits", "seconds"))
        learned = "" if rows[0]["learned"] is None else f"{100 * statistics.mean(r['learned'] for r in rows):.0f}%"
        lines.append(
            f"| {scheme} | {variant} | {perplexity:.4f} | {mean:+.2f}% | {spread:.2f}% | {bits:.2f} | {learned} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    from tqcompile import demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.MODEL_DIR), help="folder of a Hugging Face model")
    parser.add_argument("--schemes", help="comma-separated; default every method at w4a16, w4a8 and w4a4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--json", type=Path, help="results; runs already in it are not repeated")
    parser.add_argument("--inject", action="store_true", help="function-preserving outliers in norm channels")
    parser.add_argument("--ablation", action="store_true", help="leave out one part of twin at a time")
    parser.add_argument("--low-bit", action="store_true", help="all schemes below four bits, with their ablations")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=INT", help="a setting of Config")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        fields = json.loads(args.one)
        fields["settings"] = tuple(tuple(pair) for pair in fields["settings"])
        print(json.dumps(measure(Run(**fields), args.model, args.device)))
        return
    seeds = [int(seed) for seed in args.seeds.split(",")]
    settings = tuple((name, int(value)) for name, _, value in (item.partition("=") for item in args.set))
    if args.ablation:
        schemes = (args.schemes or "twin-w4a16,twin-w4a4").split(",")
        cases = [(scheme, variant) for scheme in schemes for variant in ABLATIONS]
        cases = [c for c in cases if c[1] != "low rank reads 4-bit input" or c[0].endswith("a4")]
    elif args.low_bit:
        from tqcompile.config import LOW_BIT_SCHEMES

        schemes = args.schemes.split(",") if args.schemes else LOW_BIT_SCHEMES
        cases = [(scheme, "everything") for scheme in schemes]
        cases += [(s, variant) for s in schemes for variant in LOW_BIT_ABLATIONS.get(s.partition("-")[0], ())]
    else:
        default = ",".join(f"{method}-w4a{bits}" for bits in (16, 8, 4) for method in METHODS)
        cases = [(scheme, "everything") for scheme in (args.schemes or default).split(",")]
    model = Path(args.model).resolve().name
    runs = [Run(model, "fp32", seeds[0], args.inject)]
    runs += [Run(model, scheme, seed, args.inject, v, settings) for scheme, v in cases for seed in seeds]
    found = run_all(runs, args)
    baseline = found[runs[0].key()]["perplexity"]
    print(f"{model}{' with outliers' if args.inject else ''}: fp32 perplexity {baseline:.4f}")
    print(table(runs, found, baseline))


if __name__ == "__main__":
    main()
