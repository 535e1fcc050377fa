"""Times of the fused kernels against bf16 on one GPU; prints nothing that did not pass the correctness gate.

    python benchmarks/kernels.py [--json FILE] [--tokens 1,16] [--rank 64]

One run: for every layer shape and number of tokens the kernels are checked against float64 (worst case
bound, tests/kernel_bounds.py), then timed beside bf16 ``F.linear`` and a composition of stock kernels. Times
are of CUDA graphs of one call per weight copy; together the copies exceed the L2 cache, so every call reads
its weights from memory, as in a model. "w4a8" and "w4a4" include the activation quantization.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 3, 16, 64, 100, 512, 2048, 8192)
FORMS = ("w4a8", "w4a4", "w4a16")
GROUP = 128
COLD_BYTES = 200e6  # weight copies rotate through at least this much: three times a 60 MB L2 cache
COMPOSITION_TOKENS = 2048  # tinygemm is made for few tokens; more take seconds


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))


def copies_of(weights: list) -> list[list]:
    """Enough clones of ``weights`` (tensors or None) that together they exceed the L2 cache."""
    count = max(2, min(32, int(COLD_BYTES / bytes_of(weights)) + 1))
    clones = [[None if w is None else w.clone() for w in weights] for _ in range(count - 1)]
    return [weights, *clones]


def microseconds(call, copies: list[list], budget_ms: float = 12.0) -> float:
    """Median time of ``call(weights)`` in a CUDA graph of one call per weight copy."""
    call(copies[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(copies[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in copies:
            call(weights)

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    replay()
    rounds = max(3, min(30, int(budget_ms / max(replay(), 1e-3))))
    return statistics.median(replay() for _ in range(rounds)) * 1e3 / len(copies)


def composition(n: int, k: int, rank: int):
    """Stock kernels: 4-bit tinygemm of the residual, two bf16 matmuls of the low-rank part, one addition.

    Returns (call, weights), or (None, []) where this torch has no tinygemm for the GPU.
    """
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    try:
        tiny = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    except (AttributeError, RuntimeError) as error:
        print(f"no composition column: {error}", file=sys.stderr)
        return None, []
    weights = [
        tiny,
        torch.rand(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16) * 0.02,
        torch.randn(rank, k, device="cuda", dtype=torch.bfloat16),
        torch.randn(n, rank, device="cuda", dtype=torch.bfloat16),
    ]

    def call(w, x):
        residual = torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1])
        return residual + F.linear(F.linear(x, w[2]), w[3])

    return call, weights


def measure(name: str, tokens: tuple, rank: int) -> list[dict]:
    from kernel_bounds import random_twin_args, worst_quantize_activation, worst_twin_linear

    from tqcompile.kernels import quantize_activation, twin_linear

    n, k = SHAPES[name]
    dtype = torch.bfloat16
    dense = copies_of([torch.randn(n, k, device="cuda", dtype=dtype)])
    packed = copies_of(list(random_twin_args(1, n, k, rank, "w4a8", dtype, device="cuda", bias=False)[2:8]))
    stock, stock_weights = composition(n, k, rank)
    stock_copies = copies_of(stock_weights) if stock else []
    ratios = {"w4a8": 0.0, "w4a4": 7 / 127, "w4a16": 0.0}
    rows = []
    for t in tokens:
        x = torch.randn(t, k, device="cuda", dtype=dtype)
        row = {"layer": name, "N": n, "K": k, "T": t, "R": rank, "us": {}, "worst_error_over_bound": {}}

        def ours(weights, form, x=x):
            if form == "w4a16":
                return twin_linear.launch(x, None, *weights, None, 0.0, dtype)
            q, scale = quantize_activation.launch(x, None, None)
            return twin_linear.launch(q, scale, *weights, None, ratios[form], dtype)

        # The gate: the very calls that are timed, on fresh input. Many tokens: the first and last 512 only.
        q, scale = quantize_activation.launch(x, None, None)
        worst = {"quantize": worst_quantize_activation(q, scale, x, None, None)}
        some = torch.arange(t, device="cuda")
        some = some if t <= 2048 else torch.cat((some[:512], some[-512:]))
        for form in FORMS:
            inputs = (x[some], None) if form == "w4a16" else (q[some], scale[some])
            args = (*inputs, *packed[0], None, ratios[form], dtype)
            worst[form] = worst_twin_linear(ours(packed[0], form)[some], args)
        row["worst_error_over_bound"] = worst
        if not max(worst.values()) <= 1:
            sys.exit(f"{name} T={t}: an error exceeds its bound, no times are printed: {worst}")

        row["us"]["bf16"] = microseconds(lambda w, x=x: F.linear(x, w[0]), dense)
        if stock and t <= COMPOSITION_TOKENS:
            row["us"]["composed"] = microseconds(lambda w, x=x: stock(w, x), stock_copies[: 32 if t <= 100 else 2])
        row["us"]["quantize"] = microseconds(lambda w, x=x: quantize_activation.launch(x, None, None), packed)
        for form in FORMS:
            row["us"][form] = microseconds(lambda w, form=form: ours(w, form), packed)
        row["ratio_to_bf16"] = {key: row["us"]["bf16"] / us for key, us in row["us"].items() if key != "bf16"}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    columns = ("bf16", "composed", "quantize", *FORMS)
    lines = [f"{'layer':8}{'T':>6}" + "".join(f"{c:>18}" for c in columns) + f"{'error/bound':>13}"]
    for row in rows:
        cells = []
        for c in columns:
            us = row["us"].get(c)
            ratio = row["ratio_to_bf16"].get(c)
            cells.append("-" if us is None else f"{us:.1f}" + (f" ({ratio:.2f}x)" if ratio and c != "quantize" else ""))
        # Quantizing always comes close to its bound, half a step; the column shows the matrix products.
        worst = max(v for key, v in row["worst_error_over_bound"].items() if key != "quantize")
        lines.append(f"{row['layer']:8}{row['T']:6}" + "".join(f"{c:>18}" for c in cells) + f"{worst:13.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layers", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; torch.cuda.is_available() is False")
    import triton

    start = time.time()
    tokens = tuple(int(t) for t in options.tokens.split(","))
    rows = []
    for name in options.layers.split(","):
        rows += measure(name, tokens, options.rank)
        torch.cuda.empty_cache()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "group": GROUP,
        "seconds": round(time.time() - start, 1),
    }
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    print("microseconds (speed over bf16); every row passed its error bound first")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
