"""Every form of an exported model against torch: prefill, 32 cached decoding steps, and the perplexity in the file.

    python benchmarks/onnx_forms.py MODEL_DIR --json onnx-forms.json   # a Hugging Face causal model; default: embedded

Each file passes the verification of ``export_onnx`` or ends the script. Written down beside that: whether greedy tokens
are equal when both programs run on their own, and how far the perplexity of the file is from torch's.
"""

import argparse
import json
import tempfile
from pathlib import Path

import onnxruntime
import torch
from onnx_cpu import file_perplexity

import tqcompile
from tqcompile import demo
from tqcompile.config import Scheme
from tqcompile.evaluate import perplexity
from tqcompile.exporters.onnx import FORMS

SCHEMES = "twin-w4a16,twin-w4a8,twin-w4a4,d2-w3a16,unisvq-w2a16"


def measure(model, folder: Path, form: str, opset: int, windows: torch.Tensor, expected: float) -> dict:
    """One file: exported, verified, and its perplexity over ``windows`` (W, S) beside torch's ``expected``."""
    found = tqcompile.export_onnx(model, folder / f"{form}-{opset}.onnx", form=form, opset=opset)
    session = tqcompile.ort_session(found.path)
    return {
        "form": form,
        "opset": opset,
        "difference": found.difference,
        "free_difference": found.free_difference,
        "tipped": found.tipped,
        "steps": found.steps,
        "positions": found.positions,
        "same_greedy_token": found.agreeing,
        "of_fp16": found.layer_bytes / found.fp16_bytes,
        "perplexity": file_perplexity(session, windows),
        "torch_perplexity": expected,
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo.MODEL_DIR, help="unquantized, with a tokenizer")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--opsets", default="21,23")
    parser.add_argument(
        "--steps", type=int, default=0, help="learning steps; what a file computes does not depend on them"
    )
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, for the perplexity")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows, rows = demo.held_out_windows(tokenizer, args.windows), []
    for scheme in args.schemes.split(","):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        settings = {"steps": args.steps, "tune": args.steps // 4, "samples": 16, "seq_len": 256}
        texts = demo.calibration_texts(100_000)
        tqcompile.compile(
            model, texts, tokenizer=tokenizer, scheme=scheme, progress=False, backend=None, **settings
        )  # fmt: skip
        expected = perplexity(model, windows, batch_size=4)
        for form in FORMS:
            if form == "ort" and Scheme.parse(scheme).weight_bits < 4:
                continue  # refused: ONNX Runtime has no product of that form
            for opset in map(int, args.opsets.split(",")):
                with tempfile.TemporaryDirectory() as folder:
                    row = {"scheme": scheme, **measure(model, Path(folder), form, opset, windows, expected)}
                rows.append(row)
                print(
                    "  ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{v}" for key, v in row.items()),
                    flush=True,
                )
                if args.json:
                    about = {"model": args.model.resolve().name, "onnxruntime": onnxruntime.__version__, "rows": rows}
                    args.json.write_text(json.dumps(about, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
