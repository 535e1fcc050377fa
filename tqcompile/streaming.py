"""A model larger than memory: the decoder blocks of a safetensors checkpoint are read one at a time.

Tensors that are not in memory are *hollow*: of their shape and dtype, NaN throughout (zero in integers), one element of
storage. So the model runs every analysis as it would in memory, and a block used before it is read is found out.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqcompile.calibration import check_finite, largest_stack
from tqcompile.checkpoint import save_with, write_model
from tqcompile.checkpoint_files import check_directory, read_json, tensor_shapes
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ConfigError, ModelError
from tqcompile.modules import QUANTIZED
from tqcompile.passes.plan import Plan, Site
from tqcompile.passes.replace_conv1d import is_conv1d

OUTSIDE = "outside of the blocks that are streamed; it is quantized only in memory"
_INDEX = "model.safetensors.index.json"
_HINT = "Quantize this model in memory (without --stream)."


def check_config(config: Config) -> None:
    """Raise ConfigError on a setting that needs the whole model in memory."""
    for name, neutral in (("rotate_stream", False), ("bits_budget", None), ("lm_head", "keep")):
        value = getattr(config, name)
        if value != neutral:
            raise ConfigError(f"{name}={value!r} needs the whole model in memory, so it cannot be combined with stream")


class StreamedModel:
    """A transformers model of which only what lies outside its decoder blocks, and one block, are in memory.

    model: its module, on ``device``, in eval mode; hollow until :meth:`prepare`. blocks: names of the blocks in order.

    Args:
        architecture: its class. directory: with ``config.json`` and safetensors files; settings: the parsed
            ``config.json``. dtype: "auto" (as ``config.json`` says) or the name of one.
    Raises:
        CheckpointError: a file is damaged or elsewhere. ConfigError: "auto", and ``config.json`` names no dtype.
        ModelError: tensors have other names or shapes than the model's, or the model has Conv1D layers.
    """

    def __init__(self, architecture: type, directory: Path, settings: Mapping, dtype: str = "auto", device="cpu"):
        check_directory(directory, settings)
        self._files = _files_of_tensors(directory)
        config = architecture.config_class.from_pretrained(directory, local_files_only=True)
        wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
        if not isinstance(wanted, torch.dtype):
            raise ConfigError(f"{directory / 'config.json'} names no dtype; pass --dtype.")
        with torch.device("meta"):
            skeleton = architecture._from_config(copy.deepcopy(config), dtype=wanted)
        self.unused = self._match_names(skeleton, directory)
        hollow = {name: _hollow(tensor, "cpu") for name, tensor in skeleton.state_dict().items() if name in self._files}
        model = architecture.from_pretrained(None, config=config, state_dict=hollow, dtype=wanted)
        self.model = self._complete(model, directory, torch.device(device))
        self.blocks: list[str] = []

    def _match_names(self, skeleton: nn.Module, directory: Path) -> list[str]:
        """Refuse tensors that are not those of the model; leave out, and return, those it has no place for."""
        expected = skeleton.state_dict()
        stored = tensor_shapes(sorted(set(self._files.values())))
        stored = {name: shape for name, (_, shape) in stored.items() if name in self._files}
        for name, module in skeleton.named_modules():
            if is_conv1d(module):
                raise ModelError(f"{name} is a Conv1D, whose weight is stored transposed. {_HINT}")
        aliases = _aliases(skeleton)
        for name, tensor in expected.items():
            if not any(alias in stored for alias in aliases.get(name, [name])):
                why = "it is not complete, or transformers converts its names"
                raise ModelError(f"{directory} holds no tensor {name}: {why}. {_HINT}")
            if name in stored and stored[name] != list(tensor.shape):
                raise ModelError(
                    f"tensor {name} is {stored[name]} in {directory}, {list(tensor.shape)} in the model. {_HINT}"
                )
        unused = [name for name in stored if name not in expected]
        # Of a tensor stored under two names, transformers makes one only if both are equal.
        for first, second in getattr(skeleton, "all_tied_weights_keys", {}).items():
            if first in stored and second in stored and torch.equal(self._read(first), self._read(second)):
                del self._files[first]
        for name in unused:
            del self._files[name]
        return unused

    @staticmethod
    def _complete(model: nn.Module, directory: Path, device: torch.device) -> nn.Module:
        """What ``from_pretrained`` does with a directory beside reading its tensors, which stay hollow."""
        from transformers import GenerationConfig

        if getattr(model, "_weight_conversions", None):
            raise ModelError(f"transformers converts the tensors of {directory} when it loads them. {_HINT}")
        if model.can_generate():
            own = (directory / "generation_config.json").is_file()
            source = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True, **source)
        model.config.name_or_path = str(directory)
        stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = _hollow(tensor, device) if id(tensor) in stored else tensor.data.to(device)
        return model.eval().requires_grad_(False)

    def prepare(self, plan: Plan) -> Plan:
        """Find the blocks and read what lies outside of them; the plan of what is quantized in them.

        Raises:
            ModelError: there is no stack of blocks, or blocks share parameters with something else.
        """
        prefix, count = largest_stack(self.model, plan.sites)
        if not prefix:
            raise ModelError(f"{type(self.model).__name__} has no stack of blocks to stream. {_HINT}")
        self.blocks = [f"{prefix}.{index}" for index in range(count)]
        for names in _aliases(self.model).values():
            owners = {_block_of(name, prefix) for name in names}
            if len(owners) > 1:
                raise ModelError(f"{names[0]} and {names[1]} are one parameter, not both in one block. {_HINT}")
        self._fill([name for name in self._files if not name.startswith(f"{prefix}.")])
        inside = tuple(site for site in plan.sites if _in_one_block(site, prefix))
        outside = {name: OUTSIDE for site in plan.sites if site not in inside for name in site.linears}
        notes = [*plan.notes, f"streamed: {count} blocks of {prefix}, one at a time"]
        if self.unused:
            notes.append(f"not in the model, left out: {', '.join(self.unused[:4])}, {len(self.unused)} tensors in all")
        return Plan(inside, {**plan.skipped, **outside}, tuple(notes), None, OUTSIDE)

    @contextlib.contextmanager
    def resident(self, block: str) -> Iterator[None]:
        """The block is in memory inside, as the checkpoint has it at first; hollow, in its new form, afterwards."""
        self._fill([name for name in self._files if name.startswith(f"{block}.")])
        try:
            yield
        finally:
            module = self.model.get_submodule(block)
            packed = [tensor for m in module.modules() if isinstance(m, QUANTIZED) for tensor in m.buffers()]
            for tensor in [*module.state_dict(keep_vars=True).values(), *packed]:
                tensor.data = _hollow(tensor)

    @contextlib.contextmanager
    def passing_through(self) -> Iterator[None]:
        """Inside, each block gives the hidden states that it is given, in the form in which it gives its own."""
        modules = {name: self.model.get_submodule(name) for name in self.blocks}
        forms: dict[type, tuple | None] = {}
        for name, module in modules.items():
            module.forward = self._pass_through(name, module.forward, forms)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    def _pass_through(self, block: str, own: Callable, forms: dict[type, tuple | None]) -> Callable:
        """forms: by class of a block, what it gives beside hidden states; None where it gives a tensor."""
        kind = type(self.model.get_submodule(block))

        def forward(hidden, *args, **kwargs):
            if kind not in forms:
                with self.resident(block):
                    found = own(hidden, *args, **kwargs)
                given = found[0] if isinstance(found, tuple) else found
                if not isinstance(given, torch.Tensor) or given.shape != hidden.shape:
                    raise ModelError(f"{block} does not give hidden states of the shape it is given. {_HINT}")
                forms[kind] = found[1:] if isinstance(found, tuple) else None
            return hidden if forms[kind] is None else (hidden, *forms[kind])

        return forward

    def original_state(self) -> Mapping[str, torch.Tensor]:
        """``state_dict()`` of the whole model before it is quantized, each tensor read when it is asked for.

        Asking for a tensor of a linear raises ModelError where it holds NaN or infinity.
        """
        return _OriginalState(self)

    def _fill(self, names: list[str]) -> None:
        own = self.model.state_dict(keep_vars=True)
        for name in names:
            own[name].data = self._read(name).to(own[name])

    def _read(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint, in memory of its own: of a mapped file every page read stays in memory."""
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error}); it is damaged.") from error

    def save(self, directory: Path, finished: Path, tokenizer: Any = None) -> None:
        """Write the checkpoint of the quantized model, one shard a block.

        Args:
            directory: as in :func:`tqcompile.save`. finished: the folder of the run's finished blocks; everything is
                written there and then moved into place.
        """

        def write(folder: Path) -> None:
            state = self.model.state_dict()
            inside = {block: [name for name in state if name.startswith(f"{block}.")] for block in self.blocks}
            outside = state.keys() - {name for names in inside.values() for name in names}
            write_model(self.model, folder, {name: state[name] for name in state if name in outside})
            first = folder / "model.safetensors"
            shards = [f"model-{i + 1:05}-of-{len(inside) + 1:05}.safetensors" for i in range(len(inside) + 1)]
            first.rename(folder / shards[0])
            for shard, (block, names) in zip(shards[1:], inside.items(), strict=True):
                self._write_block(folder / shard, block, names, finished / f"{block}.safetensors")
            _write_index(folder, shards)

        save_with(self.model, directory, tokenizer, write, staging=finished)

    def _write_block(self, path: Path, block: str, names: list[str], finished: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        tensors, expected = {}, self.model.state_dict()
        if finished.is_file():
            with safe_open(finished, framework="pt") as file:
                tensors = {f"{block}.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in names:
            if name not in tensors:
                tensors[name] = self._read(name).to(expected[name].dtype)
        save_file(tensors, path, metadata={"format": "pt"})


class _OriginalState(Mapping):
    def __init__(self, source: StreamedModel):
        self._source, self._state = source, source.model.state_dict()
        self._aliases = _aliases(source.model)
        modules = source.model.named_modules(remove_duplicate=False)
        self._linears = {f"{name}.{leaf}" for name, m in modules if isinstance(m, nn.Linear) for leaf in m._parameters}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = next(n for n in self._aliases.get(name, [name]) if n in self._source._files)
        tensor = self._source._read(stored).to(self._state[name].dtype)
        if name in self._linears:
            check_finite(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _hollow(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    fill = math.nan if tensor.is_floating_point() else 0
    return torch.full((), fill, dtype=tensor.dtype, device=device or tensor.device).expand(tensor.shape)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of that parameter, where it has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _block_of(name: str, prefix: str) -> str:
    """The number of the block that a name is in; "" outside of the blocks."""
    return name.removeprefix(f"{prefix}.").split(".")[0] if name.startswith(f"{prefix}.") else ""


def _in_one_block(site: Site, prefix: str) -> bool:
    found = {_block_of(name, prefix) for name in site.linears}
    return len(found) == 1 and "" not in found


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, of the files that transformers would read."""
    index = directory / _INDEX
    if not index.is_file():
        path = directory / "model.safetensors"
        if not path.is_file():
            raise ModelError(f"{directory} holds neither model.safetensors nor {_INDEX}.")
        return dict.fromkeys(tensor_shapes([path]), path)
    files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
    for path in sorted(set(files.values())):
        found = tensor_shapes([path])
        lost = next((name for name, file in files.items() if file == path and name not in found), None)
        if lost is not None:
            raise CheckpointError(f"{path} holds no tensor {lost}, which {_INDEX} says it does; fetch both again.")
    return files


def _write_index(folder: Path, shards: Sequence[str]) -> None:
    """The index of shards, last: without it nothing loads."""
    files = {name: (folder / shard) for shard in shards for name in tensor_shapes([folder / shard])}
    total = sum((folder / shard).stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file.name for name, file in sorted(files.items())}}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
