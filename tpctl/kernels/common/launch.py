"""What the launchers share: launch options and facts about the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

_PDL: dict[str, Any] = {"launch_pdl": True}
_PLAIN: dict[str, Any] = {}


def launch_options(pdl: bool) -> dict[str, Any]:
    """Launch keywords for a kernel that calls `gdc_wait` when its constexpr PDL is set."""
    return _PDL if pdl else _PLAIN


class DeviceFacts(NamedTuple):
    """A CUDA device, as far as kernels and choices between them depend on it.

    Attributes:
        capability: its compute capability. multiprocessors: streaming multiprocessors.
        shared_memory: bytes that a program may have of it.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        index = torch.cuda.current_device() if device.index is None else device.index
        properties: Any = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", None)
        if shared is None:  # which torch has not always said
            shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
        return cls((properties.major, properties.minor), properties.multi_processor_count, int(shared))


_INTERPRETER = DeviceFacts((9, 0), 4, 232448)
"""What the CPU is taken for in Triton's interpreter: an H100, of few multiprocessors; but without launches that depend
on it, nor what was chosen by measurement there (``is_hopper``, ``has_pdl``)."""

_stood_for: DeviceFacts | None = None


def stand_for(facts: DeviceFacts | None) -> None:
    """From now on the CPU answers as a device of these facts, in this whole process: for kernels that are compiled and
    not launched (``kernels.common.ahead``). ``None``: no longer."""
    global _stood_for
    _stood_for = facts
    _facts.cache_clear()


@functools.lru_cache(maxsize=32)
def _facts(device: torch.device) -> DeviceFacts | None:
    """Those of a CUDA device, or of what the CPU stands for; ``None``: the CPU is Triton's interpreter."""
    return DeviceFacts.of(device) if device.type == "cuda" else _stood_for


def is_hopper(device: torch.device) -> bool:
    """Whether a device is of the generation that choices between ways were measured on (compute capability 9)."""
    facts = _facts(device)
    return facts is not None and facts.capability[0] == 9


def interprets(device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return _facts(device) is None


def pipelines_pure_alone(device: torch.device) -> bool:
    """Whether Triton (3.7) puts only pure assembly into a pipelined loop with tensor core products of that generation
    (compute capability 10); of impure one it says that it does not know how to predicate it."""
    return capability(device)[0] == 10


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; an H100's in Triton's interpreter."""
    return (_facts(device) or _INTERPRETER).capability


def has_pdl(device: torch.device) -> bool:
    """Whether kernels can be launched programmatically dependent: from compute capability 9 on."""
    facts = _facts(device)
    return facts is not None and facts.capability[0] >= 9


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's in Triton's interpreter."""
    return (_facts(device) or _INTERPRETER).shared_memory


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 in Triton's interpreter."""
    return (_facts(device) or _INTERPRETER).multiprocessors


ANYWHERE = [
    "positions_ptr",
    "slots_ptr",
    "block_tables_ptr",
    "tables_ptr",
    "query_start_ptr",
    "seq_lens_ptr",
    "lens_ptr",
    "chunks_ptr",
    "sequences_ptr",
    "reads_ptr",
    "writes_ptr",
    "copies_ptr",
]
"""Arguments that point to a step's integers, at any of them, read one at a time: kernels with and without the alignment
that Triton finds by chance are alike, and are not to be compiled twice (``do_not_specialize_on_alignment``)."""


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least `value` (value >= 1)."""
    return 1 << (value - 1).bit_length()


EARLY_ROWS = 512
"""Largest batch whose kernels use programmatic dependent launch."""


def early_launch(rows: int, device: torch.device) -> bool:
    """Whether a step of so many rows launches its kernels early: their starts then hide behind the ends of those before
    them, and many rows leave nothing to hide."""
    return rows <= EARLY_ROWS and has_pdl(device)
