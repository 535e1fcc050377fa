"""The command line: ``tqcompile demo`` and what later commands join."""

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
    """Quantize the embedded model with every method and compare; about two minutes on two CPU cores."""
    if json is not None and not json.parent.is_dir():
        raise typer.BadParameter(f"{json.parent} is not a directory", param_hint="--json")
    from tqcompile.demo.run import run

    run(json)


def main() -> None:
    """Entry point of the ``tqcompile`` command; expected errors end in one line, not in a traceback."""
    try:
        app()
    except TQError as error:
        print(f"tqcompile: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
