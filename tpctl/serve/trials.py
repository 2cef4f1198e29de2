"""Grammars that nobody has tried yet: which of them is tried next.

One takes seconds at worst (``client/grammar_worker.py``), and whoever wants to can ask for any number of those. So each
client has a queue, clients take turns, and none has more than half of the processes at work: what one asks for holds up
its own grammars, and nobody's that are known.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor

from tpctl.client.grammar_process import MOST
from tpctl.client.guides import Tried, tried
from tpctl.errors import BusyError
from tpctl.wire.guide import Guide

WAIT = 30.0
"""Seconds that somebody waits for others' grammars."""


class _Trial:
    """A grammar, and how many wait for what is found out."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.wanted = 0
        self.begun = False
        self.found: asyncio.Future[Tried] = asyncio.get_running_loop().create_future()


class Trials:
    """All of them. To be used on the event loop alone."""

    def __init__(
        self, executor: Executor, *, at_once: int = MOST, wait: float = WAIT, work: Callable[[Guide], Tried] = tried
    ) -> None:
        """``executor``: has ``at_once`` threads, which do the ``work``."""
        self._executor = executor
        self._at_once, self._each = at_once, max(1, at_once // 2)
        self._wait = wait
        self._work = work
        self._open: dict[Guide, _Trial] = {}
        self._waiting: dict[str, deque[_Trial]] = {}  # by client, in the order of their turns; none is empty
        self._at_work: Counter[str] = Counter()

    async def tried(self, guide: Guide, client: str) -> Tried:
        """Why a grammar is not taken, as an error if it says so itself; ``None``: it is.

        Raises:
            BusyError: it waited too long for others.
        """
        trial = self._open.get(guide)
        if trial is None:
            trial = self._open[guide] = _Trial(guide)
        trial.wanted += 1
        try:
            if not trial.begun:
                self._waiting.setdefault(client, deque()).append(trial)
                self._begin()
            if not trial.begun:
                await asyncio.wait([trial.found], timeout=self._wait)
                if not trial.begun:
                    raise BusyError(f"grammars of others have been compiled for {self._wait:.0f} s; try again later")
            return await asyncio.shield(trial.found)
        finally:
            trial.wanted -= 1
            if not trial.wanted and not trial.begun:
                self._drop(trial)

    def _drop(self, trial: _Trial) -> None:
        """Nobody waits for it any more."""
        del self._open[trial.guide]
        for client, queue in list(self._waiting.items()):
            left = deque(one for one in queue if one is not trial)
            if left:
                self._waiting[client] = left
            else:
                del self._waiting[client]

    def _begin(self) -> None:
        """As many as may be."""
        while self._at_work.total() < self._at_once:
            client = next((one for one in self._waiting if self._at_work[one] < self._each), None)
            if client is None:
                return
            queue = self._waiting.pop(client)
            trial = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind all others
            if not trial.begun:  # else another client's turn came first
                self._start(trial, client)

    def _start(self, trial: _Trial, client: str) -> None:
        trial.begun = True
        self._at_work[client] += 1
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._work, trial.guide)
        running.add_done_callback(lambda done: self._ended(trial, client, done))

    def _ended(self, trial: _Trial, client: str, done: asyncio.Future[Tried]) -> None:
        self._at_work[client] -= 1
        if not self._at_work[client]:
            del self._at_work[client]
        del self._open[trial.guide]
        if done.cancelled():
            trial.found.set_result(BusyError("the server is ending"))
        elif (error := done.exception()) is None:
            trial.found.set_result(done.result())
        else:
            trial.found.set_exception(error)
            trial.found.exception()  # whether or not anybody still waits for it
        self._begin()
