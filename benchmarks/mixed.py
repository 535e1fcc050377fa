"""``bits_budget`` against uniform bits at the same average: perplexity by the protocol of accuracy.py.

    python benchmarks/mixed.py --json mixed.json                                   # embedded model, closed form
    python benchmarks/mixed.py --schemes twin-w3a16 --full --model DIR --json mixed.json

For every scheme and seed the uniform model is made first; the other one gets that model's average as its budget.
Finished runs are in the JSON file and are not repeated.
"""

import argparse
from pathlib import Path

import accuracy

CLOSED_FORM = (("steps", 0), ("tune", 0))


def main() -> None:
    from tqcompile import demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.MODEL_DIR), help="folder of a Hugging Face model")
    parser.add_argument("--schemes", default="gptq-w3a16,twin-w3a16,twin-w4a8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--full", action="store_true", help="with learning and block tuning; else closed form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--json", type=Path, help="results; runs already in it are not repeated")
    args = parser.parse_args()
    model, settings = Path(args.model).resolve().name, () if args.full else CLOSED_FORM
    seeds = [int(seed) for seed in args.seeds.split(",")]
    exact = accuracy.Run(model, "fp32", seeds[0])
    uniform = [
        accuracy.Run(model, scheme, seed, settings=settings) for scheme in args.schemes.split(",") for seed in seeds
    ]
    found = accuracy.run_all([exact, *uniform], args)
    pairs = []
    for run in uniform:
        budget = found[run.key()]["bits"]
        pairs.append((run, accuracy.Run(model, run.scheme, run.seed, settings=(*settings, ("bits_budget", budget)))))
    found |= accuracy.run_all([mixed for _, mixed in pairs], args)
    print(f"{model}: fp32 perplexity {found[exact.key()]['perplexity']:.4f}")
    print("| scheme | seed | uniform: bits | perplexity | bits_budget: bits | perplexity |\n|---|---|---|---|---|---|")
    for run, mixed in pairs:
        cells = [f"{found[r.key()]['bits']:.3f} | {found[r.key()]['perplexity']:.4f}" for r in (run, mixed)]
        print(f"| {run.scheme} | {run.seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
