"""Kernels compiled before they are timed, by all processors, into Triton's cache on the disk."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from tpctl.kernels.common.ahead import KernelSpec, compile_for, compile_spec
from tpctl.kernels.common.launch import DeviceFacts


def compile_kernel(spec: KernelSpec) -> str:
    """Empty, or why not."""
    try:
        compile_spec(spec, launcher=False)
    except Exception as failed:  # what the assembler says of one is no reason to leave out the others
        return f"{spec.name}: {type(failed).__name__}: {str(failed).splitlines()[0]}"
    return ""


def compile_all(specs: list[KernelSpec], facts: DeviceFacts) -> list[str]:
    """Reasons why some are not compiled."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(specs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, context, initializer=compile_for, initargs=(facts,)) as pool:
        return [text for text in pool.map(compile_kernel, specs) if text]
