"""Time ``lattice_linear`` (2 and 3 bits) against bf16 ``F.linear`` and the 4-bit weight-only kernel on this GPU.

    python benchmarks/low_bit.py --json low_bit.json

Every kernel is first compared with the plain-torch definition. Times are medians over replays of CUDA graphs that
go through enough copies of the weights to leave the L2 cache; the forms of a layer take turns. "w2" and "w3" have zero
points, "lattice" an offset; "transform + lattice" is a UniSVQ layer as it runs after lowering: ``prologue`` with a
block-128 rotation in front. "w4" is the product of the 4-bit weight-only form.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# This folder holds a kernels.py, which transformers would take for the PyPI package of that name.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks")]

SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
CACHE = 150e6  # bytes of weights that one graph goes through, at least


def weights(n: int, k: int, bits: int, group: int, lattice: bool):
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n, k // group, device="cuda") * 0.02 + 0.01).bfloat16()
    zero = None if lattice else torch.randint(0, 64, scale.shape, device="cuda").to(torch.uint8)
    return codes, scale, zero, torch.full((4,), -1.5, device="cuda") if lattice else None


def checked(name: str, found: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((found.float() - exact.float()).norm() / exact.float().norm())
    if not error < 0.01:
        raise SystemExit(f"{name}: wrong result, relative error {error:.3g}")


def measure(n: int, k: int, t: int) -> dict:
    """Microseconds of every form of one layer."""
    from tqcompile import ops, tuner
    from tqcompile.kernels import lattice_linear as kernel
    from tqcompile.ops.quantize_activation import transform_activation

    x = torch.randn(t, k, device="cuda", dtype=torch.bfloat16)
    rotation = torch.linalg.qr(torch.randn(128, 128, device="cuda"))[0].bfloat16().contiguous()  # as layers hold it
    calls, form = {}, ""

    def transformed(x):
        return ops.prologue(x, None, None, None, rotation, None, None, "none", 0.0, 16, 0.0, False)[0]

    checked("transform", transformed(x), transform_activation(x, None, rotation))
    for name, bits, lattice in (("w2", 2, False), ("w3", 3, False), ("lattice", 2, True)):
        copies = [weights(n, k, bits, 128, lattice) for _ in range(max(1, int(CACHE / (n * k * bits / 8))))]
        args = (x, *copies[0], None, bits)
        reason = kernel.unsupported(*args)
        if reason is not None:
            raise SystemExit(f"{name}: {reason}")

        def product(x, copy, bits=bits):
            return ops.lattice_linear(x, *copy, None, bits)

        checked(f"{name} {n}x{k} T={t}", product(x, copies[0]), ops.lattice_linear_reference(*args))
        form = kernel.describe(*args)
        calls[name] = (lambda copy, product=product: product(x, copy), copies)
        if lattice:
            calls["transform + lattice"] = (lambda copy, product=product: product(transformed(x), copy), copies)
    problem = tuner.Problem(n, k, 0, 128, torch.bfloat16, True)
    four = [tuner.twin_gemm_arguments(problem, t, seed) for seed in range(max(1, int(CACHE / (n * k / 2))))]
    checked(f"w4 {n}x{k} T={t}", ops.twin_gemm(*four[0]), ops.twin_gemm_reference(*four[0]))
    calls["w4"] = (lambda args: ops.twin_gemm(*args), four)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(1, int(CACHE / (2 * n * k))))]
    calls["bf16"] = (lambda w: torch.nn.functional.linear(x, w), dense)
    times = tuner.times_in_turns({key: tuner.timer(*given) for key, given in calls.items()})
    return {"n": n, "k": k, "t": t, "microseconds": times, "form": form}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        for t in TOKENS:
            rows.append(measure(n, k, t))
            times = rows[-1]["microseconds"]
            speed = ", ".join(f"{name} {times['bf16'] / value:.2f}x" for name, value in times.items() if name != "bf16")
            line = f"{n}x{k} T={t}: bf16 {times['bf16']:.1f} us; over bf16: {speed} ({rows[-1]['form']})"
            print(line, flush=True)
            if args.json:
                result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
