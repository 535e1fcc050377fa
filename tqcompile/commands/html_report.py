"""The report as one HTML page: no network, no script; plots are inline SVG.

Everything that comes from a checkpoint is escaped, and the page forbids itself to load or run anything.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tqcompile import checkpoint
from tqcompile.errors import CheckpointError, ModelError
from tqcompile.ops.packing import dequantize_int4
from tqcompile.reporting import Report, histogram, sensitivity

HISTOGRAMS = 24  # layers that are drawn, those of the largest error
SAMPLE = 1 << 20  # weights of a layer that a histogram counts
BINS = 64
SPEED_FIELDS = ("model", "compiled", "device", "threads", "dtype", "batch", "prompt", "new")  # beside the two rates
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#dd8844")
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; } td.text { white-space: normal; }
th:first-child, td:first-child, .text { text-align: left; } .wide { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #444; } figure { display: inline-block; margin: 6px; }
figcaption { font-size: 12px; } .note { color: #555; max-width: 70em; }
"""


def page(report: Report, directory: Path, original: Path | None = None, speeds: Sequence[dict] = ()) -> str:
    """The page of a checkpoint's report.

    Args:
        directory: the checkpoint, whose weights are read one layer at a time for the histograms. original: the model it
            was made from, for the histograms of its weights; None leaves these out. speeds: results of ``tqcompile
            bench`` for the table of speeds.
    Raises:
        CheckpointError, ModelError: a file of either directory cannot be read.
    """
    title = f"tqcompile report: {report.config.get('scheme', '?')}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    sections = [
        f"<h1>{_text(title)}</h1>",
        _summary(report, directory),
        *_errors(report),
        *_ranking(report),
        *_choices(report),
        *_histograms(report, directory, original),
        *_inputs(report),
        *_speed(speeds),
        *_blocks(report),
        "<h2>Layers</h2>",
        _layers(report),
        *_skipped(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{float(value):.{digits}f}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]], text: tuple[int, ...] = ()) -> str:
    """An HTML table; columns in ``text`` are words, the others numbers."""

    def cells(tag: str, row: Sequence[object]) -> str:
        marks = [' class="text"' if index in text else "" for index in range(len(row))]
        return "".join(f"<{tag}{mark}>{_text(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", headings)}</tr>\n{body}</table></div>'


def _summary(report: Report, directory: Path) -> str:
    seconds = sum(layer.seconds for layer in report.layers) + sum(block.seconds for block in report.blocks)
    facts = (
        f"{len(report.layers)} layers quantized at {report.bits_per_weight:.2f} bits per weight, "
        f"{len(report.skipped)} skipped, {seconds:.0f} s of quantizing and tuning; {directory}"
    )
    settings = ", ".join(f"{key} {value}" for key, value in report.config.items() if value is not None)
    notes = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    return f'<p>{_text(facts)}</p><p class="note">{_text(settings)}</p><ul class="note">{notes}</ul>'


def _layers(report: Report) -> str:
    headings = ("layer", "shape", "scheme", "rank", "error", "closed", "learned", "bits", "seconds", "transform")
    rows = (
        (
            layer.name,
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.scheme,
            layer.rank,
            "data-free" if layer.error is None else _number(layer.error),
            _number(layer.closed_error),
            _number(layer.learned_error),
            _number(layer.bits, 2),
            _number(layer.seconds, 1),
            layer.transform,
        )
        for layer in report.layers
    )
    about = (
        '<p class="note">error: relative error of the layer\'s output on held-out rows. closed, learned: of its input '
        "site with the closed-form and with the learned transform; the smaller one was kept.</p>"
    )
    return about + _table(headings, rows, text=(9,))


def _errors(report: Report) -> Iterator[str]:
    measured = [layer for layer in report.layers if layer.error is not None]
    if not measured:
        return
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in measured))
    colour = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    top, step = max(layer.error for layer in measured) or 1.0, 940 / len(measured)
    bars = []
    for index, layer in enumerate(measured):
        size = 200 * layer.error / top
        title = _text(f"{layer.name}: {layer.error:.4f}")
        fill = colour[layer.name.rpartition(".")[2]]
        place = f'x="{60 + index * step:.2f}" y="{220 - size:.2f}" width="{step * 0.85:.2f}" height="{size:.2f}"'
        bars.append(f'<rect {place} fill="{fill}"><title>{title}</title></rect>')
    legend = "".join(
        f'<rect x="{60 + 130 * (i % 7)}" y="{236 + 18 * (i // 7)}" width="10" height="10" fill="{colour[kind]}"/>'
        f'<text x="{74 + 130 * (i % 7)}" y="{245 + 18 * (i // 7)}">{_text(kind)}</text>'
        for i, kind in enumerate(kinds)
    )
    axis = "".join(
        f'<line x1="60" x2="1000" y1="{220 - 200 * part}" y2="{220 - 200 * part}" stroke="#ddd"/>'
        f'<text x="54" y="{224 - 200 * part}" text-anchor="end">{top * part:.3f}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    yield "<h2>Error of every layer, in the model's order</h2>"
    yield _svg(1010, 250 + 18 * (-(-len(kinds) // 7)), axis + "".join(bars) + legend, "relative output error by layer")


def _svg(width: int, height: int, body: str, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="max-width:{width}px" '
        f'width="100%" role="img" aria-label="{_text(label)}">{body}</svg>'
    )


def _ranking(report: Report) -> Iterator[str]:
    entries = sensitivity(report)
    if not entries:
        return
    yield "<h2>Which layers to leave at 8 or 16 bits</h2>"
    yield (
        '<p class="note">In the order of squared error per stored bit. share: of the summed squared errors, down to '
        "that row. bits if 8, if 16: average bits per weight when the rows down to that one are kept at 8 or 16 bits. "
        "Errors were measured layer by layer, so this orders layers and predicts no perplexity. A layer stays at 16 "
        "bits with <code>--ignore NAME</code>.</p>"
    )
    low, high = report.bits_per_weight, entries[-1].bits_at_8
    width = (high - low) or 1.0
    points = " ".join(
        f"{60 + 400 * (e.bits_at_8 - low) / width:.1f},{180 - 160 * e.share:.1f}" for e in entries if width > 0
    )
    marks = "".join(f'<text x="54" y="{184 - 160 * p}" text-anchor="end">{100 * p:.0f}%</text>' for p in (0, 0.5, 1))
    ends = f'<text x="60" y="198">{low:.2f} bits</text><text x="460" y="198" text-anchor="end">{high:.2f} bits</text>'
    frame = '<rect x="60" y="20" width="400" height="160" fill="none" stroke="#ddd"/>'
    line = f'<polyline points="60,180 {points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
    caption = '<text x="60" y="13">share of the squared error in layers kept at 8 bits</text>'
    yield _svg(480, 204, frame + marks + ends + line + caption, "share of squared error against bits per weight")
    rows = (
        (e.name, _number(e.error), f"{100 * e.share:.1f}%", _number(e.bits_at_8, 2), _number(e.bits_at_16, 2))
        for e in entries
    )
    yield _table(("layer", "error", "share", "bits if 8", "bits if 16"), rows)


def _blocks(report: Report) -> Iterator[str]:
    if report.blocks:
        yield "<h2>Block tuning</h2>"
        rows = (
            (b.name, f"{b.before:.3g}", f"{b.after:.3g}", "yes" if b.kept else "no", _number(b.seconds, 1))
            for b in report.blocks
        )
        yield _table(("block", "held-out error before", "after", "kept", "seconds"), rows)


def _skipped(report: Report) -> Iterator[str]:
    if report.skipped:
        yield "<h2>Left as they are</h2>"
        yield _table(("name", "reason"), report.skipped.items(), text=(1,))


def _histograms(report: Report, directory: Path, original: Path | None) -> Iterator[str]:
    yield "<h2>Weights before and after the transform</h2>"
    if not any(Path(directory).glob("*.safetensors")):
        yield '<p class="note">The checkpoint\'s weights are not at hand, so there are no histograms.</p>'
        return
    if original is not None and not any(Path(original).glob("*.safetensors")):
        raise ModelError(f"--original {original} holds no .safetensors file")
    names = [layer.name for layer in sorted(report.layers, key=lambda layer: -(layer.error or 0))]
    modules = json.loads((Path(directory) / checkpoint.MANIFEST).read_text(encoding="utf-8")).get("modules", {})
    stored = _Tensors(directory)
    before = None if original is None else _Tensors(original)
    drawn, left = [], []
    for name in names:
        after = stored.transformed(name, modules.get(name, {})) if len(drawn) < HISTOGRAMS else None
        if after is not None:
            drawn.append(_figure(name, None if before is None else before.rows(f"{name}.weight"), after))
        elif len(drawn) < HISTOGRAMS:
            left.append(name)
    yield (
        f'<p class="note">The {len(drawn)} layers of the largest error. Blue: residual and low rank together as '
        "stored, in the transformed basis. Grey: the original weights"
        + (" (pass <code>--original DIR</code> to see them)" if original is None else "")
        + ". Counts on a logarithmic scale; the unit is the root mean square, the number the largest magnitude in it: "
        "the smaller, the better four bits fit.</p>"
    )
    yield "".join(drawn)
    if left:
        yield f'<p class="note">Not drawn, no 4-bit residual of the usual form: {_text(", ".join(left))}</p>'


def _inputs(report: Report) -> Iterator[str]:
    if not report.spreads:
        return
    errors = {layer.name: layer.error or 0 for layer in report.layers}
    order = sorted(report.spreads, key=lambda found: -errors.get(found.name.split(" ")[0], 0))[:HISTOGRAMS]
    yield "<h2>Inputs before and after the transform</h2>"
    yield (
        f'<p class="note">Held-out inputs of the {len(order)} sites of the largest error. Grey: what the site reads. '
        "Blue: what is rounded, scaled and rotated. Scales as above.</p>"
    )
    yield "".join(
        _plot(found.name, [("#999999", found.before, found.peak_before), (COLOURS[0], found.after, found.peak_after)])
        for found in order
    )


def _choices(report: Report) -> Iterator[str]:
    if report.choices:
        yield "<h2>What the budget was spent on</h2>"
        yield (
            '<p class="note">divergence: estimated, of the model\'s output, that this site adds. measured: the same at '
            "each number of weight bits, in closed form in a uniformly quantized model, at its rank and group size.</p>"
        )
        rows = (
            (
                c.name,
                c.scheme,
                c.rank,
                c.group_size,
                _number(c.bits, 2),
                f"{c.loss:.2g}",
                ", ".join(f"{scheme} {loss:.2g}" for scheme, loss in c.measured.items()),
            )
            for c in report.choices
        )
        yield _table(("site", "scheme", "rank", "group", "bits, at most", "divergence", "measured"), rows, text=(6,))


def _speed(speeds: Sequence[dict]) -> Iterator[str]:
    if speeds:
        yield "<h2>Speed</h2>"
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
        rows = ([*(s[name] for name in SPEED_FIELDS), *(_number(s[name], 1) for name in rates)] for s in speeds)
        yield _table((*SPEED_FIELDS, "prefill tokens/s", "decode tokens/s"), rows)


class _Tensors:
    """Tensors of a model directory by name; a sample of rows is read, one tensor at a time."""

    def __init__(self, directory: Path):
        self._where: dict[str, Path] = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    self._where |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); it is damaged.") from error

    def get(self, name: str) -> torch.Tensor | None:
        if name not in self._where:
            return None
        with safe_open(self._where[name], "pt") as opened:
            return opened.get_tensor(name)

    def rows(self, name: str) -> torch.Tensor | None:
        """About SAMPLE values in evenly spaced rows of a matrix, float32; None where there is no such matrix."""
        found = self.get(name)
        return None if found is None or found.dim() != 2 else found[_sample(*found.shape)].float()

    def transformed(self, name: str, spec: dict) -> torch.Tensor | None:
        """Rows of residual + up down of a 4-bit layer; None for any other layer."""
        packed, scale = self.get(f"{name}.residual.weight_packed"), self.get(f"{name}.residual.weight_scale")
        if packed is None or scale is None:
            return None
        rows = _sample(packed.shape[0], 2 * packed.shape[1])
        weight = dequantize_int4(packed[rows], scale[rows])
        if spec.get("rank") and spec.get("low_rank_bits", 4) == 4:
            parts = [
                self.get(f"{name}.{part}.weight_{leaf}") for part in ("up", "down") for leaf in ("packed", "scale")
            ]
            up = dequantize_int4(parts[0][rows], parts[1][rows])
            return weight + up @ dequantize_int4(parts[2], parts[3])
        if spec.get("rank"):
            return weight + self.get(f"{name}.up")[rows].float() @ self.get(f"{name}.down").float()
        return weight


def _sample(rows: int, columns: int) -> torch.Tensor:
    count = max(1, min(rows, SAMPLE // max(1, columns)))
    return torch.linspace(0, rows - 1, count).long()


def _figure(name: str, before: torch.Tensor | None, after: torch.Tensor) -> str:
    """Histograms of one layer's weights in units of their root mean square, and the largest magnitude in it."""
    drawn = (("#999999", before), (COLOURS[0], after))
    return _plot(name, [(colour, *histogram(values, BINS)) for colour, values in drawn if values is not None])


def _plot(name: str, parts: Sequence[tuple[str, Sequence[float], float]]) -> str:
    """Histograms over one another: (colour, counts, largest magnitude) each."""
    lines, labels = [], []
    for index, (colour, counts, size) in enumerate(parts):
        top, width = math.log10(1 + max(10.0, *counts)), 232 / max(1, len(counts) - 1)
        points = " ".join(
            f"{4 + width * i:.1f},{96 - 84 * math.log10(1 + max(0, n)) / top:.1f}" for i, n in enumerate(counts)
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        labels.append(f'<text x="236" y="{14 + 13 * index}" text-anchor="end" style="fill:{colour}">{size:.1f}</text>')
    axis = '<line x1="4" x2="236" y1="96" y2="96" stroke="#ccc"/>'
    drawing = _svg(240, 100, axis + "".join(lines) + "".join(labels), f"histograms of {name}")
    return f'<figure style="width:240px">{drawing}<figcaption>{_text(name)}</figcaption></figure>'
