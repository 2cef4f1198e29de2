"""The answers to one HTTP request while they are computed. All of it is on the event loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import NamedTuple

from tpctl.client.reasoning_stream import Segment
from tpctl.client.text_stream import TextStream
from tpctl.errors import TpctlError
from tpctl.serve.errors import ApiError
from tpctl.serve.memory import UNTOLD
from tpctl.wire.guide import BUSY, Guide, cannot_be_had
from tpctl.wire.messages import Output

_STEP = 1 << 16
"""Bytes by which what is held is told ahead, so that not every token is."""


class Gone(Exception):
    """Whoever asked hung up."""


class Piece(NamedTuple):
    """What an output of the engine added to an answer.

    ``at`` is which answer; ``first`` the place in it of the first of ``tokens`` tokens; ``finish_reason`` comes with
    the last.
    """

    at: int
    segments: list[Segment]
    first: int
    tokens: int
    finish_reason: str | None


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One for each answer; its texts of a kind that follow each other are one, too."""
    each: dict[int, list[Piece]] = {}
    for piece in pieces:
        each.setdefault(piece.at, []).append(piece)
    return [_one(run) for run in each.values()]


def _one(run: Sequence[Piece]) -> Piece:
    segments: list[Segment] = []
    for kind, some in groupby(chain.from_iterable(piece.segments for piece in run), _kind):
        same = list(some)
        segments += same if kind is None else [Segment("".join(segment.text for segment in same), kind)]
    return Piece(run[0].at, segments, run[0].first, sum(piece.tokens for piece in run), run[-1].finish_reason)


def _kind(segment: Segment) -> bool | None:
    """Whether it was thought; ``None``: it is of a call."""
    return segment.reasoning if segment.call is None else None


Taker = Callable[[list[Piece]], bool]
"""Takes what is new at once, or does not."""

Teller = Callable[[str], bool]
"""The same for new text of the only answer, of which nothing else is to be said."""


class Generation:
    """Texts as they grow, and a coroutine that waits for them.

    Attributes:
        streams: one for each answer.
        arrived: when each one's last token came; 0: none yet.
        num_tokens, reasoning_tokens: of all answers so far; ``cached_tokens``: of their prompts, each counted once.
            Added up as they come, since every chunk may tell them.
        interval: tokens of an answer that are told together, but for its first, which is told at once, and its last;
            0: nothing is told before the end.
    """

    def __init__(
        self,
        streams: Sequence[TextStream],
        cancelled: Callable[[], None],
        interval: int = 1,
        guide: Guide | None = None,
        answers: int = 1,
        hold: Callable[[int], None] | None = None,
        each: int = 0,
    ) -> None:
        """Begin.

        Args:
            cancelled: is called once, when what is still under way is not wanted any more.
            guide: the form that the answers are to have.
            answers: how many there are to a prompt.
            hold: is told how many bytes all answers take so far, ``each`` a token and more until that is told; raises
                ``ApiError`` if there is no room for them.
        """
        self.streams = streams
        self.num_tokens = self.reasoning_tokens = self.cached_tokens = 0
        self._answers = answers
        self._cached = [0] * (len(streams) // answers)  # tokens of each prompt
        self.arrived = [0.0] * len(streams)
        self.interval = interval
        self._cancelled, self._guide = cancelled, guide
        self._left = len(streams)
        self._pieces: list[Piece] = []
        # As of nearly all: texts of tokens behind those, each a token's, of one that need be no piece by itself.
        self._texts: list[str] = []
        self._bare = len(streams) == 1 and streams[0].bare
        self._untold = 0  # tokens of both
        self._telling = 0  # tokens that were given to whoever asked last, and may still be on their way out
        self._hold, self._each = hold, each
        self._held = 0
        self._pressing = False  # whether one of them begins or ends an answer
        self._taker: Taker | None = None
        self._teller: Teller | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way."""
        return not self._left or self._error is not None

    @property
    def given_up(self) -> bool:
        """Whether whoever asked did not want it any more."""
        return isinstance(self._error, Gone)

    def push(self, at: int, output: Output) -> bool:
        """Take in what came for an answer; whether that has ended."""
        stream = self.streams[at]
        if self._error is not None or stream.finish_reason is not None:
            return True
        before, thought, ids = len(stream.token_ids), stream.num_thought, output.token_ids
        try:
            if self._bare and before and len(ids) == 1 and output.finish_reason is None and output.logprobs is None:
                return self._add(stream.add(ids[0]))
            self._gather()
            segments = stream.push(output)
        except TpctlError as error:  # the tokenizer cannot decode it
            stream.finish_reason = "error"
            self.fail(ApiError(500, str(error)))
            return True
        if not ids and output.finish_reason is None:  # of the prompt
            return False
        new = len(stream.token_ids) - before
        self.num_tokens += new
        self.reasoning_tokens += stream.num_thought - thought
        if before == 0:
            self._count_cached(at, stream.num_cached_tokens)
        if self._hold is not None and not self._has_room():
            return True
        reason = stream.finish_reason
        if reason in ("error", "abort"):
            self.fail(_failure(output.message or "the request was given up", self._guide))
            return True
        if self.interval:
            self._untold += new
            self._pressing |= before == 0 or reason is not None
            self._pieces.append(Piece(at, segments, before, new, reason))
        if reason is not None:
            self._left -= 1
            if self.interval or not self._left:
                self._wake()
        elif self.interval and self._taker is None and self._due:
            self._wake()
        return reason is not None

    def _add(self, text: str) -> bool:
        """Take in the text of one token among others; whether there is no room for it."""
        self.num_tokens += 1
        if self.interval:
            self._texts.append(text)
            self._untold += 1
            if self._taker is None and self._due:
                self._wake()
        return self._hold is not None and not self._has_room()

    def _gather(self) -> None:
        """Make a piece of texts, before something else comes behind them, or for who takes pieces alone."""
        if self._texts:
            text, count = "".join(self._texts), len(self._texts)
            segments = [Segment(text)] if text else []
            self._pieces.append(Piece(0, segments, len(self.streams[0].token_ids) - count, count, None))
            self._texts = []

    def _has_room(self) -> bool:
        """Say how much there is, once that is more than was said, or much less; where it is too much, it ends."""
        size = self.num_tokens * self._each + (self._untold + self._telling) * UNTOLD
        if self._hold is not None and not self._held - 4 * _STEP <= size <= self._held:
            try:
                self._hold(size + _STEP)
            except ApiError as error:
                self.fail(error)
                return False
            self._held = size + _STEP
        return True

    def _count_cached(self, at: int, tokens: int) -> None:
        """With an answer's first token it is known what was spared of its prompt."""
        prompt = at // self._answers
        if tokens > (known := self._cached[prompt]):
            self._cached[prompt] = tokens
            self.cached_tokens += tokens - known

    @property
    def _due(self) -> bool:
        """Whether there is as much as is told together."""
        return self.interval == 1 or self._pressing or self.done or self._untold >= self.interval * self._left

    def _tell(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        self._telling, self._untold, self._pressing = self._telling + self._untold, 0, False
        return pieces if len(pieces) == 1 else joined(pieces)

    def flush(self) -> None:
        """All that the engine had for now has been pushed."""
        if self._taker is None or self.done or not self._due:
            return
        try:
            taken = self._told()
        except Exception as error:  # what comes behind this is others'
            self.fail(error)
            return
        if taken:
            self._pieces, self._texts, self._untold, self._pressing = [], [], 0, False
        else:
            self._wake()

    def _told(self) -> bool:
        """Whether what is new was taken at once."""
        if self._teller is not None and not self._pieces:
            text = "".join(self._texts)
            return not text or self._teller(text)
        self._gather()
        if len(self._pieces) > 1:
            self._pieces = joined(self._pieces)
        return self._taker is not None and (not self._pieces or self._taker(self._pieces))

    def fail(self, reason: Exception) -> None:
        """End all of it; who waits is told behind what there is."""
        if not self.done:
            self._error = reason
            self._cancelled()
            self._wake()

    def close(self) -> None:
        """Give up what is under way; may be called again."""
        self.fail(Gone())
        if self._error is not None:
            self._error.__traceback__ = None  # whose frames hold this: a circle, which only a collection would end

    async def next(self, taker: Taker | None = None, teller: Teller | None = None) -> list[Piece]:
        """Wait for what is new; nothing at the end.

        Args:
            taker: is given what is new meanwhile; what it does not take, and the last of each answer, is returned.
            teller: is given what is mere text in its place.

        Raises:
            ApiError: it cannot go on.
            Gone: it was closed.
        """
        self._telling = 0
        while True:
            self._gather()
            if self._pieces and self._due:
                return self._tell()
            if self._error is not None:
                raise self._error
            if not self._left:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            self._taker, self._teller = taker, teller
            try:
                await self._waiter
            finally:
                self._taker = self._teller = None

    async def finish(self) -> None:
        """Wait for the end. Raises as ``next``."""
        while await self.next():
            pass

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _failure(message: str, guide: Guide | None) -> ApiError:
    """What an engine failed at: a form that the model has no text for is the request's fault, and where others' forms
    take all its time nobody's."""
    if message == BUSY:
        return ApiError(503, message, code="busy", retry_after=1)
    if guide is not None and cannot_be_had(message, guide):
        return ApiError(400, message, param=guide.field)
    return ApiError(500, message)
