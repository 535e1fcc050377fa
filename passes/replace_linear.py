"""Model in, model out: named ``nn.Linear`` modules are replaced by ``TwinLinear``, which frees their weights.

Requires that every name is a linear of the model. The journal undoes everything when a later step raises.
"""

import torch
from torch import nn


class Journal:
    """Records how to restore a model, so that a failed ``compile`` leaves it as it was."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules: list[tuple[str, nn.Module]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._attributes: list[tuple[object, str, object]] = []
        self._training = {module: module.training for module in model.modules()}

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the submodule ``name``."""
        self._modules.append((name, self._model.get_submodule(name)))
        self._set(name, module)

    def remember(self, module: nn.Module) -> None:
        """Keep a copy of a small module's own parameters before they are changed in place."""
        for parameter in module.parameters(recurse=False):
            self._tensors.append((parameter, parameter.detach().clone()))

    def remember_attribute(self, owner: object, name: str) -> None:
        """Keep the value of an attribute before it is set to another."""
        self._attributes.append((owner, name, getattr(owner, name)))

    def restore(self) -> None:
        """Put everything back, newest first."""
        with torch.no_grad():
            for name, module in reversed(self._modules):
                self._set(name, module)
            for parameter, copy in reversed(self._tensors):
                parameter.copy_(copy)
        for owner, name, value in reversed(self._attributes):
            setattr(owner, name, value)
        for module, mode in self._training.items():
            module.training = mode

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)
