"""How much memory the export of a large model takes, beside the size of its weights.

    python benchmarks/onnx_memory.py --form ort                    # about 4 GB of weights; needs twice that on disk

Random weights at the geometry of Llama-3-8B, as many layers as asked for; nothing is calibrated. Prints the resident
memory after each stage, and loads and runs the file once more in a session of its own.
"""

import argparse
import contextlib
import json
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tqcompile
from tqcompile.exporters import onnx, session
from tqcompile.methods.components import LinearSpec
from tqcompile.modules import TwinLinear


def build(layers: int, vocabulary: int, small: bool) -> LlamaForCausalLM:
    """A decoder whose linears are TwinLinears with random codes; never more in memory than that."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                spec = LinearSpec(module.out_features, module.in_features, rank=64, group_size=128, act_bits=8)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, TwinLinear(spec))
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.tie_weights()
    rotary = model.model.rotary_emb
    rotary.__init__(config)  # its frequencies are computed, not stored
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif name.endswith("weight_scale"):
            tensor.uniform_(0.001, 0.003, generator=generator)
        elif tensor.dim() == 1:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 0.02, generator=generator)
    return model


def resident() -> dict[str, float]:
    """GB of this process: now, of that not backed by a file, and at most so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, anonymous = (int(status[key].split()[0]) / 1e6 for key in ("VmRSS", "RssAnon"))
    return {"now": now, "anonymous": anonymous, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="ort", choices=onnx.FORMS)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--small", action="store_true", help="a small geometry, to try the script")
    parser.add_argument("--verify-steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    stages, start = {"start": resident()}, time.perf_counter()
    model = build(args.layers, args.vocabulary, args.small)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    weights = sum(tensors.values()) / 1e9
    stages["model"] = resident()

    def record(function, name):
        def recorded(*positional, **named):
            result = function(*positional, **named)
            stages[name] = resident()
            return result

        return recorded

    with contextlib.ExitStack() as stack:
        for name in ("trace", "_save", "verify"):
            stack.enter_context(mock.patch.object(onnx, name, record(getattr(onnx, name), name)))
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))) / "model.onnx"
        report = tqcompile.export_onnx(model, path, form=args.form, verify_steps=args.verify_steps)
        seconds = time.perf_counter() - start
        tokens = session.generate(tqcompile.ort_session(path), torch.arange(8)[None].numpy(), 4)
    print(report)
    for name, sizes in stages.items():
        print(f"{name:8}" + "".join(f"  {key} {value:.2f} GB" for key, value in sizes.items()))
    ratio = (stages["verify"]["peak"] - stages["start"]["peak"]) / weights
    print(f"weights {weights:.2f} GB, peak {ratio:.2f} times that, {seconds:.0f} s, generated {tokens.tolist()[0]}")
    result = {"form": args.form, "weights_gb": weights, "ratio": ratio, "seconds": seconds, "stages": stages}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
