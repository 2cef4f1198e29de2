"""One of a server's engines: what it is sent goes by a thread, and what comes of it is brought to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from tpctl.client.router import Mailbox, Share, Sink
from tpctl.errors import EngineError, TpctlError
from tpctl.serve.generation import Generation
from tpctl.serve.metrics import Metrics
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineInfo, EngineStats

_PARTING = 1.0  # seconds for an engine that is being closed to take in what was said to it before
_QUIET = 10.0  # seconds without a word after which an engine that has something to do is asked
STATS_SECONDS = 5.0
"""For which an engine's counters are waited for."""


class Engine(Protocol):
    """As much of ``EngineClient`` as is used here."""

    def wait_ready(self, told: Callable[[str], object] | None = None) -> EngineInfo: ...

    def mailbox(self, sink: Sink | None = None) -> Mailbox: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Lane:
    """One engine.

    Attributes:
        open: requests under way by id: whose, and which of its answers.
    """

    def __init__(self, engine: Engine, metrics: Metrics, failed: Callable[[TpctlError], object]) -> None:
        """On a running loop. ``failed``: is told there when the engine has ended."""
        self.engine = engine
        self.open: dict[str, tuple[Generation, int]] = {}
        self._loop = asyncio.get_running_loop()
        self._metrics, self._failed = metrics, failed
        self._sender = ThreadPoolExecutor(1, "tpctl-serve-sender")
        self._asker = ThreadPoolExecutor(1, "tpctl-serve-asker")
        self._question: asyncio.Future[EngineStats] | None = None  # for its counters, under way
        self._asked = self._heard = time.monotonic()
        self._came: deque[Share | TpctlError] = deque()
        self._called = False  # whether the loop is to look at it
        self._mailbox = engine.mailbox(self._sink)

    def submit(self, requests: Sequence[Request]) -> None:
        self._sender.submit(self._submit, requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._sender.submit(self._abort, ids)

    async def stats(self) -> EngineStats | None:
        """Its counters; ``None``: it has ended, or does not say them in time."""
        question = self._ask()
        done, _ = await asyncio.wait([question], timeout=STATS_SECONDS)
        return question.result() if done and question.exception() is None else None

    def silence(self) -> float:
        """Seconds since an engine that has been asked for something said anything; it is asked for its counters if it
        has said nothing for a while."""
        now = time.monotonic()
        if self.open and now - self._heard > _QUIET:
            self._ask()
        return 0.0 if self._question is None else now - max(self._asked, self._heard)

    def _ask(self) -> asyncio.Future[EngineStats]:
        """One question is under way at a time; whoever asks meanwhile shares its answer."""
        if self._question is None:
            self._asked = time.monotonic()
            self._question = self._loop.run_in_executor(self._asker, self.engine.stats)
            self._question.add_done_callback(self._told)
        return self._question

    def _told(self, question: asyncio.Future[EngineStats]) -> None:
        self._question, self._heard = None, time.monotonic()
        if not question.cancelled():
            question.exception()  # is looked at, whoever else does

    async def close(self) -> None:
        """Let the engine hear what is given up, if it listens, and tell it nothing more."""
        told = asyncio.wrap_future(self._sender.submit(lambda: None))
        await asyncio.wait([told], timeout=_PARTING)
        for executor in (self._sender, self._asker):
            executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, requests: Sequence[Request]) -> None:
        """Thread."""
        try:
            self._mailbox.submit(requests)
        except TpctlError as error:
            if isinstance(error, EngineError):  # it has ended, which is said before it is one request's fault
                self._sink(error)
            message = str(error)
            self._sink([(request.id, Output(request.id, [], "error", message)) for request in requests])
        except Exception as error:  # what a thread of an executor raises, nobody hears
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._broke, requests, error)

    def _broke(self, requests: Sequence[Request], error: Exception) -> None:
        for request in requests:
            if (known := self.open.get(request.id)) is not None:
                known[0].fail(error)

    def _abort(self, ids: Sequence[str]) -> None:
        """Thread."""
        with suppress(TpctlError):
            self._mailbox.abort(ids)

    def _sink(self, item: Share | TpctlError) -> None:
        """Any thread."""
        self._came.append(item)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        """All that has come: where the loop is behind, what several steps brought an answer is told together.

        What comes meanwhile has its own turn, else an engine that is fast enough would keep all from being told.
        """
        self._called = False  # before it is looked at what there is, so that nothing is left
        touched: dict[Generation, None] = {}
        stopped: list[str] = []
        for _ in range(len(self._came)):
            item = self._came.popleft()
            if isinstance(item, TpctlError):
                self._failed(item)
            else:
                self._heard = time.monotonic()
                self._push(item, touched, stopped)
        for generation in touched:
            generation.flush()
        if stopped:
            self.abort(stopped)

    def _push(self, share: Share, touched: dict[Generation, None], stopped: list[str]) -> None:
        """Have generations take in what came for them; add those to ``touched``, and to ``stopped`` the ids of requests
        that ended by what the engine does not know of."""
        now, observe = self._heard, self._metrics.arrived
        for id, output in share:  # hundreds a step, so no more than need be is done for each
            if (found := self.open.get(id)) is None:
                continue  # given up, and the engine did not know that yet
            generation, at = found
            touched[generation] = None
            try:
                if output.token_ids:
                    observe(generation, at, len(output.token_ids), now)
                ended = generation.push(at, output)
            except Exception as error:  # what comes behind this is others'
                generation.streams[at].finish_reason = "error"
                self._metrics.ended("error")
                generation.fail(error)
                continue
            if ended:
                reason = generation.streams[at].finish_reason
                if self.open.pop(id, None) is not None or reason is not None:  # else it was given up, and counted, so
                    self._metrics.ended(reason or "error")
                if output.finish_reason is None:  # a stop text, of which the engine does not know
                    stopped.append(id)
