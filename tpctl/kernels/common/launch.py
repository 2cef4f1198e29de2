"""What the launchers share: launch options and facts about the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

_PDL: dict[str, Any] = {"launch_pdl": True}
_PLAIN: dict[str, Any] = {}


def launch_options(pdl: bool) -> dict[str, Any]:
    """Launch keywords for a kernel that calls `gdc_wait` when its constexpr PDL is set."""
    return _PDL if pdl else _PLAIN


@functools.lru_cache(maxsize=32)
def is_hopper(device: torch.device) -> bool:
    """Whether a device is of the generation that choices between ways were measured on (compute capability 9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(maxsize=32)
def pipelines_pure_alone(device: torch.device) -> bool:
    """Whether Triton (3.7) puts only pure assembly into a pipelined loop with tensor core products of that generation
    (compute capability 10); of impure one it says that it does not know how to predicate it."""
    return capability(device)[0] == 10


@functools.lru_cache(maxsize=32)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; an H100's for the CPU (Triton's interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.lru_cache(maxsize=32)
def has_pdl(device: torch.device) -> bool:
    """Whether kernels can be launched programmatically dependent: from compute capability 9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=32)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's for the CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 232448
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@functools.lru_cache(maxsize=32)
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 for the CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least `value` (value >= 1)."""
    return 1 << (value - 1).bit_length()


EARLY_ROWS = 512
"""Largest batch whose kernels use programmatic dependent launch."""


def early_launch(rows: int, device: torch.device) -> bool:
    """Whether a step of so many rows launches its kernels early: their starts then hide behind the ends of those before
    them, and many rows leave nothing to hide."""
    return rows <= EARLY_ROWS and has_pdl(device)
