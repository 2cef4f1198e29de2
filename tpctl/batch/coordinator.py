"""The process that runs a batch over several engines: it plans, offers, takes up what is done, and replaces the dead.

It computes nothing and holds no row; whatever it knows it finds again in the folder when it is started anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from tpctl.batch.board import Board
from tpctl.batch.folder import JobFolder, load
from tpctl.batch.formats.place import Part
from tpctl.batch.local import Local
from tpctl.batch.plan import Plan
from tpctl.batch.roll import SPENT, Roll
from tpctl.batch.signs import EVERY, Signs
from tpctl.client.disk import writing
from tpctl.errors import EngineError, OutputError, SourceError, counted

POLL = 0.05
"""Seconds between two looks at the folder."""

OFFERS = 2
"""Parts that are offered for each replica, beside those that are taken."""

TOTALS = ("seconds", "replica_seconds", "gpu_seconds", "computed_tokens")
"""Sums over all runs of a batch; ``computed_tokens``: of answers, those included that were computed twice."""

_WINDOW = 30.0  # seconds that speeds are taken over


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Attributes:
        rows: that are there, and ``total`` of the input as far as it is known (``whole``: all of it).
        prompt_speed, speed: tokens a second of prompts and answers, over the last half minute.
        alive: replicas at work, of ``wanted``.
        seconds: of this run; ``left``: until it ends, if that can be told.
        pending: of replicas that cannot be started yet.
    """

    rows: int
    total: int
    whole: bool
    errors: int
    prompt_speed: float
    speed: float
    alive: int
    wanted: int
    seconds: float
    left: float | None
    pending: str = ""


class Coordinator:
    """One run of a batch. Leaving it as a context manager ends its replicas.

    Attributes:
        board: what is done.
        repeated: lines whose id an earlier line has.
    """

    def __init__(
        self,
        folder: JobFolder,
        plan: Plan,
        local: Local,
        *,
        retry_errors: bool = False,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Begin a run, in a folder that is claimed (``claim.claimed``).

        Args:
            retry_errors: rows that are errors are tried again.
            clock: seconds, of this process alone.
            say: is told of replicas that die, and of those that wait for room.

        Raises:
            OutputError: the folder cannot be written to.
        """
        self._folder = folder
        self._plan = plan
        self._local = local
        self._retry = retry_errors
        self._clock = clock
        self._say = say
        self._state = "running"
        self._reason: str | None = None
        self._pending = ""
        self._silent: list[str] = []
        self._started = self._looked = clock()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._samples: deque[tuple[float, int, int, int]] = deque([(self._started, 0, 0, 0)])
        self._waiting: deque[Part] = deque()  # found, and not yet offered
        self.repeated = 0
        before = load(folder.state) or {}
        self._generation = int(before.get("generation", 0)) + 1
        self._seconds = float(before.get("totals", {}).get("seconds", 0))
        with writing(folder.stop):
            folder.stop.unlink(missing_ok=True)
        self._roll = Roll(folder, clock)
        self._spent = tuple(map(self._roll.spent, SPENT))
        self.board = Board(folder, plan.formats)
        self._shown = self._progress()
        self._signs = Signs(folder.state, self._sign)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plan.stop()
        if error is not None:
            self._state, self._reason = "failed", str(error) or type(error).__name__
            if isinstance(error, KeyboardInterrupt | SystemExit):
                self._state = "interrupted"
        elif self._state == "running":
            self._state = "interrupted"
        try:
            if self._taken_over():  # the folder, and who works in it, are another one's
                self._local.stop(0.0, ())
                return
            with writing(self._folder.stop):
                self._folder.stop.touch()
            living = self._roll.living()
            self._local.stop(10.0, [name for name, said in living.items() if said.get("state") == "working"])
            with suppress(SourceError):  # of a replica that has ended; this run does, too
                self._roll.look(now=True)
            self._take_up()
            self._count()
            self._signs.stop()
            self._shown = self._progress()
            self._signs.write()
        except OutputError:
            if error is None:
                raise
        finally:
            self._signs.stop()
            self._local.kill()
            self.board.close()
            self._roll.close()

    def run(self, step: Callable[[Progress], object], should_stop: Callable[[], object]) -> bool:
        """Answer every line; whether all have a row now.

        Args:
            step: called again and again.
            should_stop: asked often; once true, what is under way is given up.

        Raises:
            OutputError: the folder is gone, takes no more, or another process has taken it.
            SourceError, UsageError: the input cannot be read, or is another one.
            EngineError: no replica can be started any more.
        """
        self._take_up()
        if self._retry:
            self.board.drop_errors()
        self._plan.start()
        while not should_stop():
            self._tick()
            step(self._shown)
            if self._plan.whole and not self._waiting and self.board.idle:
                self._state = "done"
                return True
            time.sleep(POLL)
        return False

    def totals(self) -> dict[str, float]:
        """``TOTALS`` of all runs of this batch."""
        return dict(zip(TOTALS, (self._seconds, *self._spent), strict=True))

    def _tick(self) -> None:
        self._folder.check_there()
        if self._signs.failure is not None:
            raise self._signs.failure
        self._find_parts()
        self._watch_local()
        self._take_up()
        if self._clock() - self._samples[-1][0] >= EVERY:
            self.board.offer_lost()
        own = {slot.name for slot in self._local.slots}
        for name, reason in self._roll.lost():
            if name not in own:
                self._say(f"replica {name}: {reason}")
        self._offer()
        if self._waiting or not self.board.idle:
            self._local.start_due()
        self._count()
        self._shown = self._progress()
        if self._shown.pending != self._pending:
            self._pending = self._shown.pending
            if self._pending:
                replicas = counted(self._shown.wanted, "replica")
                self._say(f"{self._shown.alive} of {replicas}, {self._pending}")

    def _take_up(self) -> None:
        """What replicas have handed in, and what those that are gone have left."""
        self.board.collect()
        self._roll.look()
        for replica, leases in self.board.holders().items():
            if not self._roll.alive(replica):
                self.board.collect()  # its last one may have come since
                self.board.give_back(leases, died=self._roll.mourned(replica))

    def _find_parts(self) -> None:
        for part in self._plan.ready():
            self.repeated += len(part.repeated)
            if self.board.under_way(part):
                continue
            if part.number not in self.board.done:
                self._waiting.append(part)
            elif self._retry and self.board.errors_of(part.number):
                self.board.reopen(part)

    def _offer(self) -> None:
        if self._waiting:
            replicas = max(1, len(self._local.slots), len(self._roll.living()))
            for _ in range(min(OFFERS * replicas - self.board.offered, len(self._waiting))):
                self.board.offer(self._waiting.popleft())

    def _watch_local(self) -> None:
        self._silent = self._roll.silent()
        self._local.kill_silent(self._silent)
        answered = {name: said["rows"] for name, said in self._roll.heard.items()}
        for death in self._local.deaths(answered):
            if death.fatal:
                raise SourceError(death.reason)
            self._say(f"replica {death.name}: {death.reason}; {death.again}")
            if death.certain:
                self._roll.bury(death.name, blameless=death.blameless)
        if self._local.slots and self._local.all_given_up and not self._roll.living():
            raise EngineError(f"no replica stays alive; the last one {self._local.slots[-1].reason}")

    def _count(self) -> None:
        now = self._clock()
        gap, self._looked = now - self._looked, now
        self._seconds += gap
        self._spent = tuple(map(self._roll.spent, SPENT))  # not when it is asked for: the thread of signs does that
        if now - self._samples[-1][0] >= EVERY:
            counters = [self._roll.sum(name) for name in ("rows", "prompt_tokens", "completion_tokens")]
            self._samples.append((now, counters[0], counters[1], counters[2]))
            while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW:
                self._samples.popleft()

    def _progress(self) -> Progress:
        living = self._roll.living().values()
        # A replica's last sign may count rows of a part that is done meanwhile.
        rows = min(self.board.sums.rows + sum(said.get("open_rows", 0) for said in living), self._plan.rows)
        first, last = self._samples[0], self._samples[-1]
        span = max(last[0] - first[0], 1e-9)
        total = max(self._estimated(), rows)
        a_second = (last[1] - first[1]) / span
        return Progress(
            rows=rows,
            total=total,
            whole=self._plan.whole,
            errors=self.board.sums.errors,
            prompt_speed=(last[2] - first[2]) / span,
            speed=(last[3] - first[3]) / span,
            alive=sum(said.get("state") == "working" for said in living),
            wanted=len(self._local.slots),
            seconds=self._clock() - self._started,
            left=(total - rows) / a_second if a_second > 0 else None,
            pending=self._local.pending,
        )

    def _estimated(self) -> int:
        """Lines of the input, as far as they are known, and as many as the rest has if it is like them."""
        if self._plan.whole or not self._plan.end:
            return self._plan.rows
        return max(self._plan.rows, round(self._plan.rows * self._plan.size / self._plan.end))

    def _taken_over(self) -> bool:
        return int((load(self._folder.state) or {}).get("generation", 0)) > self._generation

    def _sign(self) -> dict[str, Any]:
        """What the state file says; called by the thread that writes it.

        Raises:
            OutputError: a later coordinator has written it, which could not see that this one lives.
        """
        if self._taken_over():
            raise OutputError(f"another tpctl batch has taken {self._folder.root} over; this one ends")
        shown = self._shown
        replicas = max(1, shown.wanted, shown.alive)
        return {
            "generation": self._generation,
            "state": self._state,
            "reason": self._reason,
            "since": self._since,
            "share": -(-max(self._plan.rows - self.board.sums.rows, 0) // replicas),
            **asdict(shown),
            "silent": self._silent,
            "totals": self.totals(),
        }
