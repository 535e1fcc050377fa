"""What the Gluon kernels share: loads at the edge of a tensor, and programmatic dependent launch."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
