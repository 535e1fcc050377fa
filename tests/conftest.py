"""Shared test set-up: Triton's interpreter where there is no GPU, and the `gpu` marker."""

import logging
import os

import pytest
import torch

# pytest captures every log record; torch would then write its whole compilation trace into them.
logging.getLogger("torch.__trace").propagate = False
# Small models: one thread each is faster than threads that wait for each other.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read by @triton.jit when a kernel module is imported, so it must be set before any test runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
