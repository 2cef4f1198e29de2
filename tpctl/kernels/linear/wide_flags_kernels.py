"""What programs of `wide_gemm_kernels` say to each other, and to the kernels before and after, in assembly."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpctl.kernels.common.thread_kernels import barrier

_THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""Of four warps."""


@gluon.jit
def wait_for_the_kernel_before():
    """Let the next kernel start, and wait for the one before."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def tell(flag_ptr):
    """Set a flag: what these four warps have stored can be read."""
    thread = gl.arange(0, 128, layout=_THREADS)
    barrier()
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.b32 p, $2, 0; @p fence.acq_rel.gpu; @p st.release.gpu.global.b32 [$1], 1;"
        " mov.b32 $0, 0; }",
        "=r,l,r",
        [flag_ptr + thread * 0, thread],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for(flag_ptr):
    """Wait until a flag is set, and take it back: one group of four warps waits for each."""
    thread = gl.arange(0, 128, layout=_THREADS)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.b32 v, [$1]; setp.eq.b32 p, v, 0; @p bra again;"
        " mov.b32 $0, v; }",
        "=r,l",
        [flag_ptr + thread * 0],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    barrier()
    gl.store(flag_ptr + thread, thread * 0, mask=thread == 0)
