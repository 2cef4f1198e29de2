"""What a load came to, by the definitions of vLLM's benchmark (``vllm bench serve``), so that figures compare.

TTFT is from sending a request to its first token, E2E to its last one; TPOT is (E2E - TTFT) / (tokens - 1) of an
answer, ITL the time between two of its chunks, of all answers together. Percentiles interpolate, as numpy's do.
Throughputs are over the time until the last answer ended; goodput counts the answers that kept within all limits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpctl.bench.answers import Answer
from tpctl.bench.load import Load

LIMITS = ("ttft", "tpot", "e2e")
"""What goodput may ask of an answer."""

SLICES = 60
"""Of a load's duration, in each of which its throughput is told."""


@dataclass(frozen=True)
class Spread:
    """Times in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """``None`` where there are none."""
        if not seconds:
            return None
        ordered = sorted(1e3 * one for one in seconds)
        mean = math.fsum(ordered) / len(ordered)
        p50, p90, p99 = (percentile(ordered, share) for share in (50, 90, 99))
        return cls(mean, p50, p90, p99, ordered[-1])


@dataclass(frozen=True)
class Summary:
    """A load at one rate.

    Attributes:
        rate: requests a second that were to be sent; infinite: all at once.
        errors: how often a request failed for which reason.
        good: answers within the limits, where there are any.
        peak: requests that were under way at once, of those that were answered.
        chunks: with tokens; fewer than tokens where several come in one.
        uncounted: answers whose tokens are a number of chunks, since the server sent no usage.
        late: the most that a request was sent too late, in seconds; waiting for room counts.
        processor: seconds that the client itself computed.
        slices: tokens a second, and requests under way, in equal parts of the duration.
    """

    rate: float
    completed: int
    failed: int
    errors: Mapping[str, int]
    good: int | None
    duration: float
    prompt_tokens: int
    output_tokens: int
    peak: int
    chunks: int
    uncounted: int
    late: float
    processor: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    slices: Sequence[tuple[float, float]]

    @property
    def requests_per_second(self) -> float:
        return self.completed / self.duration

    @property
    def output_per_second(self) -> float:
        """Tokens of answers."""
        return self.output_tokens / self.duration

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers."""
        return (self.prompt_tokens + self.output_tokens) / self.duration

    @property
    def goodput(self) -> float | None:
        """Answers a second within the limits."""
        return None if self.good is None else self.good / self.duration

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["rate"] = "inf" if math.isinf(self.rate) else self.rate
        for name in ("requests_per_second", "output_per_second", "tokens_per_second", "goodput"):
            found[name] = getattr(self, name)
        return found


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` percent of ``ordered``, which ascends, lie: between two by proportion."""
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(load: Load, rate: float, limits: Mapping[str, float]) -> Summary:
    """What a load came to.

    Args:
        limits: milliseconds by the names of ``LIMITS``; none: there is no goodput.
    """
    answers = [one for one in load.answers if one.error is None]
    failed = Counter(one.error for one in load.answers if one.error is not None)
    return Summary(
        rate,
        len(answers),
        len(load.answers) - len(answers),
        dict(failed.most_common()),
        sum(_good(one, limits) for one in answers) if limits else None,
        load.duration,
        sum(one.prompt_tokens or 0 for one in answers),
        sum(one.tokens for one in answers),
        _peak(answers),
        sum(len(one.times) for one in answers),
        sum(one.output_tokens is None for one in answers),
        max((one.started - one.due for one in answers), default=0.0),
        load.processor,
        Spread.of([one.ttft for one in answers]),
        Spread.of([tpot for one in answers if (tpot := one.tpot) is not None]),
        Spread.of([gap for one in answers for gap in one.gaps]),
        Spread.of([one.e2e for one in answers]),
        _slices(answers, load),
    )


def _good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """An answer of one token has no time a token, which keeps within any limit."""
    found = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2e": answer.e2e}
    return all(1e3 * found[name] <= limit for name, limit in limits.items())


def _peak(answers: Sequence[Answer]) -> int:
    """One that ends as another begins is not beside it."""
    changes = sorted([(one.started, 1) for one in answers] + [(one.times[-1], -1) for one in answers])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _slices(answers: Sequence[Answer], load: Load) -> list[tuple[float, float]]:
    width = load.duration / SLICES
    if not width:
        return []
    tokens, held = [0.0] * SLICES, [0.0] * SLICES
    for one in answers:
        each = one.tokens / len(one.times)
        for time in one.times:
            tokens[min(int((time - load.started) / width), SLICES - 1)] += each
        first, last = ((time - load.started) / width for time in (one.started, one.times[-1]))
        for at in range(int(first), min(int(last) + 1, SLICES)):
            held[at] += min(last, at + 1) - max(first, at)
    return [(count / width, running) for count, running in zip(tokens, held, strict=True)]


def rows(load: Load) -> list[dict[str, Any]]:
    """Each request's own figures, in seconds, in the order of the requests."""
    found = []
    for one in load.answers:
        row: dict[str, Any] = {"due": one.due - load.started, "started": one.started - load.started}
        if one.error is not None:
            row["error"] = one.error
        else:
            row |= {"prompt_tokens": one.prompt_tokens, "output_tokens": one.tokens}
            row |= {"ttft": one.ttft, "tpot": one.tpot, "e2e": one.e2e, "chunks": len(one.times)}
        found.append(row)
    return found
