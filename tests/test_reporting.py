"""The report: its numbers by hand, its table, JSON and CSV."""

import csv
import json

import pytest
import torch
from random_components import random_components
from torch import nn

import tqcompile
from tqcompile.errors import ModelError
from tqcompile.modules import TwinLinear
from tqcompile.reporting import LayerRecord, Report, output_error, stored_bits

LAYERS = [
    LayerRecord("model.layers.0.mlp.up_proj", (24, 64), "twin-w4a8", 8, 0.01234, 6.5, "hadamard64 on-line", 0.25),
    LayerRecord(
        "model.layers.0.mlp.down_proj", (64, 96), "twin-w4a8", 8, None, 5.0, "scale on-line ([a, b] moves)", 1.5
    ),
]
SKIPPED = {"lm_head": "ignored by 'lm_head'", "gate": 'odd, with "quotes" and [red]'}


def report():
    return Report({"scheme": "twin-w4a8"}, list(LAYERS), dict(SKIPPED), ["a note with [brackets]"])


def stored(n, k, rank, g, form, block, scaled):
    """Bits of every stored number, by hand."""
    bits = n * k * 4 + n * (k // g) * 16
    if form == 4 and rank:
        bits += rank * k * 4 + rank * (k // g) * 16 + n * rank * 4 + n * 16
    elif rank:
        bits += (rank * k + n * rank) * 16
    return (bits + block * block * 16 + (k * 32 if scaled else 0)) / (n * k)


@pytest.mark.parametrize(
    ("rank", "form", "block", "scaled"), [(8, 4, 16, True), (8, 4, 0, False), (0, 4, 0, True), (8, 16, 32, False)]
)
def test_bits_count_everything_that_is_stored_but_the_bias(rank, form, block, scaled):
    for bias in (None, torch.float32):
        quantized = random_components(24, 64, rank, 32, 8, form, block, scaled, bias)
        assert stored_bits(TwinLinear.from_quantized(quantized)) == stored(24, 64, rank, 32, form, block, scaled)


def test_bits_of_one_layer_written_out():
    # (24, 64) at rank 8, groups of 32: residual 24*64*4 + 24*2*16, down 8*64*4 + 8*2*16, up 24*8*4 + 24*16; the signs
    # of the rotation live in config.json.
    from tqcompile.config import Config
    from tqcompile.methods.recipe import quantize_data_free

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layer = TwinLinear.from_quantized(quantize_data_free(weight, None, Config(rank=8, group_size=32)))
    assert stored_bits(layer) == (6144 + 768 + 2048 + 256 + 768 + 384) / 1536 == 6.75


def test_the_mean_is_weighted_by_size():
    assert report().bits_per_weight == (6.5 * 24 * 64 + 5.0 * 64 * 96) / (24 * 64 + 64 * 96)
    assert Report({}).bits_per_weight == 0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_the_error_is_that_of_the_product_without_the_bias(scaled, bias):
    quantized = random_components(act_bits=16, scaled=False, block=0, bias=bias)
    layer = TwinLinear.from_quantized(quantized)
    g = torch.Generator().manual_seed(3)
    x, scale = torch.randn(17, 64, generator=g), torch.rand(64, generator=g) + 0.5
    effective = layer(torch.eye(64)).double().t()
    if bias is not None:
        effective = effective - layer.bias.double()[:, None]
    reference = torch.randn(24, 64, generator=g)
    outside = scale.double() if scaled else torch.ones(64).double()
    wanted = x.double() @ reference.double().t()
    found = (x.double() / outside) @ effective.t()
    expected = ((found - wanted).norm() / wanted.norm()).item()
    # float32 against float64 over K = 64 products, and the bias added and taken away once.
    assert output_error(layer, reference, x, x / scale if scaled else None) == pytest.approx(expected, rel=1e-5)


def test_the_table_names_everything():
    text = str(report())
    # rich prints each cell on one line where the table fits into 120 columns.
    for wanted in (
        "tqcompile report",
        "model.layers.0.mlp.up_proj",
        "24x64",
        "64x96",
        "twin-w4a8",
        "0.0123",
        "6.50",
        "data-free",
        "hadamard64 on-line",
        "scale on-line ([a, b] moves)",
        "skipped lm_head: ignored by 'lm_head'",
        'skipped gate: odd, with "quotes" and [red]',
        "note: a note with [brackets]",
        "2 layers quantized at 5.30 bits per weight, 2 skipped",
    ):
        assert wanted in text, wanted
    assert max(map(len, text.splitlines())) <= 120


def test_json_holds_everything(tmp_path):
    report().to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert Report.from_dict(data) == report()
    assert data["bits_per_weight"] == report().bits_per_weight
    assert data["layers"][0]["shape"] == [24, 64]
    assert data["layers"][1]["error"] is None


def test_csv_has_one_row_a_layer_and_one_a_skip(tmp_path):
    report().to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*(layer.name for layer in LAYERS), *SKIPPED]
    assert rows[0]["shape"] == "24x64"
    assert float(rows[0]["error"]) == 0.01234
    assert rows[1]["error"] == ""
    assert rows[3]["skipped"] == SKIPPED["gate"]
    assert rows[0]["skipped"] == ""


def test_a_model_without_a_report_is_refused():
    with pytest.raises(ModelError, match=r"Linear carries no report; quantize it with tqcompile\.compile first"):
        tqcompile.report(nn.Linear(2, 2))
