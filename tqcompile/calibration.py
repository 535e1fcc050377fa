"""Streams a model block by block over calibration data: one block's statistics are in memory at a time.

Each block is calibrated on the outputs of the blocks before it *as they are then*, that is already quantized.
Models whose repeated blocks cannot be driven one by one are calibrated in one piece.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tqcompile.data import Batch
from tqcompile.errors import CalibrationError, ModelError
from tqcompile.methods.statistics import SiteStatistics, StatisticsCollector
from tqcompile.passes.plan import Site

if TYPE_CHECKING:
    from tqcompile.streaming import StreamedModel

HELD_OUT_FRACTION = 8
# Two sets of hidden states that take more than this share of the machine's memory are kept in files.
MEMORY_SHARE = 0.25


@dataclasses.dataclass
class BlockCall:
    """One batch of a block: block(hidden, *args, **kwargs) should give target; hidden and target (B, S, K).

    mask: (B, S), zero where a token is padding, or None.
    """

    hidden: torch.Tensor
    args: tuple
    kwargs: dict[str, Any]
    target: torch.Tensor
    mask: torch.Tensor | None = None


@dataclasses.dataclass
class Unit:
    """Sites that are calibrated together.

    run: pushes every calibration batch through the code that holds them. calls: for a block, what it is called with
    (outputs of the quantized blocks before it) and what the full-precision model has behind it, one a batch; empty
    where this was not asked for or the unit is no block. means: likewise, norm -> mean (K,) of its output in the
    full-precision model, for the norms that absorb for a site other than the block's first.
    """

    name: str
    sites: list[Site]
    run: Callable[[Callable[[int], None]], None]
    calls: list[BlockCall] = dataclasses.field(default_factory=list)
    means: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class HiddenStates:
    """One tensor a batch, in memory or, where they are to be ``mapped``, in memory-mapped files: the system then holds
    as much of them in memory as there is room for. A tensor in a file is overwritten when its batch is set again.

    The files are in the folder for temporary ones (``TMPDIR``), without a name, so nothing is left behind.

    Raises:
        CalibrationError: they do not fit there.
    """

    def __init__(self, tensors: list[torch.Tensor], mapped: bool = False):
        self._tensors = [_in_file(tensor) for tensor in tensors] if mapped else list(tensors)
        self._mapped = mapped

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._tensors[batch]

    def __setitem__(self, batch: int, tensor: torch.Tensor) -> None:
        if self._mapped:
            self._tensors[batch].copy_(tensor)
        else:
            self._tensors[batch] = tensor


def _in_file(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor on the CPU in a file that is gone when the copy is."""
    handle, name = tempfile.mkstemp(prefix="tqcompile-")
    try:
        # The room is taken now: a full disk found later, by a page that is written, would end the process.
        os.posix_fallocate(handle, 0, max(1, tensor.numel() * tensor.element_size()))
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise CalibrationError(
            f"hidden states of the calibration data do not fit in {Path(name).parent}: {error}. Point TMPDIR to a disk "
            "with more room, or use fewer samples."
        ) from error
    finally:
        os.close(handle)
        os.unlink(name)
    return mapped.view(tensor.shape).copy_(tensor)


def _on_cpu(tensors: list[torch.Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _too_large(tensors: list[torch.Tensor]) -> bool:
    """Whether two sets of such tensors take too much of the machine's memory."""
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return needed > MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Stop(Exception):
    """Ends a forward pass once the last block's input is known."""


def held_out_batches(batches: int) -> int:
    """How many of the last batches are kept for measuring errors only."""
    return max(1, batches // HELD_OUT_FRACTION) if batches > 1 else 0


def collect_statistics(
    model: nn.Module, unit: Unit, batches: list[Batch], device: torch.device | str, balanced: Collection[Site] = ()
) -> dict[Site, SiteStatistics]:
    """Run a unit over all batches and gather the statistics of every site's input.

    balanced: the sites whose statistics are (see ``SiteStatistics``).

    Raises:
        CalibrationError: an activation is NaN or infinite, or a site is never reached; names the module.
    """
    held = held_out_batches(len(batches))
    collectors: dict[Site, StatisticsCollector] = {}
    current = 0

    def hook_for(site: Site):
        def hook(_module, args):
            x = args[0]
            mask = batches[current].get("attention_mask")
            keep = isinstance(mask, torch.Tensor) and mask.shape == x.shape[:-1]
            rows = x[mask.to(x.device).bool()] if keep else x.reshape(-1, x.shape[-1])
            if not torch.isfinite(rows).all():
                raise CalibrationError(
                    f"{site.linears[0]}: its input is NaN or infinite on calibration batch {current}. The model "
                    f"overflows in {x.dtype} or its weights are damaged; try float32 or other data."
                )
            if site not in collectors:
                collectors[site] = StatisticsCollector(x.shape[-1], device, len(batches), held, site in balanced)
            collectors[site].add(rows, held_out=current >= len(batches) - held)

        return hook

    def start(index: int) -> None:
        nonlocal current
        current = index

    with contextlib.ExitStack() as stack:
        for site in unit.sites:
            handle = model.get_submodule(site.linears[0]).register_forward_pre_hook(hook_for(site))
            stack.callback(handle.remove)
        unit.run(start)
    for site in unit.sites:
        if site not in collectors or not collectors[site].tokens:
            raise CalibrationError(
                f"{site.linears[0]}: not reached by any calibration batch. Pass data that exercises it, or put it in "
                f"`ignore`."
            )
    return {site: collector.finish() for site, collector in collectors.items()}


def split_into_units(
    model: nn.Module,
    sites: tuple[Site, ...],
    batches: list[Batch],
    targets: bool = False,
    means: Collection[Site] = (),
    stream: "StreamedModel | None" = None,
) -> Iterator[Unit]:
    """Yield the units of a model in forward order; the caller quantizes each before asking for the next.

    targets: give blocks their ``calls``, which costs another pass over the data and a second set of hidden states.
    means: with these, give them their ``means``, for the norms of these sites.
    stream: the source of ``model``, where its blocks are not in memory; each then is until the next unit is asked for.

    The sites of a stack of blocks (the ``nn.ModuleList`` that holds most sites) come block by block; everything
    else comes last, in one unit over the whole model.

    Raises:
        ModelError: the blocks of a streamed model do not each feed their hidden state to the next.
    """
    prefix, count = largest_stack(model, sites)
    with stream.passing_through() if stream is not None else contextlib.nullcontext():
        driver = _BlockDriver.record(model, prefix, count, batches, stream is not None) if prefix else None
    if stream is not None and driver is None:
        raise ModelError(f"{prefix}: not every block feeds the next, so they cannot be streamed. Quantize in memory.")
    rest = list(sites)
    if driver is not None:
        for index in range(count):
            name = f"{prefix}.{index}"
            inside = [site for site in sites if site.linears[0].startswith(name + ".")]
            rest = [site for site in rest if site not in inside]
            calls, found = [], {}
            with stream.resident(name) if stream is not None else contextlib.nullcontext():
                if targets:
                    absorbers = [site.absorber for site in inside[1:] if site in means and site.absorber]
                    norms = [a.module for a in absorbers if a.kind == "norm" and a.module.startswith(f"{name}.")]
                    with mean_outputs(model, norms, driver.masks) as found:
                        calls = driver.calls(index)
                if inside:
                    yield Unit(name, inside, lambda start, index=index: driver.run(index, start), calls, found)
                if index < count - 1:
                    driver.advance(index)
    if rest:
        yield Unit("model", rest, lambda start: _run_whole(model, batches, start))


@contextlib.contextmanager
def mean_outputs(
    model: nn.Module, names: list[str], masks: list[torch.Tensor | None]
) -> Iterator[dict[str, torch.Tensor]]:
    """While this context is open what the modules ``names`` give is summed, call by call; the dictionary it yields
    holds their means (K,) float32 by name when it is closed. masks: of every call in turn, see ``BlockCall``."""
    means: dict[str, torch.Tensor] = {}
    counts, calls = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def hook_for(name: str):
        def hook(_module, _args, output):
            mask = masks[calls[name]]
            rows = output[mask.bool()] if mask is not None else output.flatten(0, -2)
            calls[name] += 1
            counts[name] += len(rows)
            means[name] = means.get(name, 0) + rows.detach().float().sum(0)

        return hook

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_for(name)).remove)
        yield means
    for name in means:
        means[name] /= counts[name]


def largest_stack(model: nn.Module, sites: tuple[Site, ...]) -> tuple[str, int]:
    """The ``nn.ModuleList`` that holds most sites, and its length; "" where none holds two."""
    best, best_count, length = "", 1, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name:
            count = sum(site.linears[0].startswith(name + ".") for site in sites)
            if count > best_count:
                best, best_count, length = name, count, len(module)
    return best, length


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ModelError naming a weight or bias that holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name} holds NaN or infinity: a damaged checkpoint, or training diverged.")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without any."""
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def model_kwargs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch as keyword arguments on the model's device, without a KV cache where the model has one."""
    device = device_of(model)
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", None):
        kwargs.setdefault("use_cache", False)
    return kwargs


def _run_whole(model: nn.Module, batches: list[Batch], start: Callable[[int], None]) -> None:
    for index, batch in enumerate(batches):
        start(index)
        with torch.no_grad():
            model(**model_kwargs(model, batch))


class _BlockDriver:
    """Runs a stack of blocks one at a time on recorded inputs."""

    def __init__(self, blocks, hidden, extra_args, kwargs, sparing):
        self._blocks, self._extra, self._kwargs = blocks, extra_args, kwargs
        mapped = _on_cpu(hidden) and (sparing or _too_large(hidden))
        self._hidden, self._exact = HiddenStates(hidden, mapped), HiddenStates(hidden, mapped)
        self.masks: list[torch.Tensor | None] = [None] * len(self._hidden)

    @staticmethod
    def record(
        model: nn.Module, prefix: str, count: int, batches: list[Batch], sparing: bool = False
    ) -> "_BlockDriver | None":
        """Record what each block is called with; None unless every block feeds its hidden state to the next.

        sparing: hidden states on the CPU are kept in files however small they are.
        """
        blocks = [model.get_submodule(f"{prefix}.{i}") for i in range(count)]
        hidden: list[torch.Tensor] = []
        extra: list[list[tuple]] = []
        kwargs: list[list[dict]] = []
        calls: list[tuple[int, tuple, dict]] = []
        chained = True
        last_output = None

        def before(index):
            def hook(_module, args, kw):
                nonlocal chained
                if index != len(calls) or not args or (index and args[0] is not last_output):
                    chained = False
                    raise _Stop
                calls.append((index, args, kw))
                if index == count - 1:
                    raise _Stop

            return hook

        def after(_module, _args, output):
            nonlocal last_output
            last_output = output[0] if isinstance(output, tuple) else output

        with contextlib.ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            for batch in batches:
                calls.clear()
                with torch.no_grad(), contextlib.suppress(_Stop):
                    model(**model_kwargs(model, batch))
                if not chained or len(calls) != count:
                    return None
                hidden.append(calls[0][1][0])
                extra.append([call[1][1:] for call in calls])
                kwargs.append([call[2] for call in calls])
        driver = _BlockDriver(blocks, hidden, extra, kwargs, sparing)
        for index, (batch, h) in enumerate(zip(batches, hidden, strict=True)):
            mask = batch.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.shape == h.shape[:-1]:
                driver.masks[index] = mask.to(h.device)
        return driver

    def run(self, index: int, start: Callable[[int], None]) -> None:
        """Push every batch through block ``index``; results are discarded."""
        for batch in range(len(self._hidden)):
            start(batch)
            self._call(index, batch, self._hidden[batch])

    def calls(self, index: int) -> list[BlockCall]:
        """Of block ``index``, which must still be the full-precision one; to be asked for every block in order."""
        self._push(index, self._exact)
        parts = zip(self._hidden, self._extra, self._kwargs, self._exact, self.masks, strict=True)
        return [BlockCall(hidden, extra[index], kwargs[index], exact, m) for hidden, extra, kwargs, exact, m in parts]

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index``, as it is now."""
        self._push(index, self._hidden)

    def _push(self, index: int, states: HiddenStates) -> None:
        for batch in range(len(states)):
            states[batch] = self._call(index, batch, states[batch])

    def _call(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        # The block is looked up anew: its linears are replaced while this runs.
        with torch.no_grad():
            out = self._blocks[index](hidden, *self._extra[batch][index], **self._kwargs[batch][index])
        return out[0] if isinstance(out, tuple) else out
