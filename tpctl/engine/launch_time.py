"""When to start the next step: while the device computes, but no sooner than it must be.

A step is scheduled and launched while the one before it runs, so that the device never waits for the host. A request
that comes just behind a launch waits for the rest of the step that runs, for all of the step that was launched, and
only then for its own. So where requests may come at any time (``EngineConfig.late_launch``) rank 0 waits for one, and
launches shortly before the step that runs is expected to end: what comes until then is in the very next step.

    device   | step N                         | step N + 1 ...
    host     | tokens of N - 1 | waits    |schedule, launch|
                                          ^ due: N's beginning + what it takes - margin

What a step takes is known from steps of its size a moment ago, as the host saw them end: their median. The least would
be no safer: where the host sees one end late, the next one seems as much shorter, and all that follow would be launched
as much earlier. The margin is what the host's own work took from when it was due, at the 90th percentile of the last
steps, and some slack.

One of ``_PROBE`` steps is launched at once, fewer when nothing comes of it, since what comes during that one waits, and
one when those that are held seem to take longer. These alone say what a step takes; what others take, which may have
waited for a launch, only lowers it.

The slack doubles when a step was launched hardly before the one before it ended, or not even that, and soon goes back:
a late launch costs a pause of some tenths of a millisecond once, a large margin makes every other request wait for a
whole step. Steps that were held take longer than those launched at once where another rank, which hears of a launch
later than rank 0, comes too late: then the margin grows by twice of what they take longer, and goes back slowly.

A wrong guess costs the device a pause and no result: all that depends on it is when rank 0 goes on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import median

from tpctl.engine.runners.runner import Launched
from tpctl.engine.scheduling.scheduled import ScheduledBatch

_KNOWN = 3  # steps launched at once that say what their like take
_PROBE, _MOST_PROBE = 32, 256  # of so many steps one is launched at once
_RECENT = 32  # what steps took that were not among so many says nothing any more
_LEAST = 1e-3  # seconds from a step's beginning to a launch that are worth it
_NEAR = 0.1e-3  # a step that is waited for no longer than this had maybe ended before
_SLACK = 0.2e-3  # seconds that the margin has beside the host's work, at least
_MOST_SLACK = 4e-3
_RETURN = 0.99  # of the slack beyond the least is left after each step,
_RETURN_OTHERS = 0.94  # and of what other ranks are given after a comparison
_WORK = 32  # steps whose work on the host is remembered
_SHARE = 0.9  # of them the margin covers
_ENOUGH = 16  # held steps that say whether they take longer
_SLOWER = 0.005  # of what steps launched at once take: so much longer, and they are launched too late
_OTHER = 1.05  # so much longer or shorter, though launched at once, and it is another thing that they do
_MOST_TOKENS = 512  # of a step that takes as long as the last one of its size did


@dataclass
class _Like:
    """What steps of a size took: the last that were launched at once, and others."""

    at_once: deque[float] = field(default_factory=lambda: deque(maxlen=_KNOWN))
    held: deque[float] = field(default_factory=lambda: deque(maxlen=_PROBE))
    since: int = 0  # held ones since the last that was launched at once
    probe: int = _PROBE  # of these, until the next one is
    seen: int = 0  # the number of the last step

    def decide(self) -> float | None:
        """Decide on the step behind the next one: seconds that the next one takes, by which that may be held; ``None``:
        it is to be launched at once, to find out, and others are counted from there on."""
        if len(self.at_once) < _KNOWN:
            return None
        if self.since >= self.probe or (self.since >= _ENOUGH and self._longer() > 0):
            self.since = 0
            return None
        return min(median(self.at_once), median([*self.at_once, *self.held]))

    def learn(self, took: float, held: bool) -> float | None:
        """Take in what a step took; if it tells, seconds by which those that were held take longer than others."""
        if held:
            self.held.append(took)
            self.since += 1
            return None
        if self.at_once and not 1 / _OTHER < took / median(self.at_once) < _OTHER:
            self.at_once.clear()
            self.held.clear()
        self.at_once.append(took)
        self.since = 0
        if len(self.held) < _ENOUGH:
            return None
        longer = self._longer()
        self.held.clear()
        self.probe = _PROBE if longer else min(2 * self.probe, _MOST_PROBE)
        return longer

    def doubt(self) -> None:
        """One seemed to take less than it should: hold no more before the next one that is launched at once has."""
        if len(self.at_once) == _KNOWN:
            self.at_once.popleft()

    def _longer(self) -> float:
        """Seconds by which those that were held take longer, if that is more than chance."""
        longest = max(self.at_once)
        longer = median(self.held) - longest
        return longer if longer > _SLOWER * longest else 0.0


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
        self._others = 0.0  # seconds that the margin has for other ranks beside
        self._work: deque[float] = deque(maxlen=_WORK)
        self._known: dict[Hashable, _Like] = {}
        self._running: Launched | None = None
        self._begun = 0.0  # when the device began it
        self._held = False  # whether it was launched when it was due
        self._asked = 0.0  # when it was last asked how long to wait,
        self._due: float | None = None  # and what was said,
        self._end = 0.0  # as that was when the device ends
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
        expected = None if running is None else self._decide(kind(running.batch))
        if expected is None or not self._work:
            return 0.0
        after = expected - self._margin()
        if after < _LEAST or self._begun + after <= self._asked:
            return 0.0
        self._due, self._end = self._begun + after, self._begun + expected
        return self._due - self._asked

    def _follow(self, running: Launched, before: Launched) -> None:
        """Learn from a step that has ended, behind which another one was launched."""
        self._steps += 1
        held = self._due is not None and running.launched_at >= self._due and not running.batch.num_prefills
        if self._due is None or held:  # else a request came, and nobody knows when
            self._work.append(running.launched_at - (self._asked if self._due is None else self._due))
        late = before.ended_at - running.launched_at < _NEAR
        self.held_steps += held
        self.late_steps += held and late
        size = kind(before.batch)
        self._slack = self._least_slack + (self._slack - self._least_slack) * _RETURN
        if late:
            if self._due is None:
                self._known.pop(size, None)
            elif held:  # else a request came, hardly before the end
                self._slack = min(2 * self._slack, _MOST_SLACK)
                if size in self._known and before.ended_at < self._end:
                    self._known[size].doubt()
        elif size is not None:
            like = self._known.setdefault(size, _Like())
            if self._steps - like.seen > _RECENT:
                like = self._known[size] = _Like()
            like.seen = self._steps
            longer = like.learn(before.ended_at - self._begun, self._held)
            if longer is not None:
                self._others = min(_RETURN_OTHERS * self._others + 2 * longer, _MOST_SLACK)
        self._begun, self._held = running.launched_at if late else before.ended_at, held

    def _decide(self, size: Hashable) -> float | None:
        like = self._known.get(size)
        return None if like is None or self._steps - like.seen > _RECENT else like.decide()

    def _margin(self) -> float:
        """Seconds before a step's end at which the next one is due."""
        work = sorted(self._work)
        return work[math.ceil(_SHARE * len(work)) - 1] + self._slack + self._others


def kind(batch: ScheduledBatch) -> Hashable:
    """What steps that take about as long have in common: size, to an eighth, and whether there are prompts; ``None``:
    nothing, as long prompts are attended to for longer and longer."""
    tokens = batch.num_tokens
    coarse = max(0, tokens.bit_length() - 4)
    return None if tokens > _MOST_TOKENS else (-(-tokens >> coarse), coarse, batch.num_prefills > 0)
