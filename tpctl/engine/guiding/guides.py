"""Where each answer is in its grammar, and which tokens may come next. On rank 0 alone."""

from __future__ import annotations

import queue
from collections.abc import Sequence as SequenceType
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tpctl.client.deep_threads import deep_thread, said
from tpctl.cores import affinity_cores
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.errors import RequestError
from tpctl.wire.messages import Request

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.uint32]
_ALL = 0xFFFFFFFF
_MOST_THREADS = 8


class Guides:
    """The grammars of the requests under way, and threads that follow them."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars
        self._walks: dict[str, _Walk] = {}
        self._work: queue.SimpleQueue[tuple[ScheduledSequence, Words, Future[None]]] = queue.SimpleQueue()
        self._threads = 0

    def open(self, request: Request, matcher: LLMatcher) -> None:
        """A request is about to be computed. Any thread."""
        self._walks[request.id] = _Walk(matcher, request.sampling.guide_after)

    def drop(self, id: str) -> None:
        """A request has ended; it may have had no grammar."""
        self._walks.pop(id, None)

    def begin(self, items: SequenceType[ScheduledSequence], words: Words) -> list[Future[None]]:
        """Start to find which tokens each item may be given.

        Args:
            words: [items, W + 1], to be filled: a bit for each token, the lowest first, then 0; or 1, where the request
                must end, for the reason that its sequence then has.
        """
        futures: list[Future[None]] = [Future() for _ in items]
        problem = self._start_threads(len(items))
        for item, row, future in zip(items, words, futures, strict=True):
            if problem is None:
                self._work.put((item, row, future))
            else:
                _refuse(item, row, problem)
                future.set_result(None)
        return futures

    def _start_threads(self, most: int) -> str | None:
        """As many as are of use; why there is none, if so."""
        try:
            while self._threads < min(most, _MOST_THREADS, max(1, affinity_cores() // 2)):
                deep_thread(self._run, f"tpctl-guide-{self._threads}")
                self._threads += 1
        except RequestError as error:
            return None if self._threads else str(error)
        return None

    def _run(self) -> None:
        """Thread."""
        while True:
            item, row, future = self._work.get()
            problem: str | None
            try:
                problem = self._walks[item.sequence.id].mask(item, row[:-1])
            except BaseException as error:  # a panic of the library is no Exception
                problem = said(f"{type(error).__name__}: {error}")
            row[-1] = 0
            if problem is not None:
                guide = item.sequence.params.guide
                _refuse(item, row, f"{guide.name if guide else 'grammar'}: {problem}")
            future.set_result(None)


def _refuse(item: ScheduledSequence, row: Words, problem: str) -> None:
    """A row for which no token can be chosen."""
    item.sequence.problem = problem
    row[:-1], row[-1] = _ALL, 1


class _Walk:
    """A grammar, and how far an answer has come in it. ``after``: the token that it begins behind."""

    def __init__(self, matcher: LLMatcher, after: int | None) -> None:
        self._matcher = matcher
        self._after = after
        self._taken = 0  # tokens of the answer

    def mask(self, item: ScheduledSequence, words: Words) -> str | None:
        """Set the bits of tokens that may come next, or say why none may."""
        sequence, matcher = item.sequence, self._matcher
        ends = [id for id in sequence.stop_token_ids if id < 32 * len(words)]
        self._follow(sequence)
        if self._after is not None:
            words[:] = _ALL
            _clear(words, ends)  # a thought is no answer
            return None
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            return _reason(matcher)
        if matcher.is_stopped():
            words[:] = 0
        if matcher.is_accepting():
            _set(words, ends)
        if item.num_generated < sequence.params.min_tokens:
            kept = words.copy()
            _clear(words, ends)
            if not words.any():  # the grammar has no more to give
                words[:] = kept
        return None if words.any() else "the grammar lets nothing follow, and the answer may not end"

    def _follow(self, sequence: Sequence) -> None:
        answer = sequence.token_ids[sequence.num_prompt_tokens + self._taken :]
        self._taken += len(answer)
        if self._after is not None:
            if self._after not in answer:
                return
            answer = answer[answer.index(self._after) + 1 :]
            self._after = None
        for token in answer:
            self._matcher.consume_token(token)


def _reason(matcher: LLMatcher) -> str:
    """What a matcher that cannot go on says, in words."""
    message = str(matcher.get_error()).partition("\n<")[0]
    if message.startswith("NoExtension"):
        return "the grammar has no text that could follow, and the answer may not end"
    return f"the grammar takes more than its limits allow: {said(message)}"


def _set(words: Words, ids: SequenceType[int]) -> None:
    for id in ids:
        words[id >> 5] |= np.uint32(1 << (id & 31))


def _clear(words: Words, ids: SequenceType[int]) -> None:
    for id in ids:
        words[id >> 5] &= np.uint32(_ALL ^ (1 << (id & 31)))
