"""How much memory ``tqcompile quantize --stream`` takes, and whether a killed run gives the same bytes.

    python benchmarks/stream.py --kills 0 --json out.json           # 8 GB of weights
    python benchmarks/stream.py --layers 10 --hidden 1024 --intermediate 4096 --heads 16 --json out.json

Random bfloat16 weights in a Llama geometry, written shard by shard; the tokenizer is the embedded model's. The command
runs in a process of its own, whose peak resident memory is read from VmHWM: it counts pages of mapped files too. Then
it runs again, is killed (-9) at random moments and resumed, and the tensors of both checkpoints are compared.
"""

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tqcompile import demo
from tqcompile.checkpoint_files import hash_tensors

SHARD = 1_000_000_000
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def build(folder: Path, layers: int, vocabulary: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> int:
    """Write a random model to ``folder``; bytes of its weights. Never more than a shard is in memory."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(demo.MODEL_DIR / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    kv = hidden // heads * kv_heads
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden)}
    shapes |= {"mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate)}

    def tensors():
        def matrix(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

        yield "model.embed_tokens.weight", matrix(vocabulary, hidden)
        for layer in range(layers):
            for name, shape in shapes.items():
                yield f"model.layers.{layer}.{name}.weight", matrix(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)
        yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
        yield "lm_head.weight", matrix(vocabulary, hidden)

    shard, size, total, files = {}, 0, 0, {}

    def flush() -> None:
        file = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors():
        if size + tensor.nbytes > SHARD:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Run:
    """One start of the command; ``peak`` holds the fields of /proc/PID/status last read, in bytes."""

    def __init__(self, model: Path, out: Path, options: list[str], *more: str):
        command = [sys.executable, "-m", "tqcompile", "quantize", str(model), "--out", str(out), "--stream"]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen([*command, *options, *more], stdout=self.log, stderr=self.log)
        self.began = time.perf_counter()
        self.peak: dict[str, int] = {}

    def poll(self, until: float = float("inf")) -> int | None:
        """Wait for the end, or until so many seconds have passed; the exit status, None while it runs."""
        while self.process.poll() is None and self.seconds < until:
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines)
                for key in ("VmHWM", "RssAnon"):
                    self.peak[key] = max(self.peak.get(key, 0), int(fields[key].split()[0]) * 1024)
            except (OSError, KeyError):
                pass  # it has just ended
            time.sleep(0.1)
        return self.process.poll()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def finish(self) -> None:
        if self.poll() != 0:
            self.log.seek(0)
            raise SystemExit(self.log.read().decode(errors="replace")[-3000:])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def hashes(out: Path) -> dict[str, dict]:
    """Name, dtype, shape and sha256 of every tensor of a checkpoint."""
    return {name: entry for file in sorted(out.glob("*.safetensors")) for name, entry in hash_tensors(file).items()}


def killed(model: Path, out: Path, options: list[str], kills: int, seconds: float, seed: int) -> list[dict]:
    """Start, kill at a random moment, resume, and so on, then to the end. seconds: of a run that is left alone.

    Returns the moments; fewer than ``kills`` where a run was faster than that.
    """
    draw, found = random.Random(seed), []
    blocks = out.with_name(f"{out.name}.blocks")
    for start in range(kills):
        run = Run(model, out, options, *(["--resume"] if start else []))
        run.poll(draw.uniform(0, 2 * seconds / kills))
        run.kill()
        finished = len(list(blocks.glob("*.safetensors"))) if blocks.is_dir() else 0
        if out.exists() and not blocks.exists():
            return found  # it was done before it was killed
        found.append({"seconds": run.seconds, "blocks_finished": finished, "out_exists": out.exists()})
        print(f"killed after {run.seconds:.1f} s, {finished} blocks finished", flush=True)
    Run(model, out, options, *(["--resume"] if blocks.exists() else [])).finish()
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 57, "vocabulary": 128256, "hidden": 2048, "intermediate": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"heads": 32, "kv-heads": 8, "steps": 2, "tune": 0, "samples": 16, "seq-len": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scheme", default="twin-w4a16")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--override", action="append", default=[], help="handed to the command; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    sizes = (args.vocabulary, args.hidden, args.intermediate, args.heads, args.kv_heads)
    options = ["--calib", "stdlib", "--scheme", args.scheme, "--steps", str(args.steps), "--tune", str(args.tune)]
    options += ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
    options += [word for text in args.override for word in ("--override", text)]
    result = {key: value for key, value in vars(args).items() if key not in ("json", "folder")}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model, out = folder / "model", folder / "out"
        result["weight_bytes"] = build(model, args.layers, *sizes)
        print(f"{result['weight_bytes'] / 1e9:.2f} GB of weights", flush=True)
        run = Run(model, out, options, "--json", str(folder / "run.json"))
        run.finish()
        told = json.loads((folder / "run.json").read_text())
        result["whole"] = {
            "seconds": run.seconds,
            "vm_hwm_bytes": run.peak["VmHWM"],
            "rss_anon_bytes": run.peak["RssAnon"],
            "estimated_bytes": told["estimated_bytes"],
            "layers_quantized": collections.Counter(layer["scheme"] for layer in told["report"]["layers"]),
            "checkpoint_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        }
        print(f"peak {run.peak['VmHWM'] / 1e9:.2f} GB (VmHWM), {run.seconds:.0f} s", flush=True)
        write()
        if args.kills:
            result["kills_at"] = killed(model, folder / "again", options, args.kills, run.seconds, args.seed)
            first, second = hashes(out), hashes(folder / "again")
            result["tensors"] = len(first)
            result["equal"] = first == second
            print(f"{len(first)} tensors, {'equal' if first == second else 'DIFFERENT'}", flush=True)
        write()
    return result


if __name__ == "__main__":
    main()
