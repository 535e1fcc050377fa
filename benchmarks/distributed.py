"""One process against several that quantize the same model: equal bytes, equal perplexity, seconds.

    python benchmarks/distributed.py --json distributed.json          # the embedded model, one CPU thread a process
    python benchmarks/distributed.py --model llama-8b --device cuda   # two GPUs: random weights, Llama-3-8B's geometry
    python benchmarks/distributed.py --model DIR --scheme twin-w4a16

Learning is what the report counts as seconds of sites and of blocks: transforms, rounding, block tuning. The rest of
the whole is reading the data, capturing the graph, and passing the data through the blocks. Every run is a process (or
a group of them) of its own; of several repetitions the fastest learning counts.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# This folder holds a kernels.py, which transformers would take for the PyPI package of that name.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks")]

RANDOM = "llama-8b"


def load(name: str, device: str, samples: int, seq_len: int, blocks: int):
    """A model, calibration windows (samples, seq_len) and evaluation windows; of RANDOM both are random tokens."""
    from tqcompile import demo
    from tqcompile.commands import files

    if name == RANDOM:
        import transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=32000)
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.randint(0, 32000, (samples + 16, seq_len), generator=torch.Generator().manual_seed(1))
        return model, ids[16:], ids[:16]
    folder = Path(name)
    tokenizer = files.load_tokenizer(folder)
    texts = demo.calibration_texts(samples * seq_len * 8)
    model = files.load_model(folder, "float32" if device == "cpu" else "auto", device)
    held_out = demo.held_out_windows(tokenizer, 64, seq_len)
    return model, demo.windows(tokenizer, texts, samples, seq_len), held_out


def work(args: argparse.Namespace) -> None:
    """One process of a run: quantize, and if it is the first, write what was found to ``args.work``."""
    import tqcompile
    from tqcompile import distributed
    from tqcompile.evaluate import perplexity

    torch.set_num_threads(args.threads)
    with distributed.launched(args.device):
        model, calibration, held_out = load(args.model, args.device, args.samples, args.seq_len, args.blocks)
        settings = {"scheme": args.scheme, "steps": args.steps, "tune": args.tune, "rank": args.rank}
        began, cpu = time.perf_counter(), time.process_time()
        tqcompile.compile(model, calibration, **settings, shards=args.shards, backend=None, progress=False)
        if args.device != "cpu":
            torch.cuda.synchronize()
        whole, cpu = time.perf_counter() - began, time.process_time() - cpu
    if int(os.environ.get("RANK", 0)):
        return
    report = tqcompile.report(model)
    sites, blocks = (sum(record.seconds for record in records) for records in (report.layers, report.blocks))
    hashes = {}
    for name, tensor in model.state_dict().items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashes[name] = hashlib.sha256(data).hexdigest()
    found = {"learning": sites + blocks, "sites": sites, "tuning": blocks, "whole": whole, "cpu": cpu}
    found = {key: round(value, 3) for key, value in found.items()}
    found |= {"perplexity": perplexity(model, held_out), "hashes": hashes, "load": os.getloadavg()[0]}
    args.work.write_text(json.dumps(found))


def run(args: argparse.Namespace, processes: int, shards: int, folder: Path) -> dict:
    """The fastest of ``args.repeat`` runs with so many processes."""
    runs = []
    for _ in range(args.repeat):
        out = folder / "run.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else ()), __file__, "--work", str(out)]
        for name in ("model", "scheme", "device", "threads", "samples", "seq_len", "blocks", "steps", "tune", "rank"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += ["--shards", str(shards)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
        found = subprocess.run(command, env=env, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"{processes} processes failed:\n{found.stderr[-4000:]}")
        runs.append(json.loads(out.read_text()))
        print(f"{processes} process(es), {shards} shard(s): {_cells(runs[-1])}", flush=True)
    if any(other["hashes"] != runs[0]["hashes"] for other in runs):
        raise SystemExit(f"repeated runs of {processes} process(es) differ")
    return min(runs, key=lambda found: found["learning"])


def _cells(found: dict) -> str:
    return "  ".join(f"{key} {value:.5g}" for key, value in found.items() if key != "hashes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    embedded = str(ROOT / "tqcompile" / "demo" / "tiny-qwen3-5m")
    parser.add_argument("--model", default=embedded, help=f"folder of a Hugging Face model, or {RANDOM}")
    parser.add_argument("--scheme", default="twin-w4a8")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each kind")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2, help=f"of {RANDOM}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tune", type=int, default=30)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--unsharded", action="store_true", help="also one process with one shard")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        one = run(args, 1, args.shards, Path(folder))
        several = run(args, args.processes, args.shards, Path(folder))
        unsharded = run(args, 1, 1, Path(folder)) if args.unsharded else None
    names = one["hashes"].keys() | several["hashes"].keys()
    differing = [name for name in names if one["hashes"].get(name) != several["hashes"].get(name)]
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    fields = ("scheme", "processes", "threads", "samples", "seq_len", "steps", "tune", "rank", "shards", "repeat")
    result = {"model": Path(args.model).name, "device": device, "cores": os.cpu_count(), "torch": torch.__version__}
    result |= {name: getattr(args, name) for name in fields}
    result |= {"tensors": len(names), "differing": sorted(differing)}
    result["perplexity_change"] = abs(several["perplexity"] / one["perplexity"] - 1)
    for key in ("learning", "whole"):
        result[f"{key}_speedup"] = round(one[key] / several[key], 3)
    rows = {"one": one, "several": several} | ({"unsharded": unsharded} if unsharded else {})
    result |= {name: {k: v for k, v in found.items() if k != "hashes"} for name, found in rows.items()}
    print(f"{len(names)} tensors, {len(differing)} differ; perplexity changes by {result['perplexity_change']:.1e}")
    print(f"{args.processes} processes: learning {result['learning_speedup']} times as fast, the whole", end=" ")
    print(f"{result['whole_speedup']} times")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["perplexity_change"] > 1e-5:
        raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
