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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tpctl.client.text_stream import TextStream
from tpctl.errors import TpctlError, again
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation
from tpctl.serve.lane import Engine, Lane
from tpctl.serve.metrics import Metrics
from tpctl.serve.work import Interruptible
from tpctl.wire.messages import Request
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.sampling import SamplingParams

STALLED_SECONDS = 300.0
"""For which an engine with something to do may say nothing. It is asked for its counters meanwhile, which it tells
between two steps: so a long prompt, which takes many, is no silence. What must fit in is one step, of a large model on
a CPU or with kernels that are compiled first."""

AFFINITY_TOKENS = 64
"""First tokens of a prompt by which an engine is its home, whose prefix cache may know it."""

AFFINITY_SLACK = 4
"""Requests more than the least that an engine may have and still be given what it is home to."""


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
        self._preparing: set[Interruptible] = set()
        self._given_up: ApiError | None = None
        self._reserved = 0
        self._numbers = itertools.count()
        self._lanes = [Lane(engine, metrics, self.fail) for engine in engines]

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
        self._check_engines()
        if self.closing is not None:
            raise again(self.closing)
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

    def _check_engines(self) -> None:
        """Raise ``ApiError`` if one has ended."""
        if self.failure is not None:
            raise ApiError(500, f"the engine has ended: {self.failure}", code="engine_ended")

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

    @contextmanager
    def preparing(self) -> Iterator[Interruptible]:
        """While the task that enters it makes a request ready, or an answer that needs no engine: ``give_up`` ends
        that, too.

        Raises:
            ApiError: it has been called, now or before.
        """
        if self._given_up is not None:
            raise again(self._given_up)
        with Interruptible() as one:
            self._preparing.add(one)
            try:
                yield one
            finally:
                self._preparing.remove(one)

    def begin(
        self, jobs: Sequence[Job], interval: int = 1, hold: Callable[[int], None] | None = None, each: int = 0
    ) -> Generation:
        """Hand in prompts; their answers are numbered through. ``interval``, ``hold``, ``each``: as of ``Generation``.

        Raises:
            ApiError: an engine has ended, or all that was under way is given up. Where only an end is in sight this
                goes on: its places were reserved before.
        """
        self._check_engines()
        if self._given_up is not None:
            raise again(self._given_up)
        streams = [stream for job in jobs for stream in job.streams]
        held: list[tuple[Lane, list[str]]] = []
        guide = next((sampling.guide for job in jobs for sampling in job.sampling), None)  # the same of all
        answers = len(jobs[0].streams)  # to each prompt as many
        generation = Generation(streams, lambda: self._release(held), interval, guide, answers, hold, each)
        places = itertools.count()
        try:
            for job in jobs:
                lane = self._choose(job.token_ids)
                requests = [Request(str(next(self._numbers)), job.token_ids, sampling) for sampling in job.sampling]
                held.append((lane, [request.id for request in requests]))
                for request in requests:
                    lane.open[request.id] = (generation, next(places))
                self.metrics.prompt_tokens += len(job.token_ids)
                lane.submit(requests)
        except BaseException:  # what was handed in before it is nobody's
            generation.close()
            raise
        return generation

    def fail(self, reason: TpctlError) -> None:
        """End everything: an engine has, and nobody asked it to."""
        if self.failure is None and not self._closed:
            self.failure = reason
            self.give_up(ApiError(500, f"the engine has ended: {reason}", code="engine_ended"))
            self._on_failure(reason)

    def give_up(self, reason: ApiError) -> None:
        """End what is under way, and all that comes."""
        self._given_up = reason
        for one in list(self._preparing):
            one.interrupt(again(reason))
        for generation in {one for lane in self._lanes for one, _ in lane.open.values()}:
            generation.fail(again(reason))

    @property
    def stalled(self) -> bool:
        """Whether an engine has said nothing for longer than a step may take."""
        return self.info is not None and max(lane.silence() for lane in self._lanes) > STALLED_SECONDS

    async def stats(self) -> dict[int, EngineStats]:
        """Each engine's counters by its number, as far as it is there and says them."""
        lanes = self._lanes if self.info is not None else ()
        found = await asyncio.gather(*(lane.stats() for lane in lanes))
        return {number: one for number, one in enumerate(found) if one is not None}

    async def close(self) -> None:
        """End the engines; whoever waits for one is told."""
        self._closed = True
        await asyncio.gather(*(lane.close() for lane in self._lanes))
        loop = asyncio.get_running_loop()
        closers = ThreadPoolExecutor(len(self._lanes), "tpctl-serve-closer")  # for others may wait for an engine
        await asyncio.gather(*(loop.run_in_executor(closers, lane.engine.close) for lane in self._lanes))
        closers.shutdown(wait=False)

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
            left = [(id, *found) for id in ids if (found := lane.open.pop(id, None)) is not None]
            if left:
                lane.abort([id for id, *_ in left])
            for _, generation, at in left:
                if generation.streams[at].finish_reason is None:
                    self.metrics.ended("abort" if generation.given_up else "error")
