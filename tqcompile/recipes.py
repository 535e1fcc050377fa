"""Quantized components that belong to a weight, for a compiler backend that sees only Parameters.

Entries live as long as their Parameter; nothing is written to the model. They are for the weight as it was:
after it is changed in place they are not found again. ``model.to(device)`` keeps them, they follow it on the
next look-up.
"""

import dataclasses
import logging

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tqcompile.config import Config
from tqcompile.errors import ConfigError
from tqcompile.methods.components import QuantizedLinear

log = logging.getLogger("tqcompile")

_attached = WeakTensorKeyDictionary()  # weight -> (version, components)
_data_free = WeakTensorKeyDictionary()  # weight -> {(settings, id of the bias) -> (versions, bias, components)}


def attach(param: torch.Tensor, quantized: QuantizedLinear) -> None:
    """Use ``quantized`` wherever the backend compiles a linear with this weight, whatever its options say.

    Raises:
        ConfigError: the components are for a weight of another shape.
    """
    spec = quantized.spec
    if tuple(param.shape) != (spec.out_features, spec.in_features):
        raise ConfigError(
            f"cannot attach components for a ({spec.out_features}, {spec.in_features}) weight to a parameter "
            f"of shape {tuple(param.shape)}; quantize that parameter"
        )
    _attached[param] = (_version(param), quantized)


def lookup(param: torch.Tensor) -> QuantizedLinear | None:
    """What was attached to ``param``, on its device; or None, with a warning if the weight changed since."""
    if param not in _attached:
        return None
    version, quantized = _attached[param]
    if version != _version(param):
        del _attached[param]
        log.warning(
            "the components attached to a weight of shape %s are dropped: the weight was changed in place "
            "after it was quantized; quantize it and attach again",
            tuple(param.shape),
        )
        return None
    quantized = _on(param.device, quantized)
    _attached[param] = (version, quantized)
    return quantized


def remember(param: torch.Tensor, bias: torch.Tensor | None, config: Config, quantized: QuantizedLinear) -> None:
    """Keep a data-free result, so that compiling the same linear again does not quantize it again."""
    results = dict(_data_free.get(param, {}))
    results[_key(bias, config)] = ((_version(param), _version(bias)), bias, quantized)
    _data_free[param] = results


def remembered(param: torch.Tensor, bias: torch.Tensor | None, config: Config) -> QuantizedLinear | None:
    """The data-free result for this linear as it is now, under these settings; or None."""
    versions, _, quantized = _data_free.get(param, {}).get(_key(bias, config), (None, None, None))
    if versions != (_version(param), _version(bias)):
        return None
    moved = _on(param.device, quantized)
    if moved is not quantized:
        remember(param, bias, config, moved)
    return moved


def _key(bias: torch.Tensor | None, config: Config) -> tuple:
    return config.replace(ignore=(), device=None), id(bias)


def _version(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _on(device: torch.device, quantized: QuantizedLinear) -> QuantizedLinear:
    if all(tensor.device == device for tensor in quantized.tensors.values()):
        return quantized
    return dataclasses.replace(quantized, tensors={k: v.to(device) for k, v in quantized.tensors.items()})
