"""The command line: ``tqcompile demo``, ``tune`` and ``export``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tqcompile import __version__
from tqcompile.errors import TQError

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
) -> None:
    """Time the launch configurations of the fused kernel on this GPU and remember the fastest correct ones."""
    from tqcompile import tuner

    known = tuner.problems_of_checkpoint(model) if model else tuner.problems(shapes, rank, group_size, activations)
    tuner.run(known, tuner.numbers(tokens, "--tokens"), export)


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
    except TQError as error:
        print(f"tqcompile: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
