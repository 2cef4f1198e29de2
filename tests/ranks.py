"""Ranks as threads of one process: the real layers and engine with collectives over shared memory.

A rank's collectives behave as those of ``TPGroup`` do over gloo, but start in no time, so that many models and sizes
can be tested. What only processes can show is tested in ``tests/distributed``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpctl.distributed import TPGroup

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self.places: list[Any] = [None] * size


class ThreadGroup(TPGroup):
    """One rank of a group of threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size, "cpu")
        self._meeting = meeting

    def _exchange(self, value: Any) -> list[Any]:
        self._meeting.places[self.rank] = value
        self._meeting.barrier.wait()
        values = list(self._meeting.places)
        self._meeting.barrier.wait()
        return values

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x.clone())).sum(0))

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x.clone())).max(0).values)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.clone()))

    def minimum(self, value: int) -> int:
        return min(self._exchange(value))

    def broadcast_text(self, text: str) -> str:
        return self._exchange(text)[0]


def run_ranks(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    """``work(group)`` on every rank at once; the results in rank order, or the first rank's exception."""
    meeting = _Meeting(size)

    def guarded(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()  # the others must not wait for this rank
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
