"""Times of the prologue kernel on one GPU beside its floor of bytes; prints nothing that failed the correctness gate.

    python benchmarks/prologue.py [--json FILE] [--tokens 1,16] [--rank 64] [--bits 8]

Sites of an 8B model; what is read is in the L2 cache where it fits, as right after the kernel before. "floor" is what
must be read and written, at 4.3 TB/s. "separate" is the work without t as torch and the portable kernel do it: the
norm or gate by Inductor, then ``quantize_activation``.
"""

import argparse
import json
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SITES = {
    "attention input": (4096, "rms_norm", False),
    "o_proj": (4096, "none", False),
    "gate/up input": (4096, "rms_norm", True),
    "down_proj": (14336, "silu_mul", True),
}
TOKENS = (1, 4, 16, 64, 128, 512, 2048, 8192)
BYTES_PER_US = 4.3e6


def separate(args):
    """The producer as Inductor fuses it, then the portable quantization."""
    from tqcompile import ops
    from tqcompile.ops.prologue import _produce

    _, _, _, scale, rotation, _, _, kind, eps, _, _ = args
    torch._dynamo.reset()  # after eight shapes it would stop to compile
    produce = torch.compile(lambda x, other, gain: _produce(x, other, gain, kind, eps), dynamic=False)
    return lambda x, other, gain: ops.quantize_activation(produce(x, other, gain)[0], scale, rotation)


def measure(name: str, t: int, rank: int, bits: int, block: int | None) -> dict:
    from kernel_bounds import random_prologue_args, worst_prologue
    from triton.testing import do_bench_cudagraph

    from tqcompile.kernels import prologue

    k, kind, other = SITES[name]
    args = random_prologue_args(t, k, rank, 128, block, False, kind, other, torch.bfloat16, bits, device="cuda")
    result = prologue.launch(*args)
    worst = worst_prologue(result, args, prologue.launch(*args[:-2], 8, 0.0) if bits == 4 else None)
    if not worst <= 1:
        sys.exit(f"{name} T={t}: the error is {worst} times its bound, no times are printed")
    moved = sum(a.numel() * a.element_size() for a in (*args[:7], *result) if torch.is_tensor(a))
    row = {"site": name, "K": k, "T": t, "R": rank, "bits": bits, "rotation": block, "floor_us": moved / BYTES_PER_US}
    row["plan"] = prologue.choose_plan(t, k, rank, 128, block or 0, bits)._asdict()
    apart = separate(args)
    apart(*args[:3])
    row["us"] = 1e3 * do_bench_cudagraph(lambda: prologue.launch(*args), return_mode="median")
    row["separate_us"] = 1e3 * do_bench_cudagraph(lambda: apart(*args[:3]), return_mode="median")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8, 16))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; torch.cuda.is_available() is False")
    rows = []
    print(f"{'site':16} {'rotation':>8} {'T':>5} {'us':>8} {'floor':>8} {'separate':>9}")
    for name in SITES:
        for block in (128, None):
            for t in map(int, options.tokens.split(",")):
                row = measure(name, t, options.rank, options.bits, block)
                rows.append(row)
                numbers = f"{row['us']:8.2f} {row['floor_us']:8.2f} {row['separate_us']:9.2f}"
                print(f"{name:16} {block or '-':>8} {t:5} {numbers}", flush=True)
    if options.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
