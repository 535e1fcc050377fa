"""Decoding on a CPU in ONNX Runtime: the forms of a quantized model beside the fp32 ONNX export of the same model.

    python benchmarks/onnx_cpu.py MODEL_DIR --json onnx-cpu.json     # a Hugging Face causal model; default: embedded

Every file is first checked: the exports by their own verification, all by their perplexity against torch. Decoding is
then timed with batch 1, the files in turn, several rounds in one process; the figure is the median step.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

import tqcompile
from tqcompile import demo
from tqcompile.evaluate import perplexity
from tqcompile.exporters.session import PAST, PRESENT, empty_cache
from tqcompile.exporters.trace import decoder_program, trace

NEAR = 0.005  # of torch's perplexity


def export_fp32(model, path: Path) -> None:
    """The unquantized model with the same inputs and outputs, through the same torch.onnx.export."""
    with torch.no_grad():
        ir.save(trace(*decoder_program(model), 21), path, external_data=f"{path.name}.data")


def file_perplexity(session, windows: torch.Tensor) -> float:
    """As ``tqcompile.evaluate.perplexity``, of an exported decoder. windows: (W, S) int64."""
    total, count = 0.0, 0
    for ids in windows.split(4):
        b, s = ids.shape
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((b, s), np.int64)}
        feed |= {"position_ids": np.tile(np.arange(s), (b, 1)), **empty_cache(session, b)}
        logits = torch.from_numpy(session.run(["logits"], feed)[0])[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def gate(name: str, found: float, expected: float) -> None:
    """End the script when a file's perplexity is not torch's."""
    if not abs(found / expected - 1) < NEAR:  # also when it is NaN
        raise SystemExit(f"{name}: perplexity {found:.4f}, but torch's is {expected:.4f}: nothing is timed")


def decode(session, prompt: np.ndarray, steps: int) -> list[float]:
    """Seconds of each of ``steps`` decoding steps after the prompt (1, s)."""
    names = [value.name for value in session.get_outputs()]
    cache, new, length, seconds = empty_cache(session, 1), prompt, 0, []
    for _ in range(steps + 1):
        length += new.shape[1]
        positions = np.arange(length - new.shape[1], length)[None]
        feed = {"input_ids": new, "attention_mask": np.ones((1, length), np.int64), "position_ids": positions, **cache}
        start = time.perf_counter()
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        seconds.append(time.perf_counter() - start)
        cache = {name: outputs[name.replace(PAST, PRESENT, 1)] for name in cache}
        new = outputs["logits"][:, -1:].argmax(-1)
    return seconds[1:]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo.MODEL_DIR, help="unquantized, with a tokenizer")
    parser.add_argument("--schemes", default="twin-w4a8,twin-w4a16")
    parser.add_argument("--forms", default="ort,portable")
    parser.add_argument("--steps", type=int, default=0, help="learning steps; speed does not depend on them")
    parser.add_argument("--lm-head", default="keep")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, for the perplexity")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before decoding begins")
    parser.add_argument("--decode", type=int, default=48, help="decoding steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: its own choice")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = demo.held_out_windows(tokenizer, args.windows)
    prompt, files, rows = windows[:1, : args.prompt].numpy(), {}, {}

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    with tempfile.TemporaryDirectory() as folder:
        model = load()
        files["fp32"] = Path(folder) / "fp32.onnx"
        export_fp32(model, files["fp32"])
        expected = {"fp32": perplexity(model, windows, batch_size=4)}
        for scheme in args.schemes.split(","):
            settings = {"steps": args.steps, "tune": args.steps // 4, "samples": 16, "seq_len": 256}
            settings |= {"lm_head": args.lm_head, "progress": False, "backend": None}
            texts = demo.calibration_texts(100_000)
            model = tqcompile.compile(load(), texts, tokenizer=tokenizer, scheme=scheme, **settings)
            reference = perplexity(model, windows, batch_size=4)
            for form in args.forms.split(","):
                name = f"{scheme} {form}"
                files[name] = Path(folder) / f"{scheme}-{form}.onnx"
                tqcompile.export_onnx(model, files[name], form=form)
                expected[name] = reference
        del model
        sessions = {name: tqcompile.ort_session(path, threads=args.threads) for name, path in files.items()}
        for name, session in sessions.items():
            found = file_perplexity(session, windows)
            if not abs(found / expected[name] - 1) < NEAR:
                raise SystemExit(
                    f"{name}: perplexity {found:.4f}, but torch's is {expected[name]:.4f}: nothing is timed"
                )
            size = sum(path.stat().st_size for path in (files[name], Path(f"{files[name]}.data")))
            rows[name] = {"perplexity": found, "torch_perplexity": expected[name], "megabytes": size / 1e6}
            decode(session, prompt, 4)
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(args.rounds):
            for name, session in sessions.items():
                seconds[name] += decode(session, prompt, args.decode)
    for name, row in rows.items():
        row["ms_per_token"] = float(np.median(seconds[name])) * 1e3
        row["speedup"] = float(np.median(seconds["fp32"]) / np.median(seconds[name]))
        print(f"{name:22}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()))
    result = {
        "cpu": cpu_name(),
        "threads": args.threads or torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "prompt": args.prompt,
        "lm_head": args.lm_head,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
