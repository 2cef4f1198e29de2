"""``tpctl bench serve``: a server measured from outside, at one rate of requests after the other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tpctl.bench.answers import Answer
from tpctl.bench.endpoint import Address, Endpoint
from tpctl.bench.latencies import Summary, rows, summarise
from tpctl.bench.load import arrivals, run_load, send
from tpctl.bench.prompts import as_body
from tpctl.errors import EndpointError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

Prompts = Callable[[int, int | None], list[dict[str, Any]]]
"""Of a seed and a number (``None``: as many as a measurement takes) the fields of requests."""


@dataclass(frozen=True)
class Settings:
    """How a server is asked.

    Attributes:
        model: as the server calls it; ``None``: its first one.
        endpoint: a key of ``PATHS``.
        defaults: fields of bodies that prompts may replace; ``fields``: those that replace the prompts'.
        rates: requests a second.
        most: requests under way at once.
        seconds: that an answer may take.
        limits: of goodput, in milliseconds by name.
    """

    address: Address
    api_key: str | None
    model: str | None
    endpoint: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = (math.inf,)
    burstiness: float = 1.0
    most: int | None = None
    warmup: int = 1
    seed: int = 0
    seconds: float = 600.0
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a server did at one rate: the summary, and each request's row."""

    model: str
    summary: Summary
    rows: Sequence[Mapping[str, Any]]


async def measure(
    settings: Settings,
    prompts: Prompts,
    running: Callable[[str], AbstractContextManager[object]],
    found: Callable[[Measured], None],
    warmed: Callable[[Sequence[Answer], float], object] = lambda answers, seconds: None,
) -> None:
    """Warm up, then measure each rate, with other prompts each time.

    Args:
        prompts: makes requests; is asked with another seed for each rate, and for the warm-up.
        running: around what takes its time, with what that is.
        found: is told of each rate as it is done; ``warmed``: of the warm-up's answers, and the seconds it took.

    Raises:
        EndpointError: the server cannot be asked at all, refuses a request of the warm-up, or answers none.
    """
    endpoint = Endpoint(settings.address, settings.api_key)
    path = PATHS[settings.endpoint]
    try:
        model = await endpoint.model(settings.model)

        def requests(seed: int, count: int | None) -> list[bytes]:
            return [endpoint.post(path, body) for body in _bodies(settings, model, prompts(seed, count))]

        with running("warming up"):
            before = endpoint.clock()
            asked = requests(settings.seed + len(settings.rates), settings.warmup)
            warm = [await _warm(endpoint, path, request, settings.seconds) for request in asked]
        warmed(warm, endpoint.clock() - before)
        for at, rate in enumerate(settings.rates):
            asked = requests(settings.seed + at, None)
            due = arrivals(len(asked), rate, settings.burstiness, settings.seed + at)
            what = "at once" if math.isinf(rate) else f"at {rate:g} a second"
            with running(f"{len(asked)} requests {what}"):
                load = await run_load(endpoint, asked, due, most=settings.most, seconds=settings.seconds)
            summary = summarise(load, rate, settings.limits)
            if not summary.completed:
                first = load.answers[0].error
                raise EndpointError(
                    f"{endpoint.address}{path}: all {summary.failed} requests failed; the first: {first}"
                )
            found(Measured(model, summary, rows(load)))
    finally:
        endpoint.close()


async def _warm(endpoint: Endpoint, path: str, request: bytes, seconds: float) -> Answer:
    answer = await send(endpoint, request, Answer(), seconds)
    if (error := answer.error) is not None:
        raise EndpointError(error if error.startswith("cannot connect") else f"{endpoint.address}{path}: {error}")
    return answer


def _bodies(settings: Settings, model: str, prompts: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    for fields in prompts:
        own = as_body(fields, chat=settings.endpoint == "chat")
        body = {**common, **settings.defaults, **own, **settings.fields}
        # ``null`` in --body leaves a field out, for servers that do not know it
        yield json.dumps({name: value for name, value in body.items() if value is not None}).encode()
