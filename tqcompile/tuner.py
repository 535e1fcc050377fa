"""``tqcompile tune``: time a kernel's candidate configurations, keep the fastest that is correct.

Every candidate is first held against the op's plain-torch definition; one that fails to launch or is wrong is
dropped and counted. Times are of CUDA graphs over enough weight copies to leave the L2 cache.
"""

import dataclasses
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tqcompile import ops
from tqcompile.checkpoint import MANIFEST
from tqcompile.cuda_graph import capture
from tqcompile.errors import CheckpointError, ConfigError
from tqcompile.kernels import tuning
from tqcompile.ops.twin_gemm import defer_from_of

OP = "twin_gemm"
COLD_BYTES = 200e6  # weight copies rotate through at least this much: three times a 60 MB L2 cache
_OPERANDS = {"int8": torch.int8, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A weight to tune for: (N, K), rank R, group size, dtype of the operand, whether its scales lie on a grid."""

    n: int
    k: int
    rank: int = 64
    group_size: int = 128
    operand: torch.dtype = torch.int8
    grid: bool = True

    @property
    def form(self) -> str:
        return tuning.form_of(self.operand, self.grid, self.group_size, self.rank)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """config: the fastest correct one, or None. us: its time; rule_us: that of the kernel's own rule, None if that is
    wrong. tried: candidates timed; dropped: candidates that do not launch or are wrong, with the last reason."""

    problem: Problem
    tokens: int
    config: dict | None
    us: float | None
    rule_us: float | None
    tried: int
    dropped: int
    why: str = ""


def numbers(text: str, option: str) -> list[int]:
    """``"1,16"`` -> [1, 16]. Raises ConfigError naming the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"{option} must be positive integers with commas between them, got {text!r}")
    return found


def problems(shapes: str, rank: int, group_size: int, activations: str) -> list[Problem]:
    """``"28672x4096,4096x14336"`` -> problems. Raises ConfigError on what cannot be a weight."""
    if activations not in _OPERANDS:
        raise ConfigError(f"--activations must be one of {', '.join(_OPERANDS)}, got {activations!r}")
    found = []
    for text in shapes.split(","):
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(f"--shapes must look like 28672x4096,4096x14336 (or name a checkpoint), got {shapes!r}")
        n, k = map(int, parts)
        if k % group_size:
            raise ConfigError(f"--shapes {text}: group size {group_size} does not divide {k}")
        found.append(Problem(n, k, rank, group_size, _OPERANDS[activations]))
    return list(dict.fromkeys(found))


def problems_of_checkpoint(directory: Path) -> list[Problem]:
    """The weights of a saved model as its compiled graph has them: layers that share a down projection are one.

    Raises:
        CheckpointError: the folder holds no manifest of tqcompile.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        modules, tensors = manifest["modules"], manifest["tensors"]
        grid = manifest["report"]["config"]["scheme"].startswith("twin")  # the others keep free group scales
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); save the model with tqcompile.save.") from error
    groups: dict[tuple, list[dict]] = {}
    for name, spec in modules.items():
        if spec.get("weight_bits", 4) == 8:
            continue  # an output head with a kernel of its own
        down = tensors.get(f"{name}.down.weight_packed")
        parent = name.rpartition(".")[0]
        groups.setdefault((parent, down["sha256"] if down else name, spec["in_features"]), []).append(spec)
    found = []
    for members in groups.values():
        spec = members[0]
        rank = spec["rank"] if spec["low_rank_bits"] == 4 else 0
        operand = torch.bfloat16 if spec["act_bits"] == 16 else torch.int8
        n = sum(member["out_features"] for member in members)
        found.append(Problem(n, spec["in_features"], rank, spec["group_size"], operand, grid))
    return list(dict.fromkeys(found))


def run(known: list[Problem], tokens: list[int], export: Path | None = None) -> list[Outcome]:
    """Tune the fused kernel on this GPU, write the cache file and print a table.

    Raises:
        ConfigError: there is no GPU, no Triton, or the kernel cannot be tuned.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "tune times kernels on an NVIDIA GPU, and torch finds none (torch.cuda.is_available() is False); run it on "
            "the machine that will run the model"
        )
    try:
        kernel = importlib.import_module(f"tqcompile.kernels.{OP}")
    except ImportError as error:
        raise ConfigError(f"the kernel of {OP} cannot be imported ({error}); pip install 'tqcompile[gpu]'") from error
    if not hasattr(kernel, "candidates"):
        raise ConfigError(f"the kernel of {OP} has a rule for its configuration and no candidates to choose from")
    console, gpu = Console(), torch.cuda.get_device_name()
    outcomes = []
    for problem in known:
        make = functools.partial(twin_gemm_arguments, problem)
        for t in tokens:
            candidates = kernel.candidates(problem.n, problem.k, t, problem.form)
            outcome = tune(problem, t, candidates, kernel.launch, ops.twin_gemm_reference, make, graph_time)
            outcomes.append(outcome)
            if outcome.config is not None:  # kept at once: a run that is stopped loses nothing
                key = tuning.TuneKey.here(OP, gpu, problem.n, problem.k, t, problem.form)
                tuning.store({key: {"config": outcome.config, "us": outcome.us}})
            console.print(f"{problem.n}x{problem.k} {problem.form} T={t}: {describe(outcome)}", highlight=False)
    console.print(table(outcomes, gpu))
    console.print(f"kept in {tuning.cache_file()}", highlight=False)
    if export is not None:
        tuning.write_json(export, tuning.to_shipped(gpu, tuning.triton_version()))
    return outcomes


def tune(
    problem: Problem,
    tokens: int,
    candidates: Sequence[dict],
    launch: Callable,
    reference: Callable,
    make: Callable[[int, int], tuple],
    clock: Callable[[Callable, list[tuple]], float],
) -> Outcome:
    """The fastest correct candidate.

    Args:
        launch: ``launch(*arguments, config=dict or None)``. reference: ``reference(*arguments)``, the definition.
        make: ``make(tokens, seed)`` gives arguments on the device. clock: ``clock(call, copies)`` gives microseconds of
            one ``call(arguments)``, over several sets of arguments.
    """
    first = make(tokens, 0)
    expected = reference(*first)
    weights = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
    copies = [first, *(make(tokens, seed) for seed in range(1, min(16, int(COLD_BYTES / weights) + 1)))]
    times: list[tuple[float, int]] = []
    rule_us, dropped, why = None, 0, ""
    for index, config in enumerate([None, *candidates]):
        try:
            fault = difference(launch(*first, config=config), expected)
            took = clock(functools.partial(_with, launch, config), copies) if fault is None else None
        except Exception as error:  # too much shared memory, registers, an illegal tile: any of Triton's errors
            fault, took = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", None
        if took is None:
            dropped, why = dropped + (config is not None), f"{config}: {fault}"
        elif config is None:
            rule_us = took
        else:
            times.append((took, index - 1))
    best = min(times, default=None)
    found = None if best is None else dict(candidates[best[1]])
    return Outcome(problem, tokens, found, best and best[0], rule_us, len(times), dropped, why)


def _with(launch: Callable, config: dict | None, arguments: tuple):
    return launch(*arguments, config=config)


def difference(y: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is wrong with a result, or None. Both are rounded to one dtype after sums in float32, in other orders.

    Allowed for every element: one unit in the last place, and a thousandth of a typical element, far above what the
    order of a sum can change and far below a wrong product.
    """
    if y.shape != expected.shape or y.dtype != expected.dtype:
        return f"{y.dtype} {tuple(y.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    wide, exact = y.float(), expected.float()
    typical = exact.square().mean().sqrt()
    allowed = torch.finfo(y.dtype).eps * exact.abs() + 1e-3 * typical
    wrong = ~((wide - exact).abs() <= allowed)
    return f"{int(wrong.sum())} of {wrong.numel()} values are wrong" if wrong.any() else None


def graph_time(call: Callable, copies: list[tuple]) -> float:
    """Median microseconds of one call, in a CUDA graph of one call a copy."""
    replay = _replay_of(call, copies)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(12)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[2:]) * 1e3 / len(copies)


def _replay_of(call: Callable, copies: list) -> Callable[[], None]:
    return capture(lambda: [call(copy) for copy in copies])[0]


@functools.cache
def _read_to_pass_time() -> torch.Tensor:
    return torch.zeros(1 << 26, device="cuda")


def timer(call: Callable, copies: list) -> tuple[Callable[[], float], int]:
    """For :func:`times_in_turns`: a function that measures the milliseconds of ``call(copy)`` for every copy together,
    in one CUDA graph, and the number of copies."""
    replay, busy = _replay_of(call, copies), _read_to_pass_time()

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The GPU has work until the graph is queued, or its launch would count too; of reads, since what is written
        # would still be on its way from the L2 cache to memory during the first calls.
        busy.sum()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return once, len(copies)


def times_in_turns(timers: Mapping[str, tuple[Callable[[], float], int]], budget_ms: float = 60.0) -> dict[str, float]:
    """Median microseconds of one call of each timer, given with its number of calls.

    They take turns, so that all of them meet the GPU at the same clock, which falls while large products run."""
    warm = sum(once() for once, _ in timers.values())
    rounds = max(7, min(30, int(budget_ms / max(warm, 1e-3))))
    found: dict[str, list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, (once, _) in timers.items():
            found[key].append(once())
    return {key: statistics.median(found[key]) * 1e3 / count for key, (_, count) in timers.items()}


def times_alone(
    timers: Mapping[str, tuple[Callable[[], float], int]], seconds: float, pause: float = 0.0, rounds: int = 1
) -> dict[str, float]:
    """As :func:`times_in_turns`, but each timer runs alone for so many seconds, after a pause of so many, and the
    second half of them counts; the median of the rounds. Large products have clocks of their own: long runs the one
    that the GPU's power limit leaves to each, short runs after a pause the one of a GPU at rest."""
    found = {key: [] for key in timers}
    for _ in range(rounds):
        for key, (once, count) in timers.items():
            time.sleep(pause)
            times, start = [once()], time.perf_counter()
            while time.perf_counter() - start < seconds:
                times.append(once())
            found[key].append(statistics.median(times[len(times) // 2 :]) * 1e3 / count)
    return {key: statistics.median(values) for key, values in found.items()}


def twin_gemm_arguments(problem: Problem, tokens: int, seed: int, device: str = "cuda") -> tuple:
    """Random arguments of ``twin_gemm``, with what makes t where the product does."""
    g = torch.Generator(device).manual_seed(seed)
    n, k, rank, integer = problem.n, problem.k, problem.rank, problem.operand == torch.int8
    unit = torch.randint(8, 16, (n, 1), generator=g, device=device) * 2.0**-14
    m = torch.randint(1, 17, (n, k // problem.group_size), generator=g, device=device)

    def packed(rows, columns):
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g, device=device)

    def normal(*shape):
        return torch.randn(shape, generator=g, device=device).bfloat16()

    if integer:
        operand = torch.randint(-127, 128, (tokens, k), generator=g, device=device, dtype=torch.int8)
        scale = torch.rand(tokens, 1, generator=g, device=device) * 0.02 + 0.002
    else:
        operand, scale = normal(tokens, k), None
    low_rank = (normal(tokens, rank), packed(n, rank), (m[:, :1] * 0.01).bfloat16()) if rank else (None, None, None)
    channel = unit[:, 0].float() if problem.grid else None
    weights = (packed(n, k), (unit * m).bfloat16(), channel)
    makes_t = (None, None, 0)
    if rank:
        makes_t = (packed(rank, k), (m[:1].expand(rank, -1) * 2.0**-14).bfloat16().contiguous(), defer_from_of(n, k))
    return (operand, scale, low_rank[0], *weights, *low_rank[1:], None, None, torch.bfloat16, *makes_t)


def describe(outcome: Outcome) -> str:
    if outcome.config is None:
        return f"no candidate is correct; {outcome.why}" if outcome.dropped else "no candidates"
    rule = f", the rule's {outcome.rule_us:.1f} us" if outcome.rule_us is not None else ""
    return f"{outcome.us:.1f} us{rule}, {outcome.tried} tried, {outcome.dropped} dropped"


def table(outcomes: list[Outcome], gpu: str) -> Table:
    shown = Table("weight", "form", "tokens", "us", "rule us", "tried", "dropped", "config", title=f"tuned on {gpu}")
    for o in outcomes:
        times = ("-" if us is None else f"{us:.1f}" for us in (o.us, o.rule_us))
        config = "-" if o.config is None else " ".join(f"{key}={value}" for key, value in o.config.items())
        shown.add_row(
            f"{o.problem.n}x{o.problem.k}", o.problem.form, str(o.tokens), *times, str(o.tried), str(o.dropped), config
        )
    return shown
