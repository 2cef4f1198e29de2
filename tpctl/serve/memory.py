"""What all requests hold in memory together: one account of bytes, from a body's first to an answer's last.

    a body as it comes ─► decoded ─► prompts, here and in an engine ─► answers as they grow, until they have gone out

The more is held, the less is let in: long bodies until a quarter is full, other bodies and prompts until a half is, so
that a few long ones keep no others out, and answers that are under way have the other half to grow in.

Sizes are those of CPython 3.11 on 64 bits, measured, rounded up (``tests/unit/test_serve_memory.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Self

from tpctl.errors import format_bytes
from tpctl.serve.errors import ApiError
from tpctl.wire.sampling import SamplingParams

MAX_MEMORY = 2 << 30
"""Bytes, where nothing else is said."""

LEAST_MEMORY = 1 << 20
"""Bytes, in which some requests of usual length find room."""

SMALL = 1 << 16
"""Bytes up to which a body is none of the long ones: most are."""

_REQUEST, _ANSWER = 16 << 10, 8 << 10
"""Of a request and of each answer to it, whatever it says: its head, tasks, parameters, chunks under way."""

_PROMPT_TOKEN = 42
"""An id in a list. The engine has one for each answer."""

_BIAS = 160
"""A token of ``logit_bias``."""

_TOKEN, UNTOLD = 100, 260
"""A token of an answer: its id and text; and as long as it has not been told in a stream, its ``Piece``."""

_LOGPROB, _LIKELIEST = 250, 150
"""Its log-probability, and each of the likeliest tokens beside it."""

_ROW, _ROW_LIKELIEST = 650, 560
"""The same as a row of an answer that becomes JSON: dicts, lists of bytes, and their text."""


class Use(Enum):
    """What memory is asked for: the share of all up to which it is given, and its name."""

    LONG = 4, f"bodies of more than {SMALL >> 10} KiB"
    NEW = 2, "bodies and prompts"
    ANSWERS = 1, "answers"


class Memory:
    """The account.

    Attributes:
        held: bytes; no more than ``most``.
    """

    def __init__(self, most: int = MAX_MEMORY) -> None:
        self.most = most
        self.held = 0

    def limit(self, use: Use) -> int:
        """Bytes up to which it is given for that."""
        return int(self.most // use.value[0])

    def take(self, more: int, use: Use) -> None:
        """Raises ``ApiError`` if there is no room for so many more."""
        if more > 0 and self.held + more > (most := self.limit(use)):
            raise ApiError(
                429,
                f"requests hold {format_bytes(self.held)}, and {format_bytes(more)} more would be above the "
                f"{format_bytes(most)} that --max-memory leaves for {use.value[1]}; try again later",
                code="memory_full",
                retry_after=1,
            )
        self.held += more


class Holding:
    """What one request holds; as a context manager, until it is left."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._request = self._answers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._memory.held -= self._request + self._answers
        self._request = self._answers = 0

    def body(self, size: int, *, long: bool) -> None:
        """The body takes ``size`` bytes so far. Raises ``ApiError``."""
        use = Use.LONG if long else Use.NEW
        if (size := _REQUEST + size) > (most := self._memory.limit(use)):
            raise ApiError(
                413,
                f"the body takes more than {format_bytes(most)} in memory, which is as much as {use.value[1]} may of "
                f"the {format_bytes(self._memory.most)} of --max-memory; send less at a time",
                code="body_too_large",
            )
        self._become(size, use)

    def refused(self) -> None:
        """Nothing of the body is kept."""
        self._become(_REQUEST, Use.NEW)

    def prompts(self, size: int) -> None:
        """In the place of the body there are prompts, or what was made of it, of so many bytes. Raises ``ApiError``."""
        if (size := _REQUEST + size) > (most := self._memory.limit(Use.NEW)):
            raise ApiError(
                400,
                f"the request's prompts, for all of its answers, take {format_bytes(size)} in memory, but prompts may "
                f"take {format_bytes(most)} (--max-memory); ask for fewer answers or log-probabilities, or shorter",
            )
        self._become(size, Use.NEW)

    def fits(self, size: int, what: str) -> None:
        """Raises ``ApiError`` if answers of so many bytes could not be held, whatever else there is."""
        if size > self._memory.most:
            raise ApiError(
                400,
                f"answers of {what} take {format_bytes(size)} in memory, but all may take "
                f"{format_bytes(self._memory.most)} (--max-memory); ask for less",
            )

    def answers(self, size: int) -> None:
        """What there is of the answers takes so many bytes. Raises ``ApiError``."""
        if self._request + size > (most := self._memory.most):  # whatever others hold
            raise ApiError(
                400,
                f"the request and its answers have come to {format_bytes(self._request + size)} in memory, but all may "
                f"take {format_bytes(most)} (--max-memory); ask for fewer tokens, answers or log-probabilities",
            )
        self._memory.take(size - self._answers, Use.ANSWERS)
        self._answers = size

    def _become(self, size: int, use: Use) -> None:
        self._memory.take(size - self._request, use)
        self._request = size


def prompt_size(num_tokens: int, sampling: Sequence[SamplingParams]) -> int:
    """Bytes that a prompt takes, with what answers have in common; ``sampling``: one for each. An engine is sent
    that for each of them."""
    one, answers = sampling[0], len(sampling)
    told = 0 if one.prompt_logprobs is None else _ROW + _ROW_LIKELIEST * one.prompt_logprobs
    form = 0 if one.guide is None else 2 * len(one.guide.text)
    sent = num_tokens * _PROMPT_TOKEN + _BIAS * len(one.logit_bias) + form
    return sent * (1 + answers) + (num_tokens * told + _ANSWER) * answers


def token_size(sampling: SamplingParams, *, rows: bool) -> int:
    """Bytes that each token of an answer takes once it has been told. ``rows``: all are told together, or again."""
    if (count := sampling.logprobs) is None:
        return _TOKEN
    return _TOKEN + (_ROW + _ROW_LIKELIEST * count if rows else _LOGPROB + _LIKELIEST * count)
