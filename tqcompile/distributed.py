"""Several processes of a torch.distributed group that quantize one model together; with one process nothing changes.

Every process holds the model and the data. Long computations are dealt out in a number of parts that does not depend
on the number of processes, and what the parts give is combined in their order, so any number of processes gives the
same bits. Decisions are taken from gathered numbers and results come from the process that made them, so all processes
hold the same. A process that fails tells the others, so an error in one of them ends all of them.
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from tqcompile.errors import DistributedError

# For the slowest process: it may still load its model, or be the one that writes the checkpoint.
WAIT = datetime.timedelta(minutes=30)


@dataclasses.dataclass
class _World:
    """control: a gloo group, in which processes tell whether they failed. data: the groups for tensors, by type of
    device; that for CUDA is NCCL's, made when it is first needed. over: another process failed or is gone."""

    rank: int
    size: int
    control: Any
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    over: bool = False

    def leave(self) -> None:
        """Close the groups for tensors: who waits there for this process, learns that it does not come."""
        while self.data:
            dist.destroy_process_group(self.data.popitem()[1])


_world: _World | None = None


def active() -> bool:
    """Whether other processes take part in what is done now."""
    return _world is not None


def first() -> bool:
    """Whether this process writes files and shows progress: the only one, or number 0 of several."""
    return _world is None or _world.rank == 0


def size() -> int:
    """How many processes take part."""
    return 1 if _world is None else _world.size


def local_size() -> int:
    """How many of them are on this host, as far as ``torchrun`` tells."""
    return 1 if _world is None else int(os.environ.get("LOCAL_WORLD_SIZE", _world.size))


@contextlib.contextmanager
def launched(device: str | None) -> Iterator[None]:
    """Initialise torch.distributed in a process that ``torchrun`` started, and end it behind the context.

    device: where the numerics run; for CUDA each process takes the GPU of its local rank.

    Raises:
        DistributedError: there are fewer GPUs than processes on this host, ``device`` is one GPU for all, or the
            processes do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device is not None and torch.device(device).type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if torch.device(device).index is not None:
            raise DistributedError(
                f"--device {device} is one GPU for several processes; --device cuda gives each its own."
            )
        if local >= gpus:
            raise DistributedError(
                f"process {local} of this host has no GPU: there are {gpus}. Start one process a GPU."
            )
        torch.cuda.set_device(local)
    with _answering():
        dist.init_process_group("gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done in this context is shared by all processes of torch.distributed's group, where there are several.

    All of them must enter it. An error in one process raises in all of them, at their next exchange at the latest.

    Raises:
        DistributedError: another process failed, ended, or did not answer.
    """
    global _world
    if _world is not None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    with _answering():
        if dist.get_backend() == "gloo":
            dist.barrier()  # finds a process that is gone; making a group would wait for it
        groups = [dist.new_group(backend="gloo", timeout=WAIT) for _ in range(2)]
    _world = world = _World(dist.get_rank(), dist.get_world_size(), groups[0], {"cpu": groups.pop()})
    try:
        yield
        check()  # that nobody failed at the end
    except BaseException as error:
        world.leave()
        if not world.over:
            with contextlib.suppress(DistributedError):
                check(f"{type(error).__name__}: {error}")
        raise
    finally:
        _world = None
        world.leave()
        dist.destroy_process_group(world.control)


def check(failed: str = "") -> None:
    """Wait until all processes are here; failed: what to tell the others before this process gives up.

    Raises:
        DistributedError: another process failed, and why; or it is gone.
    """
    if _world is None:
        return
    with _answering():
        status = torch.tensor(_world.size - _world.rank if failed else 0)
        dist.all_reduce(status, dist.ReduceOp.MAX, group=_world.control)
        if not status:
            return
        _world.over = True
        source = _world.size - int(status)
        message = _text(failed, source)
    if not failed:
        raise DistributedError(f"process {source} failed ({message})")


def own(count: int) -> range:
    """Which of ``count`` parts this process computes: a consecutive share."""
    if _world is None:
        return range(count)
    bounds = [-(-rank * count // _world.size) for rank in (_world.rank, _world.rank + 1)]
    return range(*bounds)


def owner(index: int, count: int) -> int:
    """The process that computes part ``index`` of ``count``."""
    return index * size() // count


def sum_parts(
    compute: Callable[[Iterable[int]], Iterable[torch.Tensor]], count: int, like: torch.Tensor
) -> torch.Tensor:
    """The sum of ``count`` tensors, added in their order.

    Args:
        compute: numbers of parts -> their tensors, in turn; asked for the parts of this process.
        like: of the shape, dtype and device of each.
    """
    found = list(compute(own(count)))
    parts = found if _world is None else _gather(found, count, like)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def numbers(compute: Callable[[int], float], count: int) -> list[float]:
    """``compute`` of 0 to count - 1, each in one process; the same list in all of them."""
    found = [torch.tensor(compute(index), dtype=torch.float64) for index in own(count)]
    parts = found if _world is None else _gather(found, count, torch.zeros((), dtype=torch.float64))
    return [float(part) for part in parts]


def share(tensors: dict[str, torch.Tensor], device: torch.device, source: int = 0) -> dict[str, torch.Tensor]:
    """The tensors that process ``source`` passes, in all processes; what others pass is of no interest.

    device: where they come to lie.
    """
    if _world is None:
        return tensors
    mine = source == _world.rank
    if mine:
        tensors = {name: tensor.detach().to(device).contiguous() for name, tensor in tensors.items()}
    kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()} if mine else {}
    found = {}
    for name, (dtype, shape) in same(kinds, source).items():
        tensor = tensors[name] if mine else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8)  # as bytes: gloo does not know every type
            _exchange(lambda group, data=data: dist.broadcast(data, source, group=group), tensor.device)
        found[name] = tensor
    return found


def same(value: Any, source: int = 0) -> Any:
    """A value of process ``source``, in all of them; it must be one that JSON keeps."""
    if _world is None:
        return value
    check()
    with _answering():
        return json.loads(_text(json.dumps(value), source))


def require_same(values: dict[str, Any]) -> None:
    """Raise DistributedError where values (by what they are called) are not those of the first process."""
    if _world is None:
        return
    expected = same(values)
    changed = [name for name in {**expected, **values} if expected.get(name) != values.get(name)]
    if changed:
        raise DistributedError(
            f"process {_world.rank} does not do what process 0 does: {', '.join(changed)} differ. Start all processes "
            "with the same model, data and settings on equal machines."
        )


def _gather(found: list[torch.Tensor], count: int, like: torch.Tensor) -> list[torch.Tensor]:
    """All parts, of which this process has ``found``."""
    most = -(-count // _world.size)
    sent = torch.stack([*found, *[like] * (most - len(found))])
    received = [torch.empty_like(sent) for _ in range(_world.size)]
    _exchange(lambda group: dist.all_gather(received, sent, group=group), sent.device)
    starts = [-(-rank * count // _world.size) for rank in range(_world.size)]
    return [received[owner(index, count)][index - starts[owner(index, count)]] for index in range(count)]


def _exchange(collective: Callable[[Any], Any], device: torch.device) -> None:
    """A collective call of the group for tensors on ``device``, which all processes make or none."""
    if device.type == "cuda":
        check()  # who waits in NCCL cannot be told any more
        if "cuda" not in _world.data:
            _world.data["cuda"] = dist.new_group(backend="nccl", timeout=WAIT)
    problem = ""
    try:
        collective(_world.data[device.type])
    except RuntimeError as error:
        problem = str(error)
    if problem:  # not where the error is handled, as its traceback keeps the group alive
        _world.leave()
        check()
        _gone(problem)


def _text(text: str, source: int) -> str:
    """The text of process ``source``."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    dist.broadcast(length, source, group=_world.control)
    data = data if _world.rank == source else torch.empty(int(length), dtype=torch.uint8)
    if len(data):
        dist.broadcast(data, source, group=_world.control)
    return bytes(data.tolist()).decode()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn what torch.distributed raises when a process is gone or silent into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        _gone(str(error))


def _gone(problem: str) -> NoReturn:
    if _world is not None:
        _world.over = True
    raise DistributedError(
        f"another process ended, or did not answer within {WAIT.total_seconds() / 60:.0f} minutes "
        f"({problem.splitlines()[0]}). Its own output says why; all processes must call tqcompile together."
    )
