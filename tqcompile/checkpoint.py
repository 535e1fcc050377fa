"""``save`` and ``load``: safetensors, ``config.json`` with a ``quantization_config``, and a manifest of checksums.

A directory is written beside its destination and moved into place when complete. Before anything is loaded, every
tensor is checked against the manifest ``tqcompile.json``; nothing in a checkpoint is ever executed.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqcompile import __version__
from tqcompile.checkpoint_files import check_directory, check_types, hash_tensors, read_json
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ModelError
from tqcompile.methods.components import LinearSpec, are_signs, lattice_fits
from tqcompile.modules import Int8Linear, LatticeLinear, TwinLinear, empty_layer
from tqcompile.passes.correct_norm_mean import insert_shift
from tqcompile.passes.replace_conv1d import as_linear, is_conv1d
from tqcompile.passes.replace_linear import Journal
from tqcompile.passes.rotate_residual_stream import insert_after_norm
from tqcompile.reporting import Report

QUANT_METHOD = "twinquant"
FORMAT_VERSION = 1
MANIFEST = "tqcompile.json"
PARTIAL = ".partial-"  # begins the names of files and folders that are not complete
_BIAS_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SAFETENSORS_NAME = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
}


def quantization_config(
    config: Config, specs: dict[str, dict], rotated_norms: Sequence[str] = (), shifted_norms: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json``.

    specs: module name -> LinearSpec as a dict. rotated_norms: of a model with a rotated residual stream, names of the
    norms that a matrix follows; shifted_norms: of a model with corrected means, names of the norms that a bias
    follows. These entries are absent when there are none.
    """
    norms = {"rotated_norms": list(rotated_norms), "shifted_norms": list(shifted_norms)}
    extra = {key: names for key, names in norms.items() if names}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "tqcompile_version": __version__,
        "config": config.to_dict(),
        "modules": specs,
        **extra,
    }


def save(model: nn.Module, directory: str | Path, tokenizer: Any = None) -> None:
    """Save a quantized model.

    Hugging Face models get everything that ``save_pretrained`` writes, so ``AutoModel*.from_pretrained(directory)``
    reads it back after ``import tqcompile``. Other modules are saved as one ``model.safetensors``.

    Args:
        directory: created, or replaced when it already holds a tqcompile checkpoint.
        tokenizer: saved beside the model where given, so that the directory is all that is needed to use it.
    Raises:
        ModelError: the model is not quantized. CheckpointError: the directory holds something else. OSError: the
        disk refuses; an existing checkpoint is then still whole.
    """
    if getattr(model, "tqcompile_quantization", None) is None:
        raise ModelError(f"{type(model).__name__} is not quantized by tqcompile; call tqcompile.compile first.")
    save_with(model, directory, tokenizer, lambda folder: write_model(model, folder))


def save_with(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any,
    write: Callable[[Path], None],
    staging: Path | None = None,
) -> None:
    """:func:`save`, where ``write`` puts ``config.json`` and all tensors into the folder that it is given.

    staging: where that folder is until it is complete, on the same disk; beside ``directory`` by default.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise CheckpointError(f"{target} exists and is not a tqcompile checkpoint. Choose another directory.")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix, parent = (f".{target.name}.", target.parent) if staging is None else (PARTIAL, staging)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    new, old = folder / "new", folder / "old"
    try:
        new.mkdir()
        write(new)
        _write_manifest(model, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)


def load(directory: str | Path, model: nn.Module | None = None, **from_pretrained: Any) -> nn.Module:
    """Load a model saved by :func:`save`; the reloaded model gives bit-equal outputs.

    Args:
        directory: a checkpoint. model: for modules that are not from transformers, an instance of the original
            architecture, whose linears are replaced; a Hugging Face model is built from ``config.json``.
        from_pretrained: e.g. ``dtype`` or ``device_map``, handed to transformers.
    Raises:
        CheckpointError: the checkpoint is foreign, truncated or altered; names the file or tensor at fault.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    check_directory(directory, settings)
    if model is None:
        names = settings.get("architectures") or []
        if len(names) != 1:
            raise CheckpointError(
                f"{directory / 'config.json'} names no transformers architecture; pass the module to fill as model=."
            )
        import transformers

        architecture = getattr(transformers, names[0], None)
        if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
            raise CheckpointError(f"transformers {transformers.__version__} has no model class {names[0]!r}.")
        return architecture.from_pretrained(directory, local_files_only=True, **from_pretrained)
    if from_pretrained:
        raise CheckpointError(f"{', '.join(from_pretrained)} cannot be combined with model=.")
    children = {module: dict(module._modules) for module in model.modules()}
    try:
        _fill(model, settings["quantization_config"], directory)
    except BaseException:
        for module, before in children.items():
            module._modules.update(before)
        raise
    return model.eval()


def _fill(model: nn.Module, quantization: dict[str, Any], directory: Path) -> None:
    """Give a module that is not from transformers the structure and the tensors of a checkpoint."""
    files = sorted(directory.glob("*.safetensors"))
    replace_linears(model, quantization, files)
    _stored_report(quantization, directory)  # read again at the end; an unreadable one is refused before the weights
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file.name} cannot be read ({error}); it was altered.") from error
    _fill_aliases(model, state)
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(f"{directory}: missing tensors {missing[:3]}, unexpected tensors {unexpected[:3]}.")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point():
            found = f"{state[name].dtype} {list(state[name].shape)}"
            raise CheckpointError(f"tensor {name} is {found}, the model needs {tensor.dtype} {list(tensor.shape)}.")
    model.load_state_dict(state, strict=True, assign=True)
    finish_loading(model, quantization, directory)


def _fill_aliases(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """A tensor with several names in the model is stored once; give it back its other names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    stored = {id(tensor): state[name] for name, tensor in named if name in state}
    for name, tensor in named:
        if id(tensor) in stored:
            state.setdefault(name, stored[id(tensor)])


def replace_linears(model: nn.Module, quantization: dict[str, Any], files: list[Path]) -> None:
    """Check a checkpoint's files against its description, then give the model the structure that it describes.

    Linears become empty quantized layers; a matrix follows every rotated norm, a bias every shifted one.

    Raises:
        CheckpointError: naming the module or tensor at fault; the model is then unchanged.
    """
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"checkpoint format {version!r} is not {FORMAT_VERSION}: another tqcompile wrote it.")
    for key in ("modules", "config"):
        if not isinstance(quantization.get(key), dict):
            raise CheckpointError(f"the quantization_config in config.json describes no {key}; it was altered.")
    headers = verify_files(files)
    manifest = _read_manifest(files[0].parent)
    layers: dict[str, TwinLinear | LatticeLinear | Int8Linear] = {}
    modules = dict(model.named_modules())
    for name, data in quantization["modules"].items():
        linear = as_linear(modules[name]) if is_conv1d(modules.get(name)) else modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{name}: no linear layer of that name; the checkpoint is of another model.")
        layer = empty_layer(_checked_spec(name, data, linear), device="meta")
        for key, tensor in layer.state_dict().items():
            _check_entry(f"{name}.{key}", tensor, headers)
        if manifest is not None and manifest["modules"].get(name) != data:
            raise CheckpointError(f"{name}: its description in config.json differs from {MANIFEST}; it was altered.")
        layers[name] = layer
    rotated = _checked_norms("rotated_norms", quantization, modules, headers, "1.weight", 2)
    shifted = _checked_norms("shifted_norms", quantization, modules, headers, "shift", 1)
    for name in rotated:
        insert_after_norm(model, name, Journal(model))
    for name in shifted:
        insert_shift(model, name, Journal(model))
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def finish_loading(model: nn.Module, quantization: dict[str, Any], directory: Path) -> None:
    """Freeze a loaded model, rebuild what is not stored, and give it back its report."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TwinLinear | LatticeLinear):
            module.rebuild()
    model.tqcompile_quantization = quantization
    model.tqcompile_report = _stored_report(quantization, directory)


def _stored_report(quantization: dict[str, Any], directory: Path) -> Report:
    """The report in a checkpoint's manifest. Raises CheckpointError when it is none."""
    manifest = _read_manifest(directory)
    if manifest is None:
        return Report(quantization["config"], notes=[f"loaded from a checkpoint without {MANIFEST}"])
    try:
        return Report.from_dict(manifest["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} holds no readable report ({error!r}); it was altered."
        ) from error


def verify_files(files: list[Path]) -> dict[str, dict]:
    """Check safetensors files for truncation, and against the manifest's checksums where there is one.

    Returns:
        tensor name -> {"dtype", "shape"}, over all files.
    Raises:
        CheckpointError: names the tensor (or file) at fault.
    """
    if not files:
        raise CheckpointError("the checkpoint holds no .safetensors file.")
    manifest = _read_manifest(files[0].parent)
    expected = None if manifest is None else manifest["tensors"]
    found: dict[str, dict] = {}
    for file in files:
        for name, entry in hash_tensors(file).items():
            if expected is not None and name not in expected:
                raise CheckpointError(f"{file.name}: tensor {name} is not in {MANIFEST}; the file was altered.")
            if expected is not None and entry != expected[name]:
                raise CheckpointError(f"{file.name}: tensor {name} differs from {MANIFEST}; the file was altered.")
            found[name] = entry
    for name in expected or {}:
        if name not in found:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint.")
    return found


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where there is none (``save_pretrained`` alone writes none)."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    for key in ("tensors", "modules"):
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path} lists no {key}; the checkpoint is damaged.")
    return manifest


def write_model(model: nn.Module, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``. state: of a transformers model, only these tensors."""
    if hasattr(model, "save_pretrained"):
        # Tensors by the names of the modules: some architectures have other names in files of older versions (ViT).
        part = {} if state is None else {"state_dict": state, "max_shard_size": 1 << 62}
        model.save_pretrained(directory, save_original_format=False, **part)
    else:
        from safetensors.torch import save_model

        save_model(model, str(directory / "model.safetensors"))
        settings = {"quantization_config": model.tqcompile_quantization}
        (directory / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _write_manifest(model: nn.Module, directory: Path) -> None:
    tensors: dict[str, dict] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= hash_tensors(file)
    manifest = {
        "format_version": FORMAT_VERSION,
        "tensors": tensors,
        "modules": model.tqcompile_quantization["modules"],
        "report": model.tqcompile_report.to_dict(),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json; it is not a tqcompile checkpoint.")
    settings = read_json(path)
    quantization = settings.get("quantization_config") if isinstance(settings, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{path} has quant_method {method!r}, not {QUANT_METHOD!r}; it was not written by tqcompile."
        )
    return settings


def _checked_spec(name: str, data: dict, linear: nn.Linear) -> LinearSpec:
    try:
        spec = LinearSpec(**data)
    except TypeError as error:
        raise CheckpointError(f"{name}: malformed layer description in config.json ({error}).") from error
    try:
        check_types(spec)
    except TypeError as error:
        raise CheckpointError(f"{name}: impossible layer description in config.json ({error}).") from error
    sizes = (spec.out_features, spec.in_features)
    if sizes != (linear.out_features, linear.in_features):
        raise CheckpointError(
            f"{name}: the checkpoint describes a layer of shape {sizes}, the model has "
            f"{(linear.out_features, linear.in_features)}; it is of another model."
        )
    whole = all(isinstance(v, int) and v >= 0 for v in (spec.rank, spec.group_size, spec.rotation_block))
    if (
        not whole
        or spec.group_size == 0
        or spec.in_features % spec.group_size
        or spec.rank > 128
        or spec.rank % 2
        or (spec.rotation_block and spec.in_features % spec.rotation_block)
        or not are_signs(spec.rotation_signs, spec.rotation_block)
        or spec.act_bits not in (4, 8, 16)
        or spec.low_rank_bits not in (4, 16)
        or spec.weight_bits not in (2, 3, 4, 8)
        or not lattice_fits(spec)
        or (spec.weight_bits == 8 and (spec.rank, spec.act_bits, spec.rotation_block, spec.scaled) != (0, 16, 0, False))
        or (spec.bias_dtype is not None and spec.bias_dtype not in _BIAS_DTYPES)
        or not isinstance(spec.act_ratio, (int, float))
        or not (0 < spec.act_ratio < 1 if spec.act_bits == 4 else spec.act_ratio == 0)
    ):
        raise CheckpointError(f"{name}: impossible layer description in config.json: {data}.")
    return spec


def _checked_norms(
    key: str, quantization: dict, modules: dict[str, nn.Module], headers: dict[str, dict], leaf: str, dims: int
) -> list[str]:
    """The names under ``key``: of norms of K channels, each with a tensor ``leaf`` of ``dims`` dimensions of K."""
    names = quantization.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{key} in config.json must be a list of module names, got {names!r}.")
    for name in names:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
            raise CheckpointError(f"{name}: no norm of that name; the checkpoint is of another model.")
        shape = [weight.shape[0]] * dims
        found = headers.get(f"{name}.{leaf}", {}).get("shape")
        if found != shape:
            raise CheckpointError(f"tensor {name}.{leaf} must be {shape}, the checkpoint holds {found}.")
    return names


def _check_entry(name: str, tensor: torch.Tensor, headers: dict[str, dict]) -> None:
    entry = headers.get(name)
    if entry is None:
        raise CheckpointError(f"tensor {name} is missing from the checkpoint.")
    expected = (_SAFETENSORS_NAME[tensor.dtype], list(tensor.shape))
    if (entry["dtype"], entry["shape"]) != expected:
        raise CheckpointError(
            f"tensor {name} is {entry['dtype']} {entry['shape']}, but its layer needs {expected[0]} {expected[1]}."
        )
