"""The engines behind a server: which one takes a request, and what comes of it, brought to the event loop.

    event loop                        threads
    Pool.begin ── requests ────────►  a sender for each engine ──► Mailbox.submit
    Generation.push ◄── Lane.take ◄── the client's reader: one call of the loop for all outputs of a step
    Pool.release ── ids ───────────►  the sender ──► Mailbox.abort

The loop waits for no engine: what is sent goes by a thread, in its order.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

from tpctl.client.router import Mailbox, Sink
from tpctl.client.text_stream import TextStream
from tpctl.errors import EngineError, TpctlError
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation
from tpctl.serve.metrics import Metrics
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.sampling import SamplingParams

_PARTING = 1.0  # seconds for an engine that is being closed to take in what was said to it before
AFFINITY_TOKENS = 64
"""First tokens of a prompt by which an engine is its home, whose prefix cache may know it."""

AFFINITY_SLACK = 4
"""Requests more than the least that an engine may have and still be given what it is home to."""


class Engine(Protocol):
    """As much of ``EngineClient`` as is used here."""

    def wait_ready(self, told: Callable[[str], object] | None = None) -> EngineInfo: ...

    def mailbox(self, sink: Sink | None = None) -> Mailbox: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Job:
    """A prompt and the texts of the answers to it, one for each of ``sampling``."""

    def __init__(self, token_ids: list[int], sampling: Sequence[SamplingParams], streams: Sequence[TextStream]) -> None:
        self.token_ids = token_ids
        self.sampling = sampling
        self.streams = streams


class Pool:
    """Engines of one model; to be used on the event loop alone.

    Attributes:
        info: what the first of them said of itself; ``None``: not all are ready.
        failure: why one of them ended; nothing goes on then.
        closing: what new requests are told, once there is an end in sight.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        metrics: Metrics,
        *,
        most: int,
        on_failure: Callable[[TpctlError], object] = lambda reason: None,
    ) -> None:
        """Take the engines, on a running loop.

        Args:
            most: requests to the engines that may be under way or wait.
            on_failure: is called once when an engine ends.
        """
        self.info: EngineInfo | None = None
        self.failure: TpctlError | None = None
        self.closing: ApiError | None = None
        self.metrics = metrics
        self.most = most
        self._on_failure = on_failure
        self._closed = False
        self._reserved = 0
        self._numbers = itertools.count()
        loop = asyncio.get_running_loop()
        self._lanes = [Lane(engine, loop, self) for engine in engines]

    @property
    def ready(self) -> bool:
        return self.info is not None and self.failure is None and self.closing is None

    @property
    def under_way(self) -> int:
        """Requests that an engine has."""
        return sum(len(lane.open) for lane in self._lanes)

    async def wait_ready(self, told: Callable[[str], object] | None = None) -> EngineInfo:
        """Wait until every engine takes requests.

        Args:
            told: called with what takes an engine its time, by another thread.

        Raises:
            TpctlError: one failed.
        """
        waiting = (asyncio.to_thread(lane.engine.wait_ready, told) for lane in self._lanes)
        try:
            info, *_ = await asyncio.gather(*waiting)
        except TpctlError as error:
            self.fail(error)
            raise
        self.info = info
        return info

    def check_open(self, more: int = 1) -> EngineInfo:
        """What the engines said of themselves, if they take so many more requests.

        Raises:
            ApiError: they do not.
        """
        if self.failure is not None:
            raise ApiError(500, f"the engine has ended: {self.failure}", code="engine_ended")
        if self.closing is not None:
            raise self.closing
        if self.info is None:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=1)
        if more > self.most:
            raise ApiError(
                400,
                f"the request asks for {more} answers at once, and this server takes {self.most}, with those that "
                "wait; ask for fewer, or start it with more --max-waiting",
            )
        if (now := self.under_way + self._reserved) + more > self.most:
            raise ApiError(
                429,
                f"{now} requests are under way or wait, and {more} more would be above the {self.most} that this "
                "server takes; try again later",
                code="queue_full",
                retry_after=1,
            )
        return self.info

    @contextmanager
    def reserve(self, count: int) -> Iterator[EngineInfo]:
        """Places for so many requests while they are made ready, up to ``begin``; what the engines said of themselves.

        Raises:
            ApiError: there are no more.
        """
        info = self.check_open(count)
        self._reserved += count
        try:
            yield info
        finally:
            self._reserved -= count

    def begin(self, jobs: Sequence[Job], interval: int = 1) -> Generation:
        """Hand in prompts; their answers are numbered through. ``interval``: as ``Generation`` has it.

        Raises:
            ApiError: as ``check_open``; not for what has its places reserved.
        """
        self.check_open(0)
        streams = [stream for job in jobs for stream in job.streams]
        held: list[tuple[Lane, list[str]]] = []
        generation = Generation(streams, lambda: self._release(held), interval)
        places = itertools.count()
        for job in jobs:
            lane = self._choose(job.token_ids)
            requests = []
            for sampling in job.sampling:
                request = Request(str(next(self._numbers)), job.token_ids, sampling)
                lane.open[request.id] = (generation, next(places))
                requests.append(request)
            held.append((lane, [request.id for request in requests]))
            self.metrics.prompt_tokens += len(job.token_ids)
            lane.submit(requests)
        return generation

    def fail(self, reason: TpctlError) -> None:
        """End everything: an engine has, and nobody asked it to."""
        if self.failure is None and not self._closed:
            self.failure = reason
            self.give_up(ApiError(500, f"the engine has ended: {reason}", code="engine_ended"))
            self._on_failure(reason)

    def give_up(self, reason: ApiError) -> None:
        """End what is under way."""
        for generation in {one for lane in self._lanes for one, _ in lane.open.values()}:
            generation.fail(reason)

    async def stats(self) -> list[EngineStats]:
        """Each engine's counters, as far as it is there."""
        found = []
        for lane in self._lanes if self.info is not None else ():
            with suppress(TpctlError):
                found.append(await asyncio.to_thread(lane.engine.stats))
        return found

    async def close(self) -> None:
        """End the engines; whoever waits for one is told."""
        self._closed = True
        await asyncio.gather(*(lane.close() for lane in self._lanes))
        await asyncio.gather(*(asyncio.to_thread(lane.engine.close) for lane in self._lanes))

    def _choose(self, token_ids: Sequence[int]) -> Lane:
        """The engine with least to do, or one with little more that may know the prompt's beginning."""
        if len(self._lanes) == 1:
            return self._lanes[0]
        least = min(self._lanes, key=lambda lane: len(lane.open))
        home = self._lanes[hash(tuple(token_ids[:AFFINITY_TOKENS])) % len(self._lanes)]
        return home if len(home.open) <= len(least.open) + AFFINITY_SLACK else least

    def _release(self, held: Sequence[tuple[Lane, list[str]]]) -> None:
        """Abort what is under way of requests."""
        for lane, ids in held:
            if left := [id for id in ids if lane.open.pop(id, None) is not None]:
                lane.abort(left)


class Lane:
    """One engine.

    Attributes:
        open: requests under way by id: whose, and which of its answers.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
        self.engine = engine
        self.open: dict[str, tuple[Generation, int]] = {}
        self._loop = loop
        self._pool = pool
        self._sender = ThreadPoolExecutor(1, "tpctl-serve-sender")
        self._mailbox = engine.mailbox(self._sink)

    def submit(self, requests: Sequence[Request]) -> None:
        self._sender.submit(self._submit, requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._sender.submit(self._abort, ids)

    async def close(self) -> None:
        """Let the engine hear what is given up, if it listens, and tell it nothing more."""
        told = asyncio.wrap_future(self._sender.submit(lambda: None))
        await asyncio.wait([told], timeout=_PARTING)
        self._sender.shutdown(wait=False, cancel_futures=True)

    def _submit(self, requests: Sequence[Request]) -> None:
        """Thread."""
        try:
            self._mailbox.submit(requests)
        except TpctlError as error:
            if isinstance(error, EngineError):  # it has ended, which is said before it is one request's fault
                self._sink(error)
            message = str(error)
            self._sink([Output(request.id, [], "error", message) for request in requests])

    def _abort(self, ids: Sequence[str]) -> None:
        """Thread."""
        with suppress(TpctlError):
            self._mailbox.abort(ids)

    def _sink(self, item: list[Output] | TpctlError) -> None:
        """Any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._take, item)

    def _take(self, item: list[Output] | TpctlError) -> None:
        if isinstance(item, TpctlError):
            self._pool.fail(item)
            return
        now = time.monotonic()
        stopped: list[str] = []
        touched: dict[Generation, None] = {}
        observe = self._pool.metrics.arrived
        for output in item:  # hundreds a step, so no more than need be is done for each
            id = output.id
            if (found := self.open.get(id)) is None:
                continue  # given up, and the engine did not know that yet
            generation, at = found
            touched[generation] = None
            try:
                if output.token_ids:
                    observe(generation, at, len(output.token_ids), now)
                ended = generation.push(at, output)
            except Exception as error:  # what comes behind this is others'
                generation.fail(error)
                continue
            if ended:
                self.open.pop(id, None)
                if output.finish_reason is None:  # a stop text, of which the engine does not know
                    stopped.append(id)
        for generation in touched:
            generation.flush()
        if stopped:
            self.abort(stopped)
