"""Time ``lattice_linear`` (2 and 3 bits) against bf16 ``F.linear`` and the 4-bit weight-only kernel on this GPU.

    python benchmarks/low_bit.py --json low_bit.json

Every kernel is first compared with the plain-torch definition. Times are medians over replays of a CUDA graph that
goes through enough copies of the weights to leave the L2 cache. "lattice" is the 2-bit product with its activation
transform (a block-128 rotation) in front, as a UniSVQ layer runs it.
"""

import argparse
import json
import statistics
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


def milliseconds(calls, replays: int) -> float:
    """Median time of one of ``calls``, all of them captured in one CUDA graph."""
    from tqcompile import tuner

    replay, _ = tuner.capture(lambda: [call() for call in calls])
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times[replays // 5 :])


def measure(n: int, k: int, t: int, replays: int) -> dict:
    from tqcompile import ops
    from tqcompile.kernels import lattice_linear as kernel
    from tqcompile.ops.quantize_activation import transform_activation

    x = torch.randn(t, k, device="cuda", dtype=torch.bfloat16)
    rotation = torch.linalg.qr(torch.randn(128, 128, device="cuda"))[0].bfloat16()
    forms = {}
    for name, bits, group, lattice in (("w2", 2, 128, False), ("w3", 3, 128, False), ("lattice", 2, 128, True)):
        copies = [weights(n, k, bits, group, lattice) for _ in range(max(1, int(CACHE / (n * k * bits / 8))))]
        args = (x, *copies[0], None, bits)
        reason = kernel.unsupported(*args)
        if reason is not None:
            raise SystemExit(f"{name}: {reason}")
        found, exact = ops.lattice_linear(*args).float(), ops.lattice_linear_reference(*args).float()
        if (found - exact).norm() > 0.01 * exact.norm():
            raise SystemExit(f"{name} {n}x{k} T={t}: wrong result, {float((found - exact).norm() / exact.norm()):.3g}")

        def call(copy, bits=bits, lattice=lattice):
            u = transform_activation(x, None, rotation) if lattice else x
            return ops.lattice_linear(u, *copy, None, bits)

        forms[name] = milliseconds([lambda c=c, call=call: call(c) for c in copies], replays)
    packed = [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda") for _ in range(3)]
    scale = (torch.rand(n, k // 128, device="cuda") * 0.02 + 0.01).bfloat16()
    rest = (scale, None, None, None, None, None, 0.0, torch.bfloat16)
    forms["w4"] = milliseconds([lambda w=w: ops.twin_linear(x, None, w, *rest) for w in packed], replays)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(1, int(CACHE / (2 * n * k))))]
    forms["bf16"] = milliseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense], replays)
    return {"n": n, "k": k, "t": t, "milliseconds": forms, "form": "dense" if t > kernel.DENSE_TOKENS else "fused"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--replays", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES:
        for t in TOKENS:
            rows.append(measure(n, k, t, args.replays))
            times = rows[-1]["milliseconds"]
            speed = ", ".join(f"{name} {times['bf16'] / value:.2f}x" for name, value in times.items() if name != "bf16")
            print(f"{n}x{k} T={t}: bf16 {1e3 * times['bf16']:.1f} us; over bf16: {speed} ({rows[-1]['form']})")
    if args.json:
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
