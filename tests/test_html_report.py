"""The HTML page: everything in it, nothing from outside, and no way for a checkpoint to put markup in."""

import html.parser
import json
import re

import pytest
import torch
from tiny_models import SETTINGS, tiny, tokens

import tqcompile
from tqcompile.commands import html_report
from tqcompile.commands import report as report_command
from tqcompile.commands.html_report import SPEED_FIELDS
from tqcompile.errors import CheckpointError, ConfigError, ModelError
from tqcompile.ops.quantize_activation import transform_activation
from tqcompile.reporting import SPREAD_RANGE, BlockRecord, Choice, LayerRecord, Report, Spread, sensitivity, spread

EVIL = '<script>alert(1)</script>"><img src=x>'


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module", params=["twin-w4a8", "svdquant-w4a8", "rtn-w4a16"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("html")
    model = tiny("Qwen3")
    model.save_pretrained(folder / "original")
    tqcompile.compile(model, tokens(), **{**SETTINGS, "scheme": request.param, "tune": 2})
    tqcompile.save(model, folder / "q")
    return folder, model


def test_the_page_holds_everything_and_needs_nothing(saved):
    folder, model = saved
    report = tqcompile.report(model)
    source = html_report.page(report, folder / "q", folder / "original")
    found = Page(source)
    text = " ".join(found.text)
    for layer in report.layers:
        assert text.count(layer.name) >= 3  # in its histogram, the ranking and the table
        for value in (layer.error, layer.closed_error, layer.learned_error):
            assert value is None or f"{value:.4f}" in text
        assert layer.transform in text
    for name, reason in report.skipped.items():
        assert name in text
        assert reason in text
    for block in report.blocks:
        assert f"{block.after:.3g}" in text
    assert found.tags.count("figure") == len(report.layers) + len(report.spreads)
    assert len(report.spreads) == 8  # qkv, o, gate and up, down of two blocks
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    # Nothing is fetched: the only address is the name of SVG's namespace.
    assert set(re.findall(r"https?://[^\"]*", source)) == {"http://www.w3.org/2000/svg"}
    assert not [key for key, _ in found.attributes if key in ("src", "href") or key.startswith("on")]


def test_bars_are_as_high_as_errors(saved):
    folder, model = saved
    layers = tqcompile.report(model).layers
    bars = re.findall(r'height="([\d.]+)" fill="[^"]*"><title>([^:]*):', html_report.page(Report({}, layers), folder))
    top = max(layer.error for layer in layers)
    assert [(name, pytest.approx(200 * e / top, abs=0.01)) for name, e in ((r.name, r.error) for r in layers)] == [
        (name, float(height)) for height, name in bars
    ]


def test_the_weights_that_are_drawn_are_those_of_the_layer(saved):
    folder, model = saved
    stored = html_report._Tensors(folder / "q")
    manifest = json.loads((folder / "q" / "tqcompile.json").read_text())
    for record in tqcompile.report(model).layers:
        layer = model.get_submodule(record.name)
        weight = stored.transformed(record.name, manifest["modules"][record.name])
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        y = transform_activation(x, layer.transform.input_scale, layer.transform.rotation) @ weight.t()
        y = y if layer.bias is None else y + layer.bias
        # The layer rounds its input to eight bits, the product above does not.
        assert (layer(x) - y).norm() < (1e-3 if layer.spec.act_bits == 16 else 2e-2) * y.norm()
    assert stored.transformed("lm_head", {}) is None


def test_layers_are_ranked_by_squared_error_per_bit():
    def layer(name, n, k, error, bits):
        return LayerRecord(name, (n, k), "twin-w4a8", 8, error, bits, "none", 1.0)

    report = Report({}, [layer("a", 10, 10, 0.2, 4.5), layer("b", 100, 10, 0.3, 5.0), layer("c", 10, 10, None, 6.0)])
    first, second = sensitivity(report)
    assert (first.name, second.name) == ("a", "b")
    assert first.share == pytest.approx(0.04 / 0.13)
    assert second.share == pytest.approx(1)
    assert first.gain == pytest.approx(0.04 * 1200 / 100)
    assert first.bits_at_8 == pytest.approx((100 * 8 + 1000 * 5 + 100 * 6) / 1200)
    assert second.bits_at_16 == pytest.approx((100 * 16 + 1000 * 16 + 100 * 6) / 1200)
    assert sensitivity(Report({})) == []


def test_what_a_checkpoint_says_is_text(tmp_path):
    layer = LayerRecord(EVIL, (2, 2), EVIL, 2, 0.1, 4.0, EVIL, 1.0)
    report = Report({"scheme": EVIL, EVIL: 1}, [layer], {EVIL: EVIL}, [EVIL], [BlockRecord(EVIL, 1.0, 0.5, True, 1.0)])
    report.choices.append(Choice(EVIL, EVIL, 8, 64, 4.0, 0.1, {EVIL: 0.1}))
    report.spreads.append(Spread(EVIL, [1, 2], [3, 4], 1.0, 1.0))
    speed = dict.fromkeys(SPEED_FIELDS, EVIL) | {"prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 2.0}
    source = html_report.page(report, tmp_path, speeds=[speed])
    assert "script" not in Page(source).tags
    assert "<script" not in source
    assert "<img" not in source
    assert "weights are not at hand" in source


def test_a_report_without_errors_has_no_plots(tmp_path):
    layer = LayerRecord("a", (2, 2), "twin-w4a8", 2, None, 4.0, "none", 1.0)
    source = html_report.page(Report({}, [layer]), tmp_path)
    assert "<svg" not in source
    assert "data-free" in source


def test_damage_is_named(saved, tmp_path):
    folder, model = saved
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 40)
    (tmp_path / "tqcompile.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        html_report.page(tqcompile.report(model), tmp_path)
    with pytest.raises(ModelError, match=r"--original .* holds no \.safetensors file"):
        html_report.page(tqcompile.report(model), folder / "q", folder / "nothing")


def test_a_histogram_counts_every_value():
    values = torch.tensor([[3.0, -3.0, 3.0, -3.0]])  # one unit on either side
    drawn = html_report._figure("w", None, values)
    points = re.search(r'points="([^"]*)"', drawn)[1].split()
    low = [i for i, point in enumerate(points) if float(point.split(",")[1]) < 95.9]
    width = 2 * SPREAD_RANGE / html_report.BINS
    centres = [-SPREAD_RANGE + (i + 0.5) * width for i in low]
    assert [abs(abs(c) - 1) <= width for c in centres] == [True, True]
    assert ">1.0<" in drawn


def test_the_spread_of_inputs_is_in_units_of_their_root_mean_square():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(5)) * 7
    x[3, 2] = 1e4
    after = torch.full((500, 16), -2.0)
    found = spread("s", x, after)
    unit = float(x.double().square().mean().sqrt())
    assert found.peak_before == pytest.approx(1e4 / unit, rel=1e-4)
    assert found.peak_after == pytest.approx(1.0)
    assert sum(found.before) == sum(found.after) == x.numel()
    width = 2 * SPREAD_RANGE / len(found.after)
    (index,) = [i for i, count in enumerate(found.after) if count]
    assert abs(-SPREAD_RANGE + (index + 0.5) * width + 1) <= width
    assert found.before[-1] >= 1  # what is out of range counts at the end
    assert Report.from_dict(Report({}, spreads=[found]).to_dict()).spreads == [found]
    for change in ({"before": []}, {"after": ["1"]}, {"peak_after": "1"}, {"before": 3}):
        with pytest.raises(TypeError):
            Report.from_dict(Report({}, spreads=[Spread(**{**vars(found), **change})]).to_dict())


def test_only_a_transform_changes_what_is_drawn_of_inputs(saved):
    _, model = saved
    down = [s for s in tqcompile.report(model).spreads if "down_proj" in s.name]
    assert len(down) == 2
    for found in down:
        if tqcompile.report(model).config["scheme"] == "rtn-w4a16":
            assert found.before == found.after
        else:
            assert found.before != found.after


def test_speeds_of_bench_become_a_table(tmp_path):
    good = dict.fromkeys(SPEED_FIELDS, 1) | {"prefill_tokens_per_second": 12.34, "decode_tokens_per_second": 5.0}
    assert "12.3" in " ".join(Page(html_report.page(Report({}), tmp_path, speeds=[good])).text)
    for number, text in enumerate(("{}", "[1]", "no", json.dumps({**good, "decode_tokens_per_second": "x"}))):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no result of tqcompile bench"):
            report_command.run(tmp_path, speeds=[path])
