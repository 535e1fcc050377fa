"""Model in, model out: named ``nn.Linear`` modules are replaced by ``TwinLinear``, which frees their weights.

Requires that every name is a linear of the model. The journal undoes everything when a later step raises.
"""

import torch
from torch import nn


class Journal:
    """Records how to restore a model, so that a failed ``compile`` leaves it as it was.

    undo: False records nothing, for a model that is thrown away when something fails: what is replaced is freed.
    """

    def __init__(self, model: nn.Module, undo: bool = True):
        self._undo = undo
        self._model = model
        self._modules: list[tuple[str, nn.Module]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._attributes: list[tuple[object, str, object]] = []
        self._training = {module: module.training for module in model.modules()} if undo else {}

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the submodule ``name``."""
        if self._undo:
            self._modules.append((name, self._model.get_submodule(name)))
        self._set(name, module)

    def remember(self, module: nn.Module) -> None:
        """Keep a copy of a small module's own parameters before they are changed in place."""
        if not self._undo:
            return
        for parameter in module.parameters(recurse=False):
            self._tensors.append((parameter, parameter.detach().clone()))

    def set_parameter(self, name: str, value: torch.Tensor) -> None:
        """Put a new Parameter with the data ``value`` in the place of ``name``, under all of its names.

        The old one is kept as it is, so nothing is copied: until the journal is dropped both are in memory.
        """
        old = self._model.get_parameter(name)
        new = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        for module in self._model.modules():
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter is old:
                    self.assign_parameter(module, leaf, new)

    def assign_parameter(self, module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
        """Replace one parameter of one module, which unties it from others."""
        if self._undo:
            self._parameters.append((module, leaf, getattr(module, leaf)))
        setattr(module, leaf, parameter)

    def remember_attribute(self, owner: object, name: str) -> None:
        """Keep the value of an attribute before it is set to another."""
        if self._undo:
            self._attributes.append((owner, name, getattr(owner, name)))

    def restore(self) -> None:
        """Put everything back, newest first."""
        with torch.no_grad():
            for name, module in reversed(self._modules):
                self._set(name, module)
            for module, leaf, parameter in reversed(self._parameters):
                setattr(module, leaf, parameter)
            for parameter, copy in reversed(self._tensors):
                parameter.copy_(copy)
        for owner, name, value in reversed(self._attributes):
            setattr(owner, name, value)
        for module, mode in self._training.items():
            module.training = mode

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)


def declare_untied(model: nn.Module, weight: str, journal: Journal) -> None:
    """Tell transformers that the head's parameter ``weight`` is no longer the embeddings', also for a checkpoint."""
    tied = getattr(model, "all_tied_weights_keys", None)  # what transformers leaves out of a checkpoint
    if isinstance(tied, dict) and weight in tied:
        journal.remember_attribute(model, "all_tied_weights_keys")
        model.all_tied_weights_keys = {key: value for key, value in tied.items() if key != weight}
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for settings in [config] if text is config else [config, text]:
        if getattr(settings, "tie_word_embeddings", False):
            journal.remember_attribute(settings, "tie_word_embeddings")
            settings.tie_word_embeddings = False
