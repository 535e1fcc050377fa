"""Compiles every Gluon kernel for sm_90 on a machine without a GPU, by launches on tensors that say they are on one.

    python tests/compile_for_hopper.py        # without TRITON_INTERPRET; prints the name of each kernel that compiled

Triton compiles a launch with ``warmup`` and does not run it; what the launchers ask of torch.cuda is answered here.
"""

import contextlib
import pathlib
import sys
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

GPU = torch.device("cuda", 0)
H200 = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="NVIDIA H200")


class OnCpu(TorchFunctionMode):
    """Every tensor is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, torch.device | str) and str(value).startswith("cuda") else value

        return func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


def feign(compiled: list[str]) -> None:
    """Let Triton compile for an H200 without running, and torch say that there is one; names go to ``compiled``."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"], self
        compiled.append(self.fn.__name__)

    jit.JITFunction.run = compile_only
    torch.Tensor.is_cuda, torch.Tensor.device = property(lambda tensor: True), property(lambda tensor: GPU)
    torch.cuda.get_device_properties = lambda *_: H200
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: H200.name
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)


def launch_all() -> None:
    from tqcompile import tuner
    from tqcompile.kernels import lattice_linear, split_counters, twin_gemm

    split_counters._arenas[GPU] = (None, {})  # a launch makes its own: the arena would come from a thread of torch's
    cut = {"splits": 2, "ctas": 1}
    for tokens, config in (
        (1, {"kernel": "gemv", "rows": 2, "warps": 4, "unroll": 4}),
        (3, {"kernel": "skinny", "rw": 1, "ks": 4, "unroll": 2}),
        (9, {"kernel": "narrow", "bm": 16, **cut}),
        (40, {"kernel": "wgmma", "bm": 64, **cut}),
    ):
        problem = tuner.Problem(256, 1024, 32, 128, torch.int8)
        twin_gemm.launch(*tuner.twin_gemm_arguments(problem, tokens, 0, "cpu"), config=config)
    codes, scale = torch.empty(256, 1024 * 3 // 8, dtype=torch.uint8), torch.empty(256, 1024 // 128).bfloat16()
    zero = torch.empty(scale.shape, dtype=torch.uint8)
    for tokens, tile in (
        (1, lattice_linear.Gemv(2, 1, 8, 1, 3)),
        (3, lattice_linear.Skinny(1, 1, 8, 1)),
        (40, lattice_linear.Wgmma(64, 2, 1)),
    ):
        x = torch.empty(tokens, 1024, dtype=torch.bfloat16)
        lattice_linear.launch(x, codes, scale, zero, None, None, 3, tile=tile)


if __name__ == "__main__":
    names: list[str] = []
    feign(names)
    with OnCpu():
        launch_all()
    print(" ".join(sorted(set(names))))
