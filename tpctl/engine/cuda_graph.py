"""CUDA graphs of whole decode steps, from the host's packed rows to the sampled token ids.

A graph's shapes are fixed, so a batch is padded to the next of a ladder of sizes. Each size is captured when it is
first needed, which costs the time of a few steps then and none at start-up; all graphs share one memory pool.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from tpctl.kernels.prepare import DecodeInputs

_RING = 4  # pinned copies of the packed rows: a copy must not be overwritten before it has been sent


def ladder(largest: int) -> list[int]:
    """The sizes that are captured: 1, 2, 4, 8, then steps of about an eighth, up to ``largest``."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        step = max(8, 1 << (sizes[-1].bit_length() - 3))
        sizes.append(sizes[-1] + step)
    return sorted({min(size, largest) for size in sizes})


class DecodeGraphs:
    """Captured decode steps of up to ``largest`` rows.

    Args:
        step: computes one decode step from its inputs into ``sampled``; must not synchronise with the host. The flag
            is that of ``run``.
        sampled: int64 [largest], the token ids of the last step, which the next one reads.
    """

    def __init__(
        self,
        largest: int,
        max_blocks: int,
        sampled: torch.Tensor,
        step: Callable[[DecodeInputs, bool], None],
    ) -> None:
        self.sizes = ladder(largest)
        self._device = sampled.device
        self._sampled = sampled
        self._max_blocks = max_blocks
        self._step = step
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, DecodeInputs]] = {}
        self._pool: Any = None
        self._staging = [torch.zeros(3 * self.sizes[-1], dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._sent = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def run(self, slots: list[int], positions: list[int], tokens: list[int], long: bool = False) -> None:
        """One decode step of these rows; the rows that pad it to a captured size write and sample nothing of use.

        long: the backend plans this step differently, so it has a graph of its own.
        """
        count = len(slots)
        size = self.sizes[bisect_left(self.sizes, count)]
        padding = [0] * (size - count)
        packed = [*slots, *[-1] * (size - count), *positions, *padding, *tokens, *padding]
        turn, self._turn = self._turn, (self._turn + 1) % _RING
        self._sent[turn].synchronize()
        staging = self._staging[turn][: 3 * size]
        staging.copy_(torch.tensor(packed, dtype=torch.int32))
        captured = self._graphs.get((size, long))
        if captured is None:
            captured = self._graphs[size, long] = self._capture(size, long)
        graph, inputs = captured
        inputs.packed.view(-1).copy_(staging, non_blocking=True)
        self._sent[turn].record()
        graph.replay()

    def _capture(self, size: int, long: bool) -> tuple[torch.cuda.CUDAGraph, DecodeInputs]:
        inputs = DecodeInputs.allocate(size, self._max_blocks, self._device)
        inputs.packed[0].fill_(-1)
        # Once outside the graph, on rows that are all padding: kernels are compiled and workspaces made.
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            last = self._sampled.clone()
            self._step(inputs, long)
            self._sampled.copy_(last)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(inputs, long)
        self._pool = graph.pool()
        return graph, inputs
