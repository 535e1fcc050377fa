"""tqcompile: make a Hugging Face model 4-bit, keep its quality, and ship it.

    model = tqcompile.compile(model, calib_data, scheme="twin-w4a8")

Everything heavy is imported on first use; ``import tqcompile`` loads no torch, triton, transformers or onnx.
"""

import importlib
from pathlib import Path

import wrapt

__version__ = "0.1.0"

# In a checkout that is not installed, the sub-packages passes/, kernels/ and exporters/ lie beside this package.
_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))

_PUBLIC = {
    "compile": "api",
    "attach_recipe": "api",
    "report": "reporting",
    "save": "checkpoint",
    "load": "checkpoint",
    "Config": "config",
    "SCHEMES": "config",
    "export_onnx": "exporters.onnx",
    "ort_session": "exporters.session",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tqcompile.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'tqcompile' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])


@wrapt.when_imported("transformers.quantizers.auto")
def _register_with_transformers(_module):
    """Lets ``AutoModel*.from_pretrained`` read our checkpoints once both packages are imported, in any order."""
    importlib.import_module("tqcompile.hf")
