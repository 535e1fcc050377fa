"""What quantizing a model takes, estimated from the headers of its files before any weight is read."""

import collections
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from tqcompile.allocation import same_method
from tqcompile.checkpoint_files import tensor_shapes
from tqcompile.config import Config, Scheme
from tqcompile.errors import ModelError
from tqcompile.methods.recipe import recipe_of

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BASE = 700_000_000  # Python, torch and transformers, before any model
_WORKING_COPIES = 10  # float32 copies of the largest site while it is learned: weights, rounded, gradients
_TUNING_COPIES = 10  # the same of a whole block while it is tuned: codes, gradients, Adam's moments
_STATES = 6  # sets of hidden states: quantized and exact, each with its successor; targets; one block's intermediates
_STREAMED_STATES = 2  # of those when streaming: the others are in files
_ROWS = 4 * 5120  # rows of inputs that four sites keep, see methods/statistics.py


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of each of the ``processes``. model: its weights. copy: quantized. work: learning a site, tuning a block.
    data: hidden states."""

    model: int
    copy: int
    work: int
    data: int
    processes: int = 1

    @property
    def total(self) -> int:
        return self.processes * (_BASE + self.model + self.copy + self.work + self.data)

    def __str__(self) -> str:
        parts = {"weights": self.model, "quantized copy": self.copy, "learning": self.work, "hidden states": self.data}
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        each = f"each of {self.processes} processes: " if self.processes > 1 else ""
        return f"{self.total / 1e9:.2f} GB ({each}{listed}, Python and torch {_BASE / 1e9:.2f})"


def estimate(
    directory: Path,
    files: list[Path],
    settings: dict[str, Any],
    config: Config,
    dtype: str,
    stream: bool = False,
    processes: int = 1,
) -> Estimate:
    """The peak of a run of ``tqcompile quantize``, deliberately not too low. stream: one block in memory at a time;
    processes: of this machine."""
    shapes = tensor_shapes(files)
    stored = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype)
    sizes = {name: math.prod(shape) for name, (_, shape) in shapes.items()}
    taken = {name: size * (stored or _BYTES.get(shapes[name][0], 8)) for name, size in sizes.items()}
    inner = [
        name for name, (_, shape) in shapes.items() if len(shape) == 2 and any(p.isdigit() for p in name.split("."))
    ]
    if not inner:
        raise ModelError(f"{directory} holds no weights of numbered layers, so there is nothing to quantize.")
    schemes = [Scheme.parse(variant.scheme) for variant in config.variants()]
    bits = max(scheme.weight_bits for scheme in schemes)
    if config.bits_budget is not None:  # every layer is kept at each number of bits while they are compared
        bits = sum(scheme.weight_bits for scheme in same_method(Scheme.parse(config.scheme)))
    model, packed = sum(taken.values()), sum(sizes[name] for name in inner)
    if stream:
        blocks = _block_sizes([name for name in taken if any(p.isdigit() for p in name.split("."))], taken)
        model += max(blocks.values()) - sum(blocks.values())
        packed = max(_block_sizes(inner, sizes).values())
    copy = int(packed * (bits + 16 / config.group_size) / 8 * 1.15)
    widest = max(max(shapes[name][1]) for name in inner)
    # Gate and up, the largest site, are two matrices; second moments and their factors are widest^2 each.
    work = 4 * (2 * _WORKING_COPIES * max(sizes[name] for name in inner) + 5 * widest**2 + _ROWS * widest)
    if config.tune * max(recipe_of(scheme).tune for scheme in schemes):
        work += 4 * _TUNING_COPIES * max(_block_sizes(inner, sizes).values())
    text = settings.get("text_config") or settings
    hidden = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if isinstance(text.get(key), int)), widest)
    element = stored or _BYTES.get(shapes[inner[0]][0], 4)
    states = _STREAMED_STATES if stream else _STATES
    return Estimate(model, copy, work, states * config.samples * config.seq_len * hidden * element, processes)


def _block_sizes(names: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """The sum of ``sizes`` in every block: what shares a name up to its first number."""
    found: dict[str, int] = collections.Counter()
    for name in names:
        parts = name.split(".")
        number = next(index for index, part in enumerate(parts) if part.isdigit())
        found[".".join(parts[: number + 1])] += sizes[name]
    return found


def available() -> int | None:
    """Bytes this process may still take: free memory, and what a control group leaves; None where neither is told."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        found.append(limit - int((group / "memory.current").read_text()) + int(cached))
    except (OSError, KeyError, ValueError):
        pass  # no control group, or one without a limit ("max")
    return min(found, default=None)


def require(needed: Estimate, stream: bool = False) -> None:
    """Raise ModelError when the estimate is more than there is."""
    free = available()
    if free is not None and needed.total > free:
        what, other = "quantizing this model in memory takes about", "--stream, "
        if stream:
            what, other = "quantizing this model block by block takes about", ""
        raise ModelError(
            f"{what} {needed}, and {free / 1e9:.2f} GB are free. Use {other}fewer or shorter samples (--samples, "
            "--seq-len), --dtype bfloat16, or a larger machine; --force tries anyway."
        )


def peak() -> int:
    """The largest amount of memory this process has held so far, in bytes."""
    import resource  # not on every platform

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
