"""Asking the L2 cache for what a kernel will read, while it still waits for its predecessor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(pointers):
    """Ask for the line of 128 bytes that each pointer lies in. The interpreter, which knows no assembly, cannot."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
