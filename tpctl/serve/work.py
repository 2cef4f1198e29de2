"""Requests that are being answered: how many, and which of them an end cuts off."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

MOST_NAMED = 8
"""Answers that a line names."""


class Growing(Protocol):
    """An answer of an engine's.

    ``complete``: the engine has no more to say of it. ``described``: which one it is, and how far, in a few words.
    ``account``: its tokens, as a log has them.
    """

    @property
    def complete(self) -> bool: ...

    @property
    def described(self) -> str: ...

    @property
    def account(self) -> str: ...


def new_id() -> str:
    """What a request is called until there is an answer, which has an id of its own."""
    return f"req-{secrets.token_hex(12)}"


@dataclass(eq=False)
class Work:
    """A request to ``path`` whose body has been read.

    Attributes:
        id: what it is called until it has an answer.
        answer: what comes of it, once an engine is at it.
    """

    path: str
    id: str
    answer: Growing | None = None

    @property
    def complete(self) -> bool:
        """Whether only its reader is waited for."""
        return self.answer is not None and self.answer.complete

    def __str__(self) -> str:
        said = f"{self.id} before it was begun" if self.answer is None else self.answer.described
        return f"{self.path} {said}"


class Interruptible:
    """As a context manager: what the task that enters it does within it can be ended by others, with an error."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._reason: Exception | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    def __exit__(self, *exception: object) -> None:
        task, self._task = self._task, None
        if self._reason is not None and task is not None:
            task.uncancel()
            raise self._reason from None

    def interrupt(self, reason: Exception) -> None:
        """Have ``reason`` raised where it is waited; nothing once it was left, or of what it does itself."""
        if self._reason is None and self._task is not None and self._task is not asyncio.current_task():
            self._reason = reason
            self._task.cancel()


class UnderWay:
    """All of them. To be used on the event loop alone."""

    def __init__(self) -> None:
        self._open: dict[Work, None] = {}  # in the order in which they came
        self._one_less = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Work]:
        return iter(list(self._open))

    @contextmanager
    def at_work(self, path: str, id: str) -> Iterator[Work]:
        """While a body that was sent to ``path`` is being answered; ``id``: what the request is called."""
        work = Work(path, id)
        self._open[work] = None
        try:
            yield work
        finally:
            del self._open[work]
            self._one_less.set()

    async def finish(self) -> None:
        """Wait until there are none."""
        while self._open:
            self._one_less.clear()
            await self._one_less.wait()


def named(works: Collection[Work]) -> str:
    """Which they are, for a line of the log."""
    each = list(map(str, works))
    more = [f"and {len(each) - MOST_NAMED} more"] if len(each) > MOST_NAMED else []
    return ", ".join([*each[:MOST_NAMED], *more])
