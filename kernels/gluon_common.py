"""What the Gluon kernels share: names that Triton's releases have changed, loads at the edge of a tensor, and
programmatic dependent launch."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has the names that come second; 3.7 has `barrier`, 3.8 the others too, and 3.9 only these.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a program, or of one of its parts
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def load_live(at, live, MASKED: gl.constexpr):
    """Values at pointers; MASKED: only some of them exist, and the others read 0."""
    return gl.load(at, mask=live, other=0) if MASKED else gl.load(at)


@gluon.jit
def grid_wait(anything):
    """Wait until the kernels this one depends on have finished and their stores are visible. Returns int32 0."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def grid_release(anything):
    """Let the kernel that follows start as soon as there is room; it waits by itself for what this one stores."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1
    )
