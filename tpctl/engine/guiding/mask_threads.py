"""Threads that find masks beside the steps, and what becomes of those that take long.

llguidance's limits do not bound what a mask takes (``client.grammar_text.parser_limits``), and no thread can be told to
stop. So a step waits ``PATIENCE`` seconds beyond its forward pass; a request whose mask is not there then is left out
until it is, or until it has taken ``LIMIT`` seconds: then the request ends, and others with its grammar are refused.

    queue ──► a thread ── there in time ──────────────────────────────► finish: the step's
      ▲          │ └───── left out, there later ──► tell: Found ──► the sequence goes on
      │          └─ after _LONG seconds another thread takes its place, _MOST_SLOW times at most
      └── parked: others' masks of the same grammar, meanwhile; and, while no more may take a place, those of grammars
          that have not been quick before
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from tpctl.client.deep_threads import deep_thread, said
from tpctl.cores import affinity_cores
from tpctl.engine.guiding.walk import Walk, Words
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.errors import RequestError
from tpctl.wire.guide import BUSY, Guide
from tpctl.wire.messages import Found, Message

PATIENCE = 0.04
"""Seconds for which a step waits for masks once its logits are computed."""

LIMIT = 3.0
"""Seconds of the processor's time that one mask may take: a host that stands still is no grammar's fault."""

_WAIT = 30.0  # seconds for which a request may wait for a thread
_LONG = 0.1  # seconds after which a thread is replaced
_TICK = 0.02  # seconds between looks at the threads, while any is at work and a request was left out
_MOST_THREADS = 8  # beside those that are replaced
_MOST_SLOW = 4
_KEPT = 256  # grammars that are known to be quick, or not to be had

TOO_LONG = (
    f"to find which tokens may come next takes more than {LIMIT:.0f} s, which is as much as it may; make it simpler"
)


class Finding:
    """A mask that is being found. ``done`` has why there is none, or ``None``; then ``words`` are the mask."""

    def __init__(self, walk: Walk, item: ScheduledSequence, guide: Guide, width: int) -> None:
        self.walk = walk
        self.item = item
        self.guide = guide
        self.words: Words = np.empty(width, dtype=np.uint32)
        self.done: Future[str | None] = Future()
        self.left_at: float | None = None  # when its sequence was left out
        self.begun_at: float | None = None
        self.thread = 0
        self.before = 0.0  # seconds that the thread had taken before
        self.slow = False  # whether its thread was replaced


class MaskThreads:
    """For the thread that computes the steps, but where it says otherwise.

    Attributes:
        tell: hands a message to all ranks. Without it nobody could say when a mask is there that was late, and steps
            wait for all.
    """

    def __init__(self) -> None:
        self.tell: Callable[[Message], None] | None = None
        self._work: queue.SimpleQueue[Finding] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._threads = 0
        self._slow: dict[Guide, int] = {}  # threads that were replaced and are still at work
        self._parked: dict[Guide, list[Finding]] = {}
        self._unproven: list[Finding] = []  # of grammars that have not been quick yet, while too many are slow
        self._running: set[Finding] = set()
        self._left: set[Finding] = set()
        self._quick: OrderedDict[Guide, str] = OrderedDict()
        self._refused: OrderedDict[Guide, str] = OrderedDict()
        self._watched = threading.Event()  # whether any is left out
        self._watcher = False

    def refused(self, guide: Guide) -> str | None:
        """Why no request with this grammar can be answered, as an earlier one has shown. Any thread."""
        with self._lock:
            return self._refused.get(guide)

    def begin(self, finding: Finding, most: int) -> None:
        """Start to find a mask; ``most``: as many threads are of use."""
        try:
            with self._lock:
                self._start_threads(most)
        except RequestError as error:
            finding.done.set_result(str(error))
            return
        self._work.put(finding)

    def leave(self, finding: Finding) -> bool:
        """Leave its sequence out, unless the mask has come, or there is no thread that would end it."""
        with self._lock:
            if finding.done.done():
                return False
            if not self._watcher:
                try:
                    threading.Thread(target=self._watch, daemon=True, name="tpctl-guide-watch").start()
                except RuntimeError:
                    return False
                self._watcher = True
            finding.left_at = time.monotonic()
            self._left.add(finding)
            self._watched.set()
        return True

    def forget(self, finding: Finding) -> None:
        """Its request has ended. A thread that is at it goes on."""
        with self._lock:
            self._left.discard(finding)
            if finding.begun_at is None:
                self._settle(finding, "its request has ended")

    def _start_threads(self, most: int) -> None:
        """As many as are of use. Raises ``RequestError`` if there is none."""
        while self._threads < min(most, _MOST_THREADS, max(1, affinity_cores() // 2)):
            try:
                deep_thread(self._run, f"tpctl-guide-{self._threads}")
            except RequestError:
                if not self._threads:
                    raise
                return
            self._threads += 1

    def _run(self) -> None:
        """Thread: until another one has taken its place."""
        while True:
            finding = self._work.get()
            with self._lock:
                if not self._take(finding):
                    continue
            problem: str | None
            try:
                problem = finding.walk.mask(finding.item, finding.words)
            except BaseException as error:  # a panic of the library is no Exception
                problem = said(f"{type(error).__name__}: {error}")
            with self._lock:
                self._running.discard(finding)
                if problem is not None:
                    problem = f"{finding.guide.name}: {problem}"
                    if finding.walk.hopeless:
                        _keep(self._refused, finding.guide, problem)
                if problem is None and not finding.slow:
                    _keep(self._quick, finding.guide, "")
                self._settle(finding, problem)
                if finding.slow:
                    self._free(finding.guide)
                    return

    def _take(self, finding: Finding) -> bool:
        """Whether a mask is to be found now; locked."""
        guide = finding.guide
        if finding.done.done():
            return False
        if (why := self._refused.get(guide)) is not None and not finding.walk.begun:
            self._settle(finding, why)
            return False
        if guide in self._slow:
            self._parked.setdefault(guide, []).append(finding)
            return False
        if self._are_slow and guide not in self._quick:
            self._unproven.append(finding)
            return False
        finding.begun_at, finding.thread = time.monotonic(), threading.get_ident()
        finding.before = _taken(finding)
        self._running.add(finding)
        return True

    @property
    def _are_slow(self) -> bool:
        """Whether no thread may be replaced any more; locked."""
        return sum(self._slow.values()) >= _MOST_SLOW

    def _free(self, guide: Guide) -> None:
        """A thread that was replaced ends; locked."""
        again, self._unproven = self._unproven, []
        self._slow[guide] -= 1
        if not self._slow[guide]:
            del self._slow[guide]
            again += self._parked.pop(guide, [])
        for finding in again:
            self._work.put(finding)

    def _settle(self, finding: Finding, problem: str | None) -> None:
        """Say what has become of a mask, once; locked."""
        if finding.done.done():
            return
        finding.done.set_result(problem)
        if finding in self._left:
            self._left.remove(finding)
            assert self.tell is not None
            self.tell(Found(finding.item.sequence.id, problem))

    def _watch(self) -> None:
        """Thread: end what takes too long, and replace threads that are at it."""
        while self._watched.wait():
            time.sleep(_TICK)
            with self._lock:
                self._look(time.monotonic())
                if not self._left and not self._running:
                    self._watched.clear()

    def _look(self, now: float) -> None:
        """Locked."""
        for finding in list(self._running):
            assert finding.begun_at is not None
            if not finding.slow and now - finding.begun_at > _LONG and not self._are_slow:
                finding.slow = True
                self._slow[finding.guide] = self._slow.get(finding.guide, 0) + 1
                self._threads -= 1
                try:
                    self._start_threads(self._threads + 1)
                except RequestError:
                    finding.slow = False  # it goes on as the only one
                    self._threads += 1
                    self._free(finding.guide)
            if not finding.done.done() and _taken(finding) - finding.before > LIMIT:
                problem = f"{finding.guide.name}: {TOO_LONG}"
                _keep(self._refused, finding.guide, problem)
                self._settle(finding, problem)
                for other in self._parked.pop(finding.guide, ()):
                    self._settle(other, problem)
        for finding in list(self._left):
            assert finding.left_at is not None
            if finding.begun_at is None and now - finding.left_at > _WAIT:
                self._settle(finding, BUSY)


def _taken(finding: Finding) -> float:
    """Seconds of the processor's time that a mask's thread, which is alive, has taken."""
    if not hasattr(time, "pthread_getcpuclockid"):  # on macOS
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(finding.thread))


def _keep(kept: OrderedDict[Guide, str], guide: Guide, value: str) -> None:
    kept[guide] = value
    kept.move_to_end(guide)
    if len(kept) > _KEPT:
        kept.popitem(last=False)
