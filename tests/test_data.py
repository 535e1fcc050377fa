"""Calibration data: every accepted form gives the same batches, every refusal says what to pass instead."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from tqcompile.data import BATCH_SIZE, load_calibration
from tqcompile.errors import CalibrationError

ROWS = torch.randint(0, 50, (11, 7), generator=torch.Generator().manual_seed(0))


def load(data, samples=128, seq_len=7, **options):
    return load_calibration(data, samples=samples, seq_len=seq_len, **options)


def joined(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


class Characters:
    """A tokenizer with one id a character, and a start token a text."""

    def __call__(self, text):
        return BatchEncoding({"input_ids": [1, *map(ord, text)]})


def generator(items):
    yield from items


DICTS = [{"input_ids": ROWS[:4], "attention_mask": torch.ones(4, 7)}, {"input_ids": ROWS[4:], "labels": None}]
FORMS = {
    "tensor": lambda: ROWS,
    "int32 tensor": lambda: ROWS.int(),
    "lists": lambda: ROWS.tolist(),
    "tuples": lambda: [tuple(row) for row in ROWS.tolist()],
    "tensors": lambda: list(ROWS),
    "batches of tensors": lambda: [ROWS[:4], ROWS[4:]],
    "dicts of tensors": lambda: DICTS,
    "dicts of lists": lambda: [{"input_ids": ROWS[:4].tolist()}, {"input_ids": ROWS[4:].tolist()}],
    "dicts of one sequence": lambda: [{"input_ids": row.tolist()} for row in ROWS],
    "dicts of one tensor": lambda: [{"input_ids": row} for row in ROWS],
    "BatchEncoding": lambda: [BatchEncoding({"input_ids": ROWS[:4].tolist()}), BatchEncoding({"input_ids": ROWS[4:]})],
    "DataLoader of dicts": lambda: DataLoader([{"input_ids": row} for row in ROWS], batch_size=4),
    "DataLoader of tensors": lambda: DataLoader(list(ROWS), batch_size=4),
    "generator of lists": lambda: generator(ROWS.tolist()),
    "generator of dicts": lambda: generator(DICTS),
    "iterator": lambda: iter(ROWS.tolist()),
    "dataset": lambda: Dataset.from_dict({"input_ids": ROWS.tolist(), "other": list(range(11))}),
    "torch dataset": lambda: Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("torch"),
    "numpy dataset": lambda: Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("numpy"),
    "streamed dataset": lambda: Dataset.from_dict({"input_ids": ROWS.tolist()}).to_iterable_dataset(),
    "nameless stream": lambda: Dataset.from_dict({"input_ids": ROWS.tolist()}).to_iterable_dataset().map(dict),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_sequences(form):
    batches = load(FORMS[form]())
    assert torch.equal(joined(batches), ROWS)
    for batch in batches:
        ids = batch["input_ids"]
        assert ids.dtype == torch.int64
        assert ids.device.type == "cpu"
        assert ids.dim() == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [1, 4, 6])
def test_samples_counts_sequences(form, samples):
    assert torch.equal(joined(load(FORMS[form](), samples=samples)), ROWS[:samples])


def test_a_tensor_is_split_into_batches():
    assert [len(batch["input_ids"]) for batch in load(ROWS)] == [BATCH_SIZE, 3]


def test_unequal_lengths_are_cut_and_never_padded():
    lists = [[1, 2, 3], [4, 5, 6], [7], [], [8, 9, 10, 11, 12]]
    batches = load(lists, seq_len=3)
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2, 3], [4, 5, 6]], [[7]], [[8, 9, 10]]]


def test_a_dict_keeps_its_other_arguments_and_cuts_them_alike():
    mask = torch.arange(28).reshape(4, 7) % 3 > 0
    (batch,) = load([{"input_ids": ROWS[:4], "attention_mask": mask, "flag": True, "scale": torch.ones(2)}], samples=3)
    assert torch.equal(batch["input_ids"], ROWS[:3])
    assert torch.equal(batch["attention_mask"], mask[:3])
    assert batch["flag"] is True
    assert batch["scale"].shape == (1, 2)


def test_a_model_without_token_ids():
    pixels = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    (batch,) = load([{"pixel_values": pixels}])
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize(
    "texts",
    [
        ["abcd", "efghij", "k"],
        generator(["abcd", "efghij", "k"]),
        Dataset.from_dict({"text": ["abcd", "", "efghij", "k"]}),
    ],
)
def test_texts_are_joined_and_cut_into_windows(texts):
    ids = [1, *map(ord, "abcd"), 1, *map(ord, "efghij"), 1, ord("k")]
    batches = load(texts, tokenizer=Characters(), seq_len=4)
    assert joined(batches).tolist() == [ids[0:4], ids[4:8], ids[8:12]]
    (first,) = load(["abcd", "efghij"], tokenizer=Characters(), seq_len=4, samples=1)
    assert first["input_ids"].tolist() == [ids[:4]]


def test_texts_shorter_than_a_window_are_one_short_window():
    (batch,) = load(["ab", "c"], tokenizer=Characters(), seq_len=100)
    assert batch["input_ids"].tolist() == [[1, 97, 98, 1, 99]]


def test_a_generator_is_not_read_further_than_needed():
    def endless():
        while True:
            yield [1, 2, 3]

    assert joined(load(endless(), samples=5)).shape == (5, 3)


WORDS = "Pass one of"
REFUSED = {
    "a single string": ("wikitext", "a single string ('wikitext'"),
    "bytes": (b"abc", "a single string"),
    "a dict": ({"input_ids": ROWS}, "calib_data is one dict"),
    "a BatchEncoding": (BatchEncoding({"input_ids": ROWS}), "calib_data is one dict"),
    "nothing": ([], "calib_data is empty"),
    "empty tuple": ((), "calib_data is empty"),
    "empty generator": (generator([]), "calib_data is empty"),
    "empty tensor": (torch.empty(0, 5, dtype=torch.long), "calib_data is empty"),
    "empty sequences": (torch.empty(5, 0, dtype=torch.long), "calib_data is empty"),
    "empty lists": ([[], []], "calib_data is empty"),
    "empty dicts": ([{}], "calib_data is empty"),
    "empty ids": ([{"input_ids": torch.empty(0, 5, dtype=torch.long)}], "shape (0, 5)"),
    "empty loader": (DataLoader([]), "calib_data is empty"),
    "empty dataset": (Dataset.from_dict({"input_ids": []}), "calib_data is empty"),
    "1-D tensor": (torch.arange(5), "tensor of shape (5,) and dtype torch.int64"),
    "3-D tensor": (torch.zeros(2, 3, 4, dtype=torch.long), "tensor of shape (2, 3, 4)"),
    "float tensor": (torch.ones(2, 3), "dtype torch.float32; token ids must be an integer"),
    "bool tensor": (torch.ones(2, 3) > 0, "dtype torch.bool"),
    "float tensors": ([torch.ones(2, 3)], "dtype torch.float32"),
    "float ids in a dict": ([{"input_ids": torch.ones(2, 3)}], "input_ids of torch.float32"),
    "a list of ints": ([1, 2, 3], "calib_data holds items of type int"),
    "a list of floats": ([[0.5, 1.0]], "calib_data holds items of type list"),
    "booleans": ([[True, False]], "calib_data holds items of type list"),
    "nested lists": ([[[1, 2], [3, 4]]], "calib_data holds items of type list"),
    "arrays": ([np.ones(3)], "calib_data holds items of type ndarray"),
    "mixed": (["text", [1, 2]], "calib_data mixes texts and token-id lists"),
    "mixed with None": ([[1, 2], None], "calib_data mixes items of type NoneType and token-id lists"),
    "texts without tokenizer": (["a text"], "no tokenizer was given"),
    "text dataset without tokenizer": (Dataset.from_dict({"text": ["a"]}), "needs tokenizer="),
    "other columns": (Dataset.from_dict({"content": ["a"]}), "columns ['content'], neither 'input_ids' nor 'text'"),
    "uneven lists in a dict": ([{"input_ids": [[1, 2], [3]]}], "a dict of uneven lists"),
    "TensorDataset": (DataLoader(TensorDataset(ROWS)), "unpack the batches of a TensorDataset"),
    "a number": (3, "calib_data of type int is not understood"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_every_refusal_says_what_and_what_to_pass_instead(form):
    data, message = REFUSED[form]
    with pytest.raises(CalibrationError) as caught:
        load(data)
    assert message in str(caught.value)
    assert WORDS in str(caught.value)


def test_empty_texts_are_empty():
    class Silent:
        def __call__(self, _text):
            return {"input_ids": []}

    with pytest.raises(CalibrationError, match="calib_data is empty"):
        load(["", ""], tokenizer=Silent())


def test_a_dataset_dict_is_told_to_pick_a_split():
    data = DatasetDict({"train": Dataset.from_dict({"text": ["a"]}), "test": Dataset.from_dict({"text": ["b"]})})
    with pytest.raises(CalibrationError) as caught:
        load(data, tokenizer=Characters())
    assert "DatasetDict with splits ['train', 'test']" in str(caught.value)


@pytest.mark.parametrize("bad", [50, 10**6, -1])
def test_a_token_outside_the_vocabulary_is_named(bad):
    rows = ROWS.clone()
    rows[9, 3] = bad
    load(ROWS, vocab_size=50)
    for data in (rows, rows.tolist(), [{"input_ids": rows}]):
        with pytest.raises(CalibrationError, match=rf"token id {bad} is outside the model's vocabulary of 50"):
            load(data, vocab_size=50)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_floats_are_named(bad):
    pixels = torch.zeros(2, 3)
    pixels[1, 1] = bad
    with pytest.raises(CalibrationError, match="calibration batch 1: pixel_values holds NaN or infinity"):
        load([{"pixel_values": torch.zeros(2, 3)}, {"pixel_values": pixels}])
