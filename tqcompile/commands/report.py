"""``tqcompile report``: what was done to every layer of a checkpoint; reads its manifest, and weights for the plots."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tqcompile import checkpoint
from tqcompile.commands import files
from tqcompile.errors import CheckpointError, ConfigError
from tqcompile.reporting import Report, Sensitivity, sensitivity

SHOWN = 10


def read(directory: Path) -> Report:
    """The report in a checkpoint's manifest; no weight is read.

    Raises:
        CheckpointError: the directory is no tqcompile checkpoint, or its manifest is missing or damaged.
    """
    path = Path(directory) / checkpoint.MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no {checkpoint.MANIFEST}; save the model with tqcompile.save.")
    try:
        return Report.from_dict(json_module.loads(path.read_text(encoding="utf-8"))["report"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no readable report ({error!r}); it was altered.") from error


def run(
    directory: Path,
    html: Path | None = None,
    csv: Path | None = None,
    json: Path | None = None,
    original: Path | None = None,
    speeds: Sequence[Path] = (),
) -> Report:
    """Print the report and the sensitivity ranking; write them as HTML, CSV or JSON where asked.

    speeds: files that ``tqcompile bench --json`` wrote, for a table in the page.
    """
    for path, option in ((html, "--html"), (csv, "--csv"), (json, "--json")):
        files.check_file(path, option)
    measured = [_read_speed(path) for path in speeds]
    report = read(directory)
    print(report)
    ranking = sensitivity(report)
    if ranking:
        print_ranking(ranking)
    if html is not None:
        from tqcompile.commands.html_report import page

        files.write_text(html, page(report, directory, original, measured))
    if csv is not None:
        report.to_csv(csv)
    files.write_json(json, {**report.to_dict(), "sensitivity": [vars(entry) for entry in ranking]})
    return report


def _read_speed(path: Path) -> dict:
    """A result of ``tqcompile bench``. Raises ConfigError when the file is none."""
    from tqcompile.commands.html_report import SPEED_FIELDS

    try:
        found = json_module.loads(path.read_text(encoding="utf-8"))
        rates = [found[f"{name}_tokens_per_second"] for name in ("prefill", "decode")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--bench {path} is no result of tqcompile bench --json ({error!r})") from error
    if not all(isinstance(rate, int | float) for rate in rates) or not found.keys() >= set(SPEED_FIELDS):
        raise ConfigError(f"--bench {path} is no result of tqcompile bench --json")
    return found


def print_ranking(ranking: list[Sensitivity]) -> None:
    """A table of the layers that more bits would help most."""
    table = Table("layer", title="leave these at more bits first")
    for heading in ("error", "share of error", "bits if 8", "bits if 16"):
        table.add_column(heading, justify="right")
    for entry in ranking[:SHOWN]:
        bits = f"{entry.bits_at_8:.2f}", f"{entry.bits_at_16:.2f}"
        table.add_row(escape(entry.name), f"{entry.error:.4f}", f"{100 * entry.share:.1f}%", *bits)
    Console(width=120).print(table)
