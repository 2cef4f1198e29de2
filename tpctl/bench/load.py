"""Requests sent at the times of a random process, and what came of them."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from tpctl.bench.answers import Answer, AnswerReader
from tpctl.bench.endpoint import Endpoint
from tpctl.errors import EndpointError


def arrivals(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When to send requests, in seconds from the beginning.

    The times between them are drawn from a gamma distribution of shape ``burstiness`` and mean 1 / ``rate``: 1 is a
    Poisson process, less comes in bursts, more is evener, infinity is even. They are scaled so that the last request
    comes at ``count`` / ``rate``, as vLLM's benchmark has it (vllm/benchmarks/serve.py, ``get_request``): draws that
    happen to be short or long would else change the throughput.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    total, found = 0.0, []
    for _ in range(count):
        total += 1.0 if math.isinf(burstiness) else rng.gammavariate(burstiness, 1.0 / burstiness)
        found.append(total)
    return [at / total * count / rate for at in found]


@dataclass(frozen=True)
class Load:
    """A load that has been through.

    Attributes:
        answers: in the order of the requests.
        started, duration: from the beginning until all had ended, in seconds.
        processor: seconds that this process itself computed meanwhile.
    """

    answers: Sequence[Answer]
    started: float
    duration: float
    processor: float


async def send(endpoint: Endpoint, request: bytes, answer: Answer, seconds: float | None) -> Answer:
    """Send a request of ``Endpoint.post``, and fill ``answer``; what goes wrong is its error."""
    reader = AnswerReader(answer)
    answer.started = endpoint.clock()
    try:
        async with asyncio.timeout(seconds):
            await endpoint.ask(request, reader.take, reader.response)
        reader.end()
    except TimeoutError:
        answer.error = f"no whole answer within {seconds:g} s"
    except EndpointError as error:
        answer.error = str(error).removeprefix(f"{endpoint.address} ")
    return answer


async def run_load(
    endpoint: Endpoint,
    requests: Sequence[bytes],
    due: Sequence[float],
    *,
    most: int | None = None,
    seconds: float | None = None,
) -> Load:
    """Send each request when it is due, and wait for all answers.

    Args:
        requests: as ``Endpoint.post`` makes them; ``due``: when, from now.
        most: requests under way at once; others wait, and count from when they are sent.
        seconds: that an answer may take.
    """
    room = asyncio.Semaphore(most) if most else None

    async def one(request: bytes, answer: Answer) -> Answer:
        async with _held(room):
            return await send(endpoint, request, answer, seconds)

    tasks: list[asyncio.Task[Answer]] = []
    with _little_garbage():
        processor, started = time.process_time(), endpoint.clock()
        try:
            for request, at in zip(requests, due, strict=True):
                if (left := started + at - endpoint.clock()) > 0:
                    await asyncio.sleep(left)
                tasks.append(asyncio.create_task(one(request, Answer(started + at))))
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        duration = endpoint.clock() - started
    return Load(answers, started, duration, time.process_time() - processor)


@asynccontextmanager
async def _held(room: asyncio.Semaphore | None) -> AsyncIterator[None]:
    if room is None:
        yield
        return
    async with room:
        yield


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Few collections, which would hold up what is measured: hardly anything here has cycles."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
