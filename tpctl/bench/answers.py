"""A streamed answer of an OpenAI endpoint: when its tokens came, and how many they were."""

from __future__ import annotations

import json
from typing import Any

from tpctl.bench.endpoint import message_of, refusal
from tpctl.bench.http import Events, Response
from tpctl.errors import EndpointError


class Answer:
    """What came of one request.

    Attributes:
        due: when it was to be sent; all times are in seconds of one clock.
        started: when it was sent, the making of a connection included.
        times: when each chunk with a token came.
        prompt_tokens, output_tokens: as the server counts them (``usage``), or ``None``.
        error: why it failed.
    """

    def __init__(self, due: float = 0.0) -> None:
        self.due = due
        self.started = 0.0
        self.times: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.error: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer: as counted by the server, else its chunks."""
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float:
        """Time to first token: from sending the request to the first chunk with one."""
        return self.times[0] - self.started

    @property
    def e2e(self) -> float:
        """From sending the request to the last chunk with a token."""
        return self.times[-1] - self.started

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first one."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Between its chunks."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class AnswerReader:
    """Takes the body of a response as it comes, and fills an ``Answer``."""

    def __init__(self, answer: Answer) -> None:
        self.response = Response()
        self._answer = answer
        self._events = Events()
        self._ended = False
        self._refusal: list[bytes] = []

    def take(self, now: float, body: bytes) -> None:
        """Raises ``EndpointError`` where it is no stream of answers, or says that the answer has failed."""
        if self.response.status != 200:
            if sum(map(len, self._refusal)) < 1 << 16:
                self._refusal.append(body)
            return
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self._ended = True
            else:
                self._chunk(now, data)

    def end(self) -> None:
        """The response has ended. Raises ``EndpointError`` if the answer has not, or was refused."""
        response, answer = self.response, self._answer
        if response.status != 200:
            raise EndpointError(refusal(response, b"".join(self._refusal)))
        if not answer.times:
            kind = response.headers.get("content-type", "").partition(";")[0]
            what = "a stream without a token" if kind == "text/event-stream" else f"{kind or 'nothing'}, not a stream"
            raise EndpointError(f"answered with {what}")
        if not self._ended:
            raise EndpointError("ended the stream before the answer")

    def _chunk(self, now: float, data: bytes) -> None:
        try:
            chunk: Any = json.loads(data)
            choices = chunk.get("choices")
            if usage := chunk.get("usage"):
                self._answer.prompt_tokens = _count(usage.get("prompt_tokens"))
                self._answer.output_tokens = _count(usage.get("completion_tokens"))
            if choices:
                self._choice(now, choices[0])
            elif "error" in chunk or chunk.get("object") == "error":
                raise EndpointError(f"ended the stream with an error: {message_of(data)}")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise EndpointError(f"sent an event that is no chunk of an answer: {message_of(data)}") from None

    def _choice(self, now: float, choice: Any) -> None:
        """A chunk counts if it has text; one without, too, unless it only opens or closes the answer: its token has
        no text of its own. An answer of none but such is one token long."""
        delta = choice.get("delta")
        if choice.get("finish_reason"):
            self._ended = True
        if delta is None:
            counts = bool(choice.get("text")) or not self._ended
        else:
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            counts = bool(text or delta.get("tool_calls")) or not (self._ended or "role" in delta)
        if counts or (self._ended and not self._answer.times):
            self._answer.times.append(now)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
