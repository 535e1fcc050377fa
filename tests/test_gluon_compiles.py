"""Every Gluon kernel compiles for sm_90 with the installed Triton. Gluon is experimental; releases rename things."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
TESTS = pathlib.Path(__file__).resolve().parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used: see tests/gpu")
def test_every_gluon_kernel_compiles_for_hopper(tmp_path):
    files = {file.stem: file.read_text(encoding="utf-8") for file in (TESTS.parent / "kernels").glob("*.py")}
    kernels = {name for name, text in files.items() if "@gluon.jit" in text and f"\ndef {name}(" in text}
    assert len(kernels) == 7
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(TESTS / "compile_for_hopper.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernels - set(done.stdout.split()) == set()
