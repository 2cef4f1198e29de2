"""Where each answer is in its grammar, and which tokens may come next. On rank 0 alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from concurrent.futures import TimeoutError as NotYet
from typing import TYPE_CHECKING

import numpy as np

from tpctl.engine.guiding import mask_threads
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.mask_threads import Finding, MaskThreads
from tpctl.engine.guiding.walk import ALL, Walk, Words
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.wire.messages import Message, Request

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FOUND, _REFUSED, _LATE = range(3)


class Guides:
    """The grammars of the requests under way, and threads that follow them."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars
        self._walks: dict[str, Walk] = {}
        self._threads = MaskThreads()
        self._late: dict[str, Finding] = {}  # of sequences that were left out

    def may_leave_out(self, tell: Callable[[Message], None]) -> None:
        """Let steps leave out sequences whose masks are late. ``tell``: hands a message to all ranks, by any thread."""
        self._threads.tell = tell

    def open(self, request: Request, matcher: LLMatcher) -> None:
        """A request is about to be computed. Any thread."""
        self._walks[request.id] = Walk(matcher, request.sampling.guide_after)

    def drop(self, id: str) -> None:
        """A request has ended; it may have had no grammar."""
        self._walks.pop(id, None)
        if (finding := self._late.pop(id, None)) is not None:
            self._threads.forget(finding)

    def refused(self, request: Request) -> str | None:
        """Why a request's grammar cannot be followed, as an earlier one with it has shown. Any thread."""
        guide = request.sampling.guide
        return None if guide is None else self._threads.refused(guide)

    def begin(self, items: SequenceType[ScheduledSequence], width: int) -> list[Finding]:
        """Start to find which tokens each item may be given, in ``width`` words with a bit for each token, the lowest
        first. What was late before is there."""
        findings = []
        for item in items:
            sequence = item.sequence
            finding = self._late.pop(sequence.id, None)
            if finding is None:
                assert sequence.params.guide is not None
                finding = Finding(self._walks[sequence.id], item, sequence.params.guide, width)
                self._threads.begin(finding, len(items))
            findings.append(finding)
        return findings

    def finish(self, findings: SequenceType[Finding]) -> Words:
        """What is there: of each item its words, and one more: 0; or 1, where its request must end, for the reason that
        its sequence then has; or 2, where it is left out."""
        patience = None if self._threads.tell is None else mask_threads.PATIENCE
        begun = time.monotonic()
        rows = np.full((len(findings), len(findings[0].words) + 1), ALL, dtype=np.uint32)
        for finding, row in zip(findings, rows, strict=True):
            try:
                left = None if patience is None else max(0.0, begun + patience - time.monotonic())
                finding.done.result(left)
            except NotYet:
                if self._threads.leave(finding):
                    self._late[finding.item.sequence.id] = finding
                    row[-1] = _LATE
                    continue
            problem = finding.done.result()
            if problem is None:
                row[:-1], row[-1] = finding.words, _FOUND
            else:
                finding.item.sequence.problem = problem
                row[-1] = _REFUSED
        return rows
