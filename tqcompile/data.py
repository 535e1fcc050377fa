"""Calibration data: every accepted form becomes a list of dicts of model keyword arguments."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tqcompile.errors import CalibrationError

BATCH_SIZE = 8
EXAMPLE = (
    "Pass one of: a list of texts with tokenizer=..., e.g. compile(model, ['first text', 'second text'], "
    "tokenizer=tokenizer); a list of token-id lists, e.g. [[1, 5, 9], [2, 4]]; a LongTensor of shape [B, S]; a list "
    "or DataLoader of dicts of model arguments, e.g. [{'input_ids': ids, 'attention_mask': mask}]; or a Hugging Face "
    "Dataset with an 'input_ids' or a 'text' column."
)

Batch = dict[str, Any]


def load_calibration(
    data: Any, *, tokenizer: Any = None, samples: int, seq_len: int, vocab_size: int | None = None
) -> list[Batch]:
    """Turn calibration data into batches on the CPU.

    Args:
        data: a form named in EXAMPLE. Texts are tokenized, joined and cut into windows of ``seq_len``; token-id
            lists are cut to ``seq_len``; tensors and dicts are taken as they are.
        samples: at most this many sequences are used.
        vocab_size: token ids must be below it, where known.
    Returns:
        dicts of model keyword arguments; ``input_ids`` are (B, S) int64.
    Raises:
        CalibrationError: empty, ambiguous, mixed or out-of-vocabulary input, with an example of what to pass.
    """
    if isinstance(data, (str, bytes)):
        raise CalibrationError(
            f"calib_data is a single string ({data[:40]!r}...), a text, a path or a dataset name? {EXAMPLE}"
        )
    if isinstance(data, torch.Tensor):
        batches = _from_tensor(data)
    elif hasattr(data, "column_names"):  # before Mapping: a DatasetDict is a dict
        return load_calibration(
            _dataset_column(data, tokenizer, samples),
            tokenizer=tokenizer,
            samples=samples,
            seq_len=seq_len,
            vocab_size=vocab_size,
        )
    elif isinstance(data, Mapping):
        raise CalibrationError(f"calib_data is one dict; pass a list of dicts, one a batch. {EXAMPLE}")
    elif isinstance(data, Iterable):
        # One item is one sequence or one batch, so `samples` items always hold enough.
        items = list(itertools.islice(data, None if isinstance(data, Sequence) else samples))
        batches = _from_items(items, tokenizer, seq_len)
    else:
        raise CalibrationError(f"calib_data of type {type(data).__name__} is not understood. {EXAMPLE}")
    batches = _first_samples(batches, samples)
    if not batches or not all(batches):
        raise CalibrationError(f"calib_data is empty, or holds an empty dict. {EXAMPLE}")
    for index, batch in enumerate(batches):
        _check_ids(batch, index, vocab_size)
    return batches


def _from_tensor(data: torch.Tensor) -> list[Batch]:
    if data.dim() != 2 or data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
        raise CalibrationError(
            f"calib_data is a tensor of shape {tuple(data.shape)} and dtype {data.dtype}; token ids must be an integer "
            f"tensor of shape [B, S]. {EXAMPLE}"
        )
    return [{"input_ids": chunk.long().cpu()} for chunk in data.split(BATCH_SIZE)] if data.numel() else []


def _dataset_column(dataset: Any, tokenizer: Any, samples: int) -> list:
    names = dataset.column_names
    if isinstance(names, Mapping):
        raise CalibrationError(f"calib_data is a DatasetDict with splits {list(names)}; pass one of them.")
    if names is None:  # a streamed dataset may not know its columns
        names = list(next(iter(dataset), {}))
    if "input_ids" in names:
        return [torch.as_tensor(row["input_ids"]).tolist() for row in itertools.islice(dataset, samples)]
    if "text" in names:
        if tokenizer is None:
            raise CalibrationError(f"a Dataset with a 'text' column needs tokenizer=... . {EXAMPLE}")
        # A text is at least one token; windows are cut from the joined texts, so this may be more than enough.
        return [row["text"] for row in itertools.islice(dataset, samples * 16) if row["text"]]
    raise CalibrationError(f"the Dataset has columns {names}, neither 'input_ids' nor 'text'. {EXAMPLE}")


def _from_items(items: list, tokenizer: Any, seq_len: int) -> list[Batch]:
    if not items:
        return []
    kinds = {_kind(item) for item in items}
    if len(kinds) > 1:
        raise CalibrationError(f"calib_data mixes {' and '.join(sorted(kinds))}. {EXAMPLE}")
    kind = kinds.pop()
    if kind == "texts":
        return _from_texts(items, tokenizer, seq_len)
    if kind == "token-id lists":
        return _from_ids([torch.tensor(list(item), dtype=torch.long)[:seq_len] for item in items])
    if kind == "dicts":
        return [{name: _as_batch(value) for name, value in item.items()} for item in items]
    if kind == "tensors":
        return [batch for item in items for batch in _from_tensor(item if item.dim() == 2 else item[None])]
    raise CalibrationError(f"calib_data holds {kind}. {EXAMPLE}")


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "texts"
    if isinstance(item, Mapping) or (hasattr(item, "data") and isinstance(item.data, Mapping)):
        return "dicts"
    if isinstance(item, torch.Tensor):
        return "tensors"
    if isinstance(item, (list, tuple)):
        if all(isinstance(i, int) and not isinstance(i, bool) for i in item):
            return "token-id lists"
        if len(item) == 1 and isinstance(item[0], torch.Tensor):
            return "one-tensor tuples (unpack the batches of a TensorDataset first)"
    return f"items of type {type(item).__name__}"


def _from_texts(texts: list[str], tokenizer: Any, seq_len: int) -> list[Batch]:
    if tokenizer is None:
        raise CalibrationError(f"calib_data holds texts, and no tokenizer was given. {EXAMPLE}")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // seq_len * seq_len], dtype=torch.long).reshape(-1, seq_len)
    if not len(windows):
        windows = torch.tensor(ids, dtype=torch.long)[None]
    return _from_tensor(windows)


def _from_ids(sequences: list[torch.Tensor]) -> list[Batch]:
    # Only sequences of equal length share a batch: no padding ever enters the statistics.
    batches: list[Batch] = []
    for _, run in itertools.groupby((s for s in sequences if len(s)), key=len):
        batches += _from_tensor(torch.stack(list(run)))
    return batches


def _as_batch(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, int)):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"calib_data holds a dict of uneven lists ({error}); pad them. {EXAMPLE}") from error
    if isinstance(value, torch.Tensor):
        return (value[None] if value.dim() == 1 else value).cpu()
    return value


def _first_samples(batches: list[Batch], samples: int) -> list[Batch]:
    kept: list[Batch] = []
    for batch in batches:
        rows = next((len(v) for v in batch.values() if isinstance(v, torch.Tensor)), 1)
        if samples <= 0:
            break
        if rows > samples:
            batch = {n: v[:samples] if isinstance(v, torch.Tensor) and len(v) == rows else v for n, v in batch.items()}
        kept.append(batch)
        samples -= rows
    return kept


def _check_ids(batch: Batch, index: int, vocab_size: int | None) -> None:
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CalibrationError(f"calibration batch {index}: {name} holds NaN or infinity. Clean the data.")
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return
    if ids.is_floating_point() or not ids.numel():
        raise CalibrationError(
            f"calibration batch {index}: input_ids of {ids.dtype} and shape {tuple(ids.shape)}, not integers. {EXAMPLE}"
        )
    if vocab_size is None:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"calibration batch {index}: token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocab_size}. The data was tokenized with another tokenizer."
        )
