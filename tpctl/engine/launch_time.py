"""When to start the next step: while the device computes, but no sooner than it must be.

A step is scheduled and launched while the one before it runs, so that the device never waits for the host. A request
that comes just behind a launch waits for the rest of the step that runs, for all of the step that was launched, and
only then for its own. So where requests may come at any time (``EngineConfig.late_launch``) rank 0 waits for one, and
launches shortly before the step that runs is expected to end: what comes until then is in the very next step.

    device   | step N                         | step N + 1 ...
    host     | tokens of N - 1 | waits    |schedule, launch|
                                          ^ due: N's beginning + what it takes at least - margin

What a step takes is known from steps of its size a moment ago, as the host saw them end: the least of the last few,
since too early costs a late request some time, and too late costs every answer some. The margin is what the host's own
work took from when it was due, at the 90th percentile of the last steps, and some slack.

Every ``_PROBE``-th step is launched at once. These alone say what a step takes; what others take, which may have waited
for a launch, only lowers it. The slack doubles when a step was launched hardly before the one before it ended, or not
even that; and when steps that were held take longer than those launched at once, as they do where another rank, which
hears of a launch later than rank 0, comes too late. It goes back slowly.

A wrong guess costs the device a pause and no result: all that depends on it is when rank 0 goes on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import fmean

from tpctl.engine.runners.runner import Launched
from tpctl.engine.scheduling.scheduled import ScheduledBatch

_KNOWN = 3  # steps launched at once that say what their like take
_PROBE = 32  # of so many steps one is launched at once; what steps took so long ago says nothing any more
_LEAST = 1e-3  # seconds from a step's beginning to a launch that are worth it
_NEAR = 0.1e-3  # a step that is waited for no longer than this had maybe ended before
_SLACK = 0.2e-3  # seconds that the margin has beside the host's work, at least
_MOST_SLACK = 4e-3
_RETURN = 0.998  # of the slack beyond the least is left after each step
_WORK = 32  # steps whose work on the host is remembered
_SHARE = 0.9  # of them the margin covers
_SLOWER = 1.005  # of what steps launched at once take, and others are too late
_MOST_TOKENS = 512  # of a step that takes as long as the last one of its size did


@dataclass
class _Like:
    """What steps of a size took: the last that were launched at once, and others."""

    at_once: deque[float] = field(default_factory=lambda: deque(maxlen=_KNOWN))
    held: list[float] = field(default_factory=list)  # since the last one that was launched at once
    seen: int = 0  # the number of the last step

    def expected(self) -> float | None:
        """Seconds that the next one takes at least; ``None``: it should be found out."""
        if len(self.at_once) < _KNOWN or len(self.held) >= _PROBE - 1:
            return None
        return min(*self.held, *self.at_once)

    def learn(self, took: float, held: bool) -> bool:
        """Take in what a step took; whether it has turned out that those which were held take longer than others."""
        if held:
            self.held.append(took)
            return False
        self.at_once.append(took)
        slower = bool(self.held) and fmean(self.held) > _SLOWER * max(self.at_once)
        self.held.clear()
        return slower


class LaunchTime:
    """Rank 0's.

    Attributes:
        held_steps: that were launched when they were due; ``late_steps`` of them hardly before the one before ended.
    """

    def __init__(self, allowance: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        """``allowance``: seconds by which other ranks start later than this one."""
        self.held_steps = 0
        self.late_steps = 0
        self._clock = clock
        self._least_slack = self._slack = _SLACK + allowance
        self._work: deque[float] = deque(maxlen=_WORK)
        self._known: dict[Hashable, _Like] = {}
        self._running: Launched | None = None
        self._begun = 0.0  # when the device began it
        self._held = False  # whether it was launched when it was due
        self._asked = 0.0  # when it was last asked how long to wait,
        self._due: float | None = None  # and what was said
        self._steps = 0

    def left(self, running: Launched | None, before: Launched | None) -> float:
        """Seconds until the next step is due; 0: it is to be launched at once. To be asked before each step.

        running: what the device computes. before: what it has computed before, whose end was waited for.
        """
        if running is None or before is None or before is not self._running:
            self._known.clear()  # the device may have rested, and what is asked of it be something else
            self._begun, self._held = 0.0 if running is None else running.launched_at, False
        else:
            self._follow(running, before)
        self._running, self._due, self._asked = running, None, self._clock()
        expected = None if running is None else self._expected(kind(running.batch))
        if expected is None or not self._work:
            return 0.0
        after = expected - self._margin()
        if after < _LEAST or self._begun + after <= self._asked:
            return 0.0
        self._due = self._begun + after
        return self._due - self._asked

    def _follow(self, running: Launched, before: Launched) -> None:
        """Learn from a step that has ended, behind which another one was launched."""
        self._steps += 1
        held = self._due is not None and running.launched_at >= self._due
        if self._due is None or held:  # else a request came, and nobody knows when
            self._work.append(running.launched_at - (self._asked if self._due is None else self._due))
        late = before.ended_at - running.launched_at < _NEAR
        self.held_steps += held
        self.late_steps += held and late
        wrong = held and late
        size = kind(before.batch)
        if late:
            self._known.pop(size, None)
        elif size is not None:
            like = self._known.setdefault(size, _Like())
            if self._steps - like.seen > _PROBE:
                like = self._known[size] = _Like()
            like.seen = self._steps
            wrong |= like.learn(before.ended_at - self._begun, self._held)
        self._slack = self._least_slack + (self._slack - self._least_slack) * _RETURN
        if wrong:
            self._slack = min(2 * self._slack, _MOST_SLACK)
        self._begun, self._held = running.launched_at if late else before.ended_at, held

    def _expected(self, size: Hashable) -> float | None:
        like = self._known.get(size)
        return None if like is None or self._steps - like.seen > _PROBE else like.expected()

    def _margin(self) -> float:
        """Seconds before a step's end at which the next one is due."""
        work = sorted(self._work)
        return work[math.ceil(_SHARE * len(work)) - 1] + self._slack


def kind(batch: ScheduledBatch) -> Hashable:
    """What steps that take about as long have in common: size, to an eighth, and whether there are prompts; ``None``:
    nothing, as long prompts are attended to for longer and longer."""
    tokens = batch.num_tokens
    coarse = max(0, tokens.bit_length() - 4)
    return None if tokens > _MOST_TOKENS else (-(-tokens >> coarse), coarse, batch.num_prefills > 0)
