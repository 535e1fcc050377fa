"""The command line: options only; what a command does is in a module that it imports when it runs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from tqcompile import __version__
from tqcompile.config import Config, read_overrides
from tqcompile.errors import TQError

_DEFAULT = Config()

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print.")] = False,
) -> None:
    """Make Hugging Face models 4-bit and keep their quality."""


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Also write the table's numbers to this file.")] = None,
) -> None:
    """Quantize the embedded model with every method and compare; about three minutes on two CPU cores."""
    if json is not None and not json.parent.is_dir():
        raise typer.BadParameter(f"{json.parent} is not a directory", param_hint="--json")
    from tqcompile.demo.run import run

    run(json)


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Directory of a Hugging Face model (safetensors).")],
    calib: Annotated[
        str, typer.Option(help="Text to calibrate on: a file (.jsonl: one object with 'text' a line), or stdlib.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")],
    scheme: Annotated[str, typer.Option(help="<method>-w<weight bits>a<activation bits>.")] = _DEFAULT.scheme,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank component.")] = _DEFAULT.rank,
    group_size: Annotated[int, typer.Option(help="Weights that share one scale.")] = _DEFAULT.group_size,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A module or 're:' pattern to leave alone beside lm_head; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="For some layers: 'PATTERN keep' or 'PATTERN scheme=... rank=...'; repeatable."),
    ] = None,
    bits_budget: Annotated[
        float | None, typer.Option(help="Average bits per weight: bits, rank and group size are chosen layer by layer.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Learning steps per site.")] = _DEFAULT.steps,
    tune: Annotated[int, typer.Option(help="Steps of block tuning.")] = _DEFAULT.tune,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = _DEFAULT.samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = _DEFAULT.seq_len,
    shards: Annotated[
        int, typer.Option(help="Parts of a gradient; as many processes can share learning (see above).")
    ] = _DEFAULT.shards,
    seed: Annotated[int, typer.Option(help="Seeds every random choice.")] = _DEFAULT.seed,
    lm_head: Annotated[str, typer.Option(help="The output head: keep, w8a16 or w4a16.")] = _DEFAULT.lm_head,
    rotate_stream: Annotated[
        bool, typer.Option(help="Fold a rotation of the residual stream into the weights.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to work, e.g. cuda; the CPU by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that exists.")] = False,
    force: Annotated[bool, typer.Option(help="Start even if the memory will probably not do.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on behind the last finished block of an interrupted run.")] = False,
    stream: Annotated[bool, typer.Option(help="Keep one block in memory, not the model; same tensors.")] = False,
) -> None:
    """Quantize a model and save it with its report and tokenizer.

    Several processes share the work when they are started by `torchrun --nproc-per-node 2 -m tqcompile quantize ...`,
    with --device cuda one process a GPU; the result is that of one process.
    """
    settings = {"rank": rank, "group_size": group_size, "steps": steps, "tune": tune, "samples": samples}
    settings |= {"seq_len": seq_len, "seed": seed, "lm_head": lm_head, "rotate_stream": rotate_stream, "device": device}
    settings |= {"overrides": read_overrides(override or ()), "bits_budget": bits_budget, "shards": shards}
    config = Config(scheme=scheme, ignore=(*_DEFAULT.ignore, *(ignore or ())), **settings)
    from tqcompile.commands.quantize import run

    run(model, calib, out, config, dtype, overwrite, force, json, resume, stream)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A tqcompile checkpoint, or the original model to compare with.")],
    text: Annotated[
        str, typer.Option(help="A text file, or stdlib: Python modules the embedded model never saw.")
    ] = "stdlib",
    windows: Annotated[int, typer.Option(help="At most this many windows of the text.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    tasks: Annotated[str, typer.Option(help="Instead of a text: tasks of lm-eval, comma-separated.")] = "",
    limit: Annotated[int | None, typer.Option(help="With --tasks: at most so many examples a task.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Perplexity of a causal language model on a text, or its results in tasks."""
    if tasks:
        from tqcompile.commands.tasks import run

        run(model, [task.strip() for task in tasks.split(",")], limit, dtype, device, json)
    else:
        from tqcompile.commands.evaluate import run

        run(model, text, windows, seq_len, dtype, device, json)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="A tqcompile checkpoint, or the original model to compare with.")],
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens decoded behind it, one at a time.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    compiled: Annotated[bool, typer.Option(help="With torch.compile and the twinquant backend.")] = False,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Tokens per second of prefill and of decoding on this machine."""
    from tqcompile.commands.bench import run

    run(model, prompt, new, batch, compiled, dtype, device, json)


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="A tqcompile checkpoint.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with plots.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row a layer.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    original: Annotated[
        Path | None, typer.Option(help="The original model, for its weights' histograms in the page.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="A file of `bench --json`, for the page's table of speeds; repeatable.")
    ] = None,
) -> None:
    """What was done to every layer, and which layers to leave at more bits."""
    from tqcompile.commands.report import run

    run(model, html, csv, json, original, bench or ())


@app.command()
def info(json: Annotated[Path | None, typer.Option(help="Also write the facts to this file.")] = None) -> None:
    """What this machine can run, and why not the rest."""
    from tqcompile.commands.info import run

    run(json)


@app.command()
def tune(
    model: Annotated[Path | None, typer.Argument(help="A tqcompile checkpoint: tune for the shapes it has.")] = None,
    shapes: Annotated[str, typer.Option(help="Instead of a model: NxK,NxK (out-features x in-features).")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to tune for.")] = "1,4,16,32,64,128,256,512,2048,8192",
    rank: Annotated[int, typer.Option(help="With --shapes: rank of the low-rank component, 0 for none.")] = 64,
    group_size: Annotated[int, typer.Option(help="With --shapes: weights that share one scale.")] = 128,
    activations: Annotated[str, typer.Option(help="With --shapes: int8 (a4 and a8 schemes) or bfloat16.")] = "int8",
    export: Annotated[
        Path | None, typer.Option(help="Also write all of this GPU's results as a shipped table.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the times to this file.")] = None,
) -> None:
    """Time the launch configurations of the fused kernel on this GPU and remember the fastest correct ones."""
    from tqcompile import tuner
    from tqcompile.commands import files

    files.check_file(json, "--json")
    known = tuner.problems_of_checkpoint(model) if model else tuner.problems(shapes, rank, group_size, activations)
    outcomes = tuner.run(known, tuner.numbers(tokens, "--tokens"), export)
    files.write_json(json, {"outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]})


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A tqcompile checkpoint of a Hugging Face model.")],
    onnx: Annotated[Path, typer.Option(help="The .onnx file to write; its weights go beside it.")],
    form: Annotated[str, typer.Option(help="portable, ort (fastest in ONNX Runtime) or inlined.")] = "portable",
    opset: Annotated[int, typer.Option(help="Version of the standard operators, 21 to 23.")] = 21,
    past: Annotated[bool, typer.Option(help="Key/value cache as inputs and outputs.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    verify_steps: Annotated[int, typer.Option(help="Tokens decoded in the check of the file.")] = 32,
) -> None:
    """Export to ONNX, check the file against the model, and copy configuration and tokenizer beside it."""
    import torch

    import tqcompile
    from tqcompile.exporters.onnx import check_settings, check_target
    from tqcompile.exporters.session import require

    require("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    check_settings(form, opset, "float32")  # before a large model is read
    check_target(onnx, overwrite)
    loaded = tqcompile.load(model, dtype=torch.float32)
    tokenizer = model if (model / "tokenizer_config.json").is_file() else None
    settings = {"form": form, "opset": opset, "with_past": past, "overwrite": overwrite, "verify_steps": verify_steps}
    typer.echo(tqcompile.export_onnx(loaded, onnx, tokenizer=tokenizer, **settings))


def main() -> None:
    """Entry point of the ``tqcompile`` command; expected errors end in one line, not in a traceback."""
    try:
        app()
    except (TQError, OSError) as error:
        print(f"tqcompile: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
