"""A progress bar on stderr, or nothing."""

import sys


class Progress:
    """Counts sites: ``advance`` names the one just finished and its error. Silent when not ``shown``."""

    def __init__(self, shown: bool, title: str, total: int):
        self._shown, self._title, self._total = shown, title, total
        self._bar = None

    def __enter__(self) -> "Progress":
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
                console=Console(file=sys.stderr),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, last="")
        return self

    def advance(self, name: str, error: float | None = None) -> None:
        """One site is done."""
        if self._bar is not None:
            shown = f"{name} error {error:.4f}" if error is not None else name
            self._bar.update(self._task, advance=1, last=shown)

    def show(self, name: str, loss: float) -> None:
        """The site being learned, and its loss."""
        if self._bar is not None:
            self._bar.update(self._task, last=f"{name} loss {loss:.5f}")

    def __exit__(self, *_exc) -> None:
        if self._bar is not None:
            self._bar.stop()
