"""Ranks as threads of one process: the real layers and engine with collectives over shared memory.

A rank's collectives behave as those of ``TPGroup`` do over gloo, but start in no time, so that many models and sizes
can be tested. One rank runs at a time, until it waits for the others: threads that want the interpreter at once cost
more than their work. What only processes can show is tested in ``tests/distributed``.
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


class LeftAloneError(RuntimeError):
    """A rank waits for one that has ended."""


class _Meeting:
    """Where ranks exchange values, in turns: each runs until it has given its own, then the next one does.

    Two exchanges in a row have places of their own: rank 0 gives its next value before the others have read.
    """

    def __init__(self, size: int) -> None:
        self.turns = [threading.Semaphore(int(rank == 0)) for rank in range(size)]
        self.places: list[list[Any]] = [[None] * size, [None] * size]
        self.sums: list[Tensor | None] = [None, None]
        self.given = [0] * size
        self.ended = [False] * size

    def begin(self, rank: int) -> None:
        self.turns[rank].acquire()

    def end(self, rank: int) -> None:
        self.ended[rank] = True
        self._let_next(rank)

    def _let_next(self, rank: int) -> None:
        """It is the turn of the rank behind that has not ended."""
        for other in [*range(rank + 1, len(self.turns)), *range(rank + 1)]:
            if not self.ended[other]:
                self.turns[other].release()
                return

    def exchange(self, rank: int, value: Any) -> int:
        """Which of ``places`` has the values of all ranks.

        Raises:
            LeftAloneError: if a rank ended without giving one.
        """
        number = self.given[rank]
        self.places[number % 2][rank] = value
        self.sums[number % 2] = None
        self.given[rank] += 1
        self._let_next(rank)
        self.turns[rank].acquire()
        if min(self.given) <= number:
            raise LeftAloneError(f"rank {rank} waits in vain for rank {self.given.index(min(self.given))}")
        return number % 2

    def sum(self, place: int) -> Tensor:
        """Of the tensors there, made once."""
        found = self.sums[place]
        if found is None:
            found = self.sums[place] = torch.stack(self.places[place]).sum(0)
        return found


class ThreadGroup(TPGroup):
    """One rank of a group of threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size, "cpu")
        self._meeting = meeting

    def _exchange(self, value: Any) -> list[Any]:
        return self._meeting.places[self._meeting.exchange(self.rank, value)]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self._meeting.sum(self._meeting.exchange(self.rank, x.clone())))

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x.clone())).max(0).values)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.clone()))

    def broadcast(self, x: Tensor) -> Tensor:
        return self._exchange(x.clone())[0]

    def minimum(self, value: int) -> int:
        return min(self._exchange(value))

    def broadcast_text(self, text: str) -> str:
        return self._exchange(text)[0]


def run_ranks(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    """``work(group)`` on every rank; the results in rank order, or the first rank's exception."""
    meeting = _Meeting(size)

    def guarded(rank: int) -> T:
        meeting.begin(rank)
        try:
            return work(ThreadGroup(rank, size, meeting))
        finally:
            meeting.end(rank)  # the others do not wait for this rank

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in errors:
        if not isinstance(error, LeftAloneError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
