"""What the command line and rank 0 say to each other: small frozen records, sent as JSON (``channel``).

    command line -> rank 0      Add, Abort, GetStats, Stop
    rank 0 -> command line      Progress, Ready, Outputs, Stats, Fatal
    rank 0 -> all ranks         Found

Add and Abort travel on from rank 0 to every other rank, tagged with the step at which all of them apply it.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tpctl.wire.report import EngineInfo, EngineStats, TokenLogprob
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring, TokenScore


@dataclass(frozen=True)
class Request:
    """One prompt to complete. ``id`` is unique among the requests of an engine's life.

    With ``scoring`` its own tokens are scored too; what it is then completed with is of no interest.
    """

    id: str
    token_ids: list[int]
    sampling: SamplingParams
    scoring: Scoring | None = None


@dataclass(frozen=True)
class Add:
    requests: list[Request]


@dataclass(frozen=True)
class Abort:
    ids: list[str]


@dataclass(frozen=True)
class Found:
    """Which tokens may come next is known for a request that was left out until then; or it has to end, for a
    ``problem``."""

    id: str
    problem: str | None = None


@dataclass(frozen=True)
class GetStats:
    pass


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Progress:
    """What takes its time before the engine is ready."""

    text: str


@dataclass(frozen=True)
class Ready:
    """The engine can take requests."""

    info: EngineInfo


class Output(NamedTuple):
    """New tokens of one request.

    ``finish_reason`` is ``None`` while the request goes on, then "stop", "length", "abort" or "error";
    ``message`` explains an error, or what else than ``max_tokens`` a "length" came from. ``logprobs`` has one entry a
    token, where they were asked for; ``num_cached_tokens`` comes with the first tokens; ``scores``, with the last
    output, one for each scored token of the prompt. ``prompt_logprobs``, where they were asked for, has one for each
    token of the prompt but the first: as many as an output has room for, in order, the last with the first output that
    has tokens.
    """

    id: str
    token_ids: list[int]
    finish_reason: str | None = None
    message: str | None = None
    logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
    scores: list[TokenScore] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


_PLAIN = Output("", [])[2:]
"""What nearly all outputs say beside their tokens, hundreds a step: it is left out of messages."""


@dataclass(frozen=True)
class Outputs:
    outputs: list[Output]


@dataclass(frozen=True)
class Stats:
    """The answer to ``GetStats``."""

    values: EngineStats


@dataclass(frozen=True)
class Fatal:
    """The engine cannot go on; the workers are about to exit."""

    message: str


Message = Add | Abort | Found | GetStats | Stop | Progress | Ready | Outputs | Stats | Fatal


def to_wire(message: Message) -> list[Any]:
    """A JSON-ready form: the record's name, then its fields."""
    if isinstance(message, Add):
        body: Any = [_add(request) for request in message.requests]
    elif isinstance(message, Outputs):
        body = [output[:2] if output[2:] == _PLAIN else output for output in message.outputs]
    else:
        body = asdict(message)
    return [type(message).__name__, body]


def from_wire(wire: list[Any]) -> Message:
    """The message that ``to_wire`` took apart.

    Raises:
        ValueError: not such a form.
    """
    name, body = wire
    read = _READERS.get(name)
    if read is None:
        raise ValueError(f"unknown message {name!r}")
    return read(body)


def _add(request: Request) -> list[Any]:
    scoring = None if request.scoring is None else asdict(request.scoring)
    return [request.id, _packed(request.token_ids), request.sampling.to_dict(), scoring]


def _read_add(body: Any) -> Add:
    return Add([_read_request(*fields) for fields in body])


def _read_request(id: str, packed: str, sampling: dict[str, Any], scoring: dict[str, Any] | None) -> Request:
    asked = None if scoring is None else Scoring(**scoring)
    return Request(id, _unpacked(packed), SamplingParams.from_dict(sampling), asked)


def _read_output(
    id: str,
    token_ids: list[int],
    finish_reason: str | None,
    message: str | None,
    logprobs: list[Any] | None,
    num_cached_tokens: int,
    scores: list[Any] | None,
    prompt_logprobs: list[Any] | None,
) -> Output:
    logprobs, prompt_logprobs = _read_logprobs(logprobs), _read_logprobs(prompt_logprobs)
    if scores is not None:
        scores = [TokenScore(*values) for values in scores]
    return Output(id, token_ids, finish_reason, message, logprobs, num_cached_tokens, scores, prompt_logprobs)


def _read_logprobs(found: list[Any] | None) -> list[TokenLogprob] | None:
    if found is None:
        return None
    return [TokenLogprob(value, [(other, chance) for other, chance in top]) for value, top in found]


def _packed(token_ids: list[int]) -> str:
    """Token ids as the base64 of little-endian int64, which takes each side less than half of the time of a list."""
    return b64encode(_little_endian(array("q", token_ids)).tobytes()).decode()


def _unpacked(packed: str) -> list[int]:
    return _little_endian(array("q", b64decode(packed, validate=True))).tolist()


def _little_endian(values: array[int]) -> array[int]:
    """To or from it, in place."""
    if sys.byteorder == "big":
        values.byteswap()
    return values


_READERS: dict[str, Callable[[Any], Message]] = {
    "Add": _read_add,
    "Outputs": lambda body: Outputs(
        [Output(*fields) if len(fields) == 2 else _read_output(*fields) for fields in body]
    ),
    "Abort": lambda body: Abort(**body),
    "Found": lambda body: Found(**body),
    "GetStats": lambda body: GetStats(),
    "Stop": lambda body: Stop(),
    "Progress": lambda body: Progress(**body),
    "Ready": lambda body: Ready(EngineInfo(**body["info"])),
    "Stats": lambda body: Stats(EngineStats(**body["values"])),
    "Fatal": lambda body: Fatal(**body),
}
