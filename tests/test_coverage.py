"""The table of docs/coverage.md is what is measured, row by row."""

import pytest
import torch
from coverage_table import CASES, DOCUMENT, HEADINGS, build, data, logits, measure, row


def committed() -> list[str]:
    return [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", CASES)
def test_the_row_is_the_measured_one(name):
    assert row(measure(name)) in committed()


def test_the_table_is_whole():
    heading, line, *rows = committed()
    assert heading == row(HEADINGS)
    assert set(line) == set("|-")
    assert [text.split(" | ")[0].removeprefix("| ") for text in rows] == list(CASES)


@pytest.mark.parametrize("name", ["Gemma", "ViT"])
def test_the_same_seed_gives_the_same_model(name):
    (batch,) = data(name, 1, 3)
    assert torch.equal(logits(build(name, 5), batch), logits(build(name, 5), batch))
    assert not torch.equal(build(name, 5).state_dict().popitem()[1], build(name, 6).state_dict().popitem()[1])
