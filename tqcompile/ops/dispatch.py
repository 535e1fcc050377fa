"""Finding the Triton kernel of an op, and the reason when there is none.

A kernel module ``tqcompile.kernels.<op>`` offers ``unsupported(*args) -> str | None`` and ``launch(*args)``;
one with several forms also ``describe(*args) -> str``, the form's name, and where there is something to know about it
``remark(*args) -> str | None``.
Triton is imported here and nowhere earlier, on the first CUDA call.
"""

import functools
import importlib
import logging

log = logging.getLogger("tqcompile")


@functools.cache
def _load(op: str):
    try:
        return importlib.import_module(f"tqcompile.kernels.{op}"), None
    except ImportError as error:
        return None, f"Triton is not importable ({error}); pip install 'tqcompile[gpu]'"


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    log.warning("tqcompile::%s runs as plain torch, not as a fused kernel: %s", op, reason)


def missing(op: str) -> str | None:
    """Why the kernel of ``op`` cannot be imported, or None if it can."""
    return _load(op)[1]


def reason_unsupported(op: str, *args) -> str | None:
    """Why the kernel of ``op`` cannot serve these arguments (shapes and dtypes only), or None if it can."""
    module, reason = _load(op)
    return reason if module is None else module.unsupported(*args)


def kernel_form(op: str, *args) -> str | None:
    """Which of its kernels an op uses for arguments that it supports, and what there is to know about it; None where it
    has one kernel, or no tokens."""
    module = _load(op)[0]
    if not hasattr(module, "describe") or not args[0].numel():
        return None
    remark = module.remark(*args) if hasattr(module, "remark") else None
    return module.describe(*args) + (f" ({remark})" if remark else "")


def kernel_or_reason(op: str, *args):
    """The launcher of the op's Triton kernel, or None after logging once why plain torch runs instead."""
    reason = reason_unsupported(op, *args)
    if reason is not None:
        _warn_once(op, reason)
        return None
    return _load(op)[0].launch
