"""Requests of every kind, for soaks: all ways to sample, shared prefixes, some given up on their way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpctl.client.engine_client import EngineClient
from tpctl.errors import EngineError
from tpctl.wire.messages import Request
from tpctl.wire.report import EngineStats
from tpctl.wire.sampling import SamplingParams

_COMMON: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.1},
)
_RARE: tuple[dict[str, Any], ...] = (
    {"logprobs": 2},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2},
)


@dataclass(frozen=True)
class Part:
    """What is left when some of a soak's requests have ended and the engine is idle.

    Attributes:
        ended: requests so far by the reason they ended for.
    """

    ended: dict[str, int]
    stats: EngineStats


def mixed_requests(count: int, vocab_size: int, longest: int = 120, seed: int = 0) -> list[Request]:
    """``count`` requests of 1 to ``longest`` prompt tokens of their own and as many generated. Three of five begin with
    one of three prefixes of two thirds of ``longest``; one of twenty is sampled on the host."""
    rng = random.Random(seed)
    known = min(vocab_size, 10_000)
    prefixes = [[], [], *([rng.randrange(3, known) for _ in range(2 * longest // 3)] for _ in range(3))]
    return [
        Request(
            str(number),
            rng.choice(prefixes) + [rng.randrange(3, known) for _ in range(rng.randint(1, longest))],
            SamplingParams(
                max_tokens=rng.randint(1, longest),
                seed=number,
                ignore_eos=True,
                **rng.choice(_RARE if rng.random() < 0.05 else _COMMON),
            ),
        )
        for number in range(count)
    ]


def soak(client: EngineClient, requests: list[Request], together: int, seed: int = 0) -> Iterator[Part]:
    """Hand in ``together`` requests at a time, give up one now and then, and yield what the engine holds when they have
    ended. The engine checks its own books whenever it is idle, and ends if they are wrong.

    Raises:
        EngineError: a request failed, or a block is still held though no request is.
    """
    rng = random.Random(seed)
    ended: Counter[str] = Counter()
    for start in range(0, len(requests), together):
        left = {request.id for request in requests[start : start + together]}
        client.submit(requests[start : start + together])
        while left:
            for output in client.outputs(timeout=300):
                if output.finish_reason == "error":
                    raise EngineError(f"request {output.id} failed: {output.message}")
                if output.finish_reason is not None:
                    left.discard(output.id)
                    ended[output.finish_reason] += 1
            if left and rng.random() < 0.05:
                client.abort([rng.choice(sorted(left))])
        stats = client.stats()
        if stats.free_blocks != stats.num_blocks:
            raise EngineError(f"{stats.num_blocks - stats.free_blocks} of {stats.num_blocks} KV blocks were not freed")
        yield Part(dict(ended), stats)
