"""How long and how much memory quantizing one block of an 8B model takes, and how fast the result generates.

Random weights at the geometry of Llama-3-8B, two blocks; time and memory do not depend on the values. Prints a
table and writes JSON with ``--json``. Needs a GPU.
"""

import argparse
import collections
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tqcompile
from tqcompile import backend

SCHEMES = ("rtn-w4a8", "gptq-w4a8", "svdquant-w4a8", "twin-w4a8", "twin-w4a4", "twin-w4a16")
BLOCKS = 2


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=BLOCKS,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(scheme: str, samples: int, seq_len: int, rank: int, compiled: bool = False) -> dict:
    """Quantize a fresh model; seconds are per block, generation is checked to run."""
    model = build()
    ids = torch.randint(0, 32000, (samples, seq_len), generator=torch.Generator().manual_seed(1))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tqcompile.compile(model, ids, scheme=scheme, rank=rank, backend=None, progress=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    out = model.generate(ids[:1, :16].cuda(), max_new_tokens=8, do_sample=False)
    if out.shape != (1, 24) and out[0, -1] != model.generation_config.eos_token_id:
        raise SystemExit(f"{scheme}: generate returned {tuple(out.shape)}")
    report = tqcompile.report(model)
    return {
        "scheme": scheme,
        "ops_compiled": _generate_compiled(model, ids[:1, :16].cuda()) if compiled else {},
        "seconds_per_block": seconds / BLOCKS,
        "seconds_in_methods_per_block": sum(layer.seconds for layer in report.layers) / BLOCKS,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "bits_per_weight": report.bits_per_weight,
        "mean_error": sum(layer.error for layer in report.layers) / len(report.layers),
    }


def _generate_compiled(model: LlamaForCausalLM, prompt: torch.Tensor) -> dict[str, int]:
    """Generate through torch.compile with a static cache; implementation of our ops -> how many nodes."""
    backend.reports.clear()
    model.compile(backend="twinquant", dynamic=True)
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, cache_implementation="static")
    if out.shape[0] != 1 or out.shape[1] <= prompt.shape[1]:
        raise SystemExit(f"compiled generate returned {tuple(out.shape)}")
    return dict(collections.Counter(choice for report in backend.reports for choice in report.lowered.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--generate", action="store_true", help="also generate through torch.compile (minutes)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU; torch.cuda.is_available() is False")
    measure("rtn-w4a8", 2, 64, args.rank)  # compiles the kernels, loads the libraries
    settings = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": args.samples * args.seq_len,
        "rank": args.rank,
    }
    rows = []
    for scheme in args.schemes.split(","):
        row = measure(scheme, args.samples, args.seq_len, args.rank, args.generate)
        rows.append(row)
        cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print("  ".join(cells), flush=True)
        if args.json:
            args.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
