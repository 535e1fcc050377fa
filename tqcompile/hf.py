"""Registers the checkpoint format with transformers, so that ``AutoModel*.from_pretrained`` reads it.

Imported by ``tqcompile/__init__.py`` as soon as transformers' quantizer registry is imported.
"""

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "twinquant"


@register_quantization_config(QUANT_METHOD)
class TwinQuantConfig(QuantizationConfigMixin):
    """``quantization_config`` of a tqcompile checkpoint; fields as in ``tqcompile.checkpoint.quantization_config``."""

    def __init__(
        self,
        config: dict,
        modules: dict,
        format_version: int,
        tqcompile_version: str = "",
        rotated_norms: list[str] | None = None,
        shifted_norms: list[str] | None = None,
        **_ignored: Any,
    ):
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.tqcompile_version = tqcompile_version
        self.config = config
        self.modules = modules
        if rotated_norms:
            self.rotated_norms = rotated_norms
        if shifted_norms:
            self.shifted_norms = shifted_norms


@register_quantizer(QUANT_METHOD)
class TwinQuantizer(HfQuantizer):
    """Loads packed layers; quantizing is the business of ``tqcompile.compile``."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_kwargs):
        from tqcompile.checkpoint import replace_linears
        from tqcompile.checkpoint_files import check_directory, read_json

        source = Path(getattr(model.config, "_name_or_path", "") or checkpoint_files[0])
        if source.is_dir():
            check_directory(source, read_json(source / "config.json"))
        self._directory = Path(checkpoint_files[0]).parent
        replace_linears(model, self.quantization_config.to_dict(), [Path(file) for file in checkpoint_files])
        for name in self.quantization_config.modules:
            # An architecture may initialise weights of children by name (GPT-2: c_proj.weight); these are packed now.
            parent = model.get_submodule(name.rpartition(".")[0])
            own = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
            parent._is_hf_initialized = not own

    def _process_model_after_weight_loading(self, model, **_kwargs):
        from tqcompile.checkpoint import finish_loading

        finish_loading(model, self.quantization_config.to_dict(), self._directory)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
