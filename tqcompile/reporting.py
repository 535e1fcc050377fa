"""The report: what happened to every layer, and why some were left alone."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import torch
from torch import nn

from tqcompile.checkpoint_files import check_types
from tqcompile.errors import ModelError
from tqcompile.modules import Int8Linear, TwinLinear

SPREAD_RANGE, SPREAD_BINS = 8.0, 48


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """One quantized linear.

    shape: (N, K). error: relative output error ||y_q - y|| / ||y|| on held-out calibration rows, None when
    data-free. bits: stored bits per weight, everything included. transform: what is applied to the input, and where
    it went. seconds: time spent on its site. closed_error, learned_error: of its site with the closed-form and with
    the learned transform on held-out rows (the smaller one was kept), None where nothing was learned.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    rank: int
    error: float | None
    bits: float
    transform: str
    seconds: float
    closed_error: float | None = None
    learned_error: float | None = None


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """One tuned block. before, after: mean over held-out tokens of the squared error of its output against the
    full-precision model's, relative to the token's energy. kept: whether it was better tuned. seconds: time spent."""

    name: str
    before: float
    after: float
    kept: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What ``bits_budget`` gave a site, and why. bits: per weight, at most. loss: estimated divergence of the model's
    output that this site adds. measured: scheme -> that divergence, measured in closed form in a uniformly quantized
    model, at its rank and group size."""

    name: str
    scheme: str
    rank: int
    group_size: int
    bits: float
    loss: float
    measured: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the held-out inputs of a site are distributed. before, after: counts in SPREAD_BINS equal bins over -8 to 8
    root mean squares, outer ones at the ends, of what the site read and of what its linears read once transformed.
    peak_before, peak_after: the largest magnitude, in the same unit."""

    name: str
    before: list[int]
    after: list[int]
    peak_before: float
    peak_after: float


def spread(name: str, before: torch.Tensor, after: torch.Tensor) -> Spread:
    """The spread of (T, K) inputs before and after their transform."""
    (counts, peak), (counts_after, peak_after) = (histogram(x.float(), SPREAD_BINS) for x in (before, after))
    return Spread(name, counts, counts_after, peak, peak_after)


def histogram(values: torch.Tensor, bins: int) -> tuple[list[int], float]:
    """Counts in equal bins over -SPREAD_RANGE to SPREAD_RANGE root mean squares, outer ones at the ends, and the
    largest magnitude in that unit."""
    unit = values.square().mean().sqrt().clamp_min(1e-30)
    scaled = (values / unit).clamp(-SPREAD_RANGE, SPREAD_RANGE)
    counts = torch.histc(scaled, bins, -SPREAD_RANGE, SPREAD_RANGE)
    return [int(n) for n in counts], float(values.abs().max() / unit)


def _checked_spread(found: Spread) -> Spread:
    counts = all(isinstance(c, list) and c and all(isinstance(n, int) for n in c) for c in (found.before, found.after))
    peaks = all(isinstance(peak, int | float) for peak in (found.peak_before, found.peak_after))
    if not (counts and peaks and isinstance(found.name, str)):
        raise TypeError(f"spread of {found.name!r} is {found!r}")
    return found


@dataclasses.dataclass
class Report:
    """layers: quantized linears. skipped: name -> reason. notes: facts about the whole run. config: the settings.
    blocks: what block tuning did; errors of layers are those before it. choices: of ``bits_budget``, by site.
    spreads: of the inputs, by site."""

    config: dict
    layers: list[LayerRecord] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    blocks: list[BlockRecord] = dataclasses.field(default_factory=list)
    choices: list[Choice] = dataclasses.field(default_factory=list)
    spreads: list[Spread] = dataclasses.field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all quantized layers: codes, scales, low rank and transforms."""
        weights = [record.shape[0] * record.shape[1] for record in self.layers]
        return sum(r.bits * w for r, w in zip(self.layers, weights, strict=True)) / max(1, sum(weights))

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "bits_per_weight": self.bits_per_weight}

    @staticmethod
    def from_dict(data: dict) -> "Report":
        """The inverse of :meth:`to_dict`. Raises KeyError, TypeError or ValueError on what is no report."""
        layers = [check_types(LayerRecord(**{**layer, "shape": tuple(layer["shape"])})) for layer in data["layers"]]
        blocks = [check_types(BlockRecord(**block)) for block in data.get("blocks", [])]
        choices = [_checked_choice(Choice(**choice)) for choice in data.get("choices", [])]
        spreads = [_checked_spread(Spread(**found)) for found in data.get("spreads", [])]
        lists = (dict(data["skipped"]), list(data["notes"]), blocks, choices, spreads)
        found = Report(dict(data["config"]), layers, *lists)
        if not all(isinstance(text, str) for text in [*found.skipped.values(), *found.notes]):
            raise TypeError("a reason or a note is no text")
        return found

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_csv(self, path: str | Path) -> None:
        """Write one row a layer, skipped ones with their reason in the column ``skipped``."""
        fields = [field.name for field in dataclasses.fields(LayerRecord)]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*fields, "skipped"])
            writer.writeheader()
            for layer in self.layers:
                writer.writerow({**dataclasses.asdict(layer), "shape": f"{layer.shape[0]}x{layer.shape[1]}"})
            for name, reason in self.skipped.items():
                writer.writerow({"name": name, "skipped": reason})

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, record=True, file=io.StringIO())
        self._print(console)
        return console.export_text().rstrip()

    def _print(self, console) -> None:
        from rich.markup import escape
        from rich.table import Table

        table = Table("layer", "shape", "scheme", "rank", "error", "bits", "transform", title="tqcompile report")
        for r in self.layers:
            error = "data-free" if r.error is None else f"{r.error:.4f}"
            cells = (r.name, f"{r.shape[0]}x{r.shape[1]}", r.scheme, str(r.rank), error, f"{r.bits:.2f}", r.transform)
            table.add_row(*map(escape, cells))
        console.print(table)
        for name, reason in self.skipped.items():
            console.print(f"skipped {name}: {reason}", markup=False, highlight=False)
        chosen = [r for r in self.layers if r.learned_error is not None]
        if chosen:
            won = [r for r in chosen if r.learned_error < r.closed_error]
            gain = sum(1 - r.learned_error / r.closed_error for r in won) / max(1, len(won))
            console.print(
                f"learned transform kept in {len(won)} of {len(chosen)} layers, "
                f"where its held-out error is {100 * gain:.1f}% smaller on average"
            )
        for block in self.blocks:
            verdict = "kept" if block.kept else "not kept"
            change = f"held-out error {block.before:.3g} -> {block.after:.3g}"
            console.print(f"tuned {block.name}: {change}, {verdict}", markup=False, highlight=False)
        for choice in self.choices:
            measured = ", ".join(f"{scheme} {loss:.2g}" for scheme, loss in choice.measured.items())
            rank = f" rank {choice.rank}" if choice.rank else ""
            what = f"{choice.scheme}{rank} in groups of {choice.group_size}, {choice.bits:.2f} bits, divergence "
            what += f"{choice.loss:.2g}"
            console.print(f"chose {choice.name}: {what} (measured: {measured})", markup=False, highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        summary = f"{len(self.layers)} layers quantized at {self.bits_per_weight:.2f} bits per weight"
        console.print(f"{summary}, {len(self.skipped)} skipped")


def _checked_choice(choice: Choice) -> Choice:
    numbers = all(isinstance(k, str) and isinstance(v, int | float) for k, v in choice.measured.items())
    fields = (choice.name, choice.scheme, choice.rank, choice.group_size, choice.bits, choice.loss)
    kinds = (str, str, int, int, int | float, int | float)
    if not numbers or not all(isinstance(*pair) for pair in zip(fields, kinds, strict=True)):
        raise TypeError(f"choice of {choice.name!r} is {choice!r}")
    return choice


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One layer in the order in which more bits pay most. gain: squared error that a bit more a weight takes away, per
    weight of the model. share: of the summed squared errors, up to and with this layer. bits_at_8, bits_at_16: bits per
    weight over all quantized layers when the layers up to and with this one are kept at 8 or 16 bits."""

    name: str
    error: float
    gain: float
    share: float
    bits_at_8: float
    bits_at_16: float


def sensitivity(report: Report) -> list[Sensitivity]:
    """Which layers to leave at 8 or 16 bits first: by squared error per stored bit.

    Layers' errors were measured one at a time on their own outputs; how much of one reaches the model's output is not
    known, so this orders layers and predicts no perplexity. Layers without a measured error are left out.
    """
    measured = [layer for layer in report.layers if layer.error is not None]
    total = sum(layer.error**2 for layer in measured)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    at_8 = at_16 = report.bits_per_weight
    found, seen = [], 0.0
    for layer in sorted(measured, key=lambda layer: -(layer.error**2) / (layer.shape[0] * layer.shape[1])):
        part = layer.shape[0] * layer.shape[1] / weights
        seen += layer.error**2
        at_8 += part * (8 - layer.bits)
        at_16 += part * (16 - layer.bits)
        share = seen / total if total else 0.0
        found.append(Sensitivity(layer.name, layer.error, layer.error**2 / part, share, at_8, at_16))
    return found


def stored_bits(layer: TwinLinear | Int8Linear) -> float:
    """Bits per weight of a quantized layer: every stored tensor but the bias, over N * K."""
    total = sum(t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias")
    return 8 * total / (layer.out_features * layer.in_features)


def output_error(layer: nn.Module, reference: torch.Tensor, x: torch.Tensor, read: torch.Tensor | None = None) -> float:
    """Relative error of a quantized layer's product on rows x (T, K); reference: (N, K) float32 exact weights.

    read: (T, K) what the layer reads in the place of x where neighbours scale or rotate it, or None.
    """
    y = x @ reference.t()
    bias = layer.bias.float() if layer.bias is not None else 0.0
    y_q = layer(x if read is None else read) - bias
    return float((y_q - y).norm() / y.norm().clamp_min(1e-30))


def report(model: nn.Module) -> Report:
    """The report of a model quantized by :func:`tqcompile.compile` or loaded by :func:`tqcompile.load`.

    Raises:
        ModelError: the model carries no report.
    """
    found = getattr(model, "tqcompile_report", None)
    if found is None:
        raise ModelError(f"{type(model).__name__} carries no report; quantize it with tqcompile.compile first.")
    return found
