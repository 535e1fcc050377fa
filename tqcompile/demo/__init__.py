"""The embedded model (Qwen3 architecture, 5.2M parameters, trained for this project) and texts for it.

It was trained on Python source; the standard-library modules in HELD_OUT were kept out of training, so the running
Python supplies evaluation and calibration text and nothing is downloaded.
"""

import random
import sysconfig
from pathlib import Path

import torch

MODEL_DIR = Path(__file__).parent / "tiny-qwen3-5m"
WINDOW = 512
HELD_OUT = (
    "pstats.py",
    "multiprocessing/forkserver.py",
    "asyncio/sslproto.py",
    "multiprocessing/context.py",
    "_weakrefset.py",
    "http/cookiejar.py",
    "optparse.py",
    "asyncio/format_helpers.py",
    "statistics.py",
    "email/contentmanager.py",
    "multiprocessing/pool.py",
    "unittest/signals.py",
)
_PACKAGES = ("", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging")
_PACKAGES += ("multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree", "wsgiref")


def load_model(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """The embedded model as a ``transformers`` causal language model in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype).to(device).eval()


def load_tokenizer():
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def windows(tokenizer, texts: list[str], count: int, length: int = WINDOW) -> torch.Tensor:
    """The first ``count`` windows of ``length`` tokens of the joined texts: (count, length) int64."""
    ids = tokenizer("\n".join(texts))["input_ids"]
    rows = min(count, len(ids) // length)
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def held_out_windows(tokenizer, count: int = 64, length: int = WINDOW) -> torch.Tensor:
    """Windows of the modules that the model has never seen: (count, length) int64."""
    texts = [(_stdlib() / name).read_text(encoding="utf-8") for name in HELD_OUT]
    return windows(tokenizer, texts, count, length)


def calibration_texts(characters: int, seed: int = 0) -> list[str]:
    """Other standard-library modules in a seeded order, at least ``characters`` long in all."""
    names = [n for p in _PACKAGES for n in sorted(_stdlib().joinpath(p).glob("*.py"))]
    names = [n for n in names if n.relative_to(_stdlib()).as_posix() not in HELD_OUT]
    random.Random(seed).shuffle(names)
    texts, total = [], 0
    for name in names:
        text = name.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        total += len(text)
        if total >= characters:
            break
    return texts
