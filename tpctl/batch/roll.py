"""The roll of replicas: who gives signs of life, wherever they run, and what they say.

What a replica has taken (time, tokens) is counted from its signs, up to the last one: who is killed cannot say more. Of
those that are gone it stands in a log, under a name that no other life has, so that whichever process is killed counts
nothing twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from tpctl.batch.folder import JobFolder, log_lines, names, open_log
from tpctl.batch.signs import Watch, machine
from tpctl.client.disk import writing
from tpctl.errors import SourceError

HEARD = ("rows", "prompt_tokens", "completion_tokens")
"""Counters in a replica's signs."""

SPENT = ("seconds", "gpu_seconds", "completion_tokens")
"""What a replica's life has taken, in its signs."""

_EVERY = 0.25  # seconds between looks


@dataclass
class _Known:
    """``seen``: it was alive at some time of this run; ``gone``: for good; ``blameless``: no line has done that."""

    watch: Watch
    seen: bool = False
    gone: bool = False
    blameless: bool = False


@dataclass
class Roll:
    """All replicas that there were in this run.

    Attributes:
        heard: what each said last, of ``HEARD``.
    """

    folder: JobFolder
    clock: Callable[[], float] = time.monotonic
    heard: dict[str, dict[str, int]] = field(default_factory=dict)
    _known: dict[str, _Known] = field(default_factory=dict)
    _fatal: list[str] = field(default_factory=list)
    _lost: list[tuple[str, str]] = field(default_factory=list)
    _ended: dict[str, dict[str, float]] = field(default_factory=dict)  # what lives that ended have taken
    _log: IO[bytes] | None = None
    _looked: float = field(default=float("-inf"))

    def __post_init__(self) -> None:
        for entry in log_lines(self.folder.lives):
            self._ended[entry["life"]] = entry

    def look(self, *, now: bool = False) -> None:
        """See who is there, a few times a second; or ``now``, however short ago it was done.

        Raises:
            SourceError: a replica of this machine says what no other could mend, as an input that has changed. One of
                another machine may have missed what that one lacks (``lost``).
            OutputError: what a replica has taken cannot be written down.
        """
        if self.clock() - self._looked < _EVERY and not now:
            return
        self._looked = self.clock()
        for name in names(self.folder.replicas):
            if name.endswith(".json") and not name.startswith("."):
                self._meet(name.removesuffix(".json"))
        for replica, known in self._known.items():
            if not known.gone:
                self._look_at(replica, known)
        if self._fatal:
            reason = self._fatal[0]
            self._fatal.clear()
            raise SourceError(reason)

    def lost(self) -> list[tuple[str, str]]:
        """Replicas of other machines that have ended since the last call and would again, and why."""
        lost, self._lost = self._lost, []
        return lost

    def alive(self, replica: str) -> bool:
        """Whether a replica lives, also one that was not met yet."""
        known = self._meet(replica)
        return known.watch.alive and not known.gone

    def silent(self) -> list[str]:
        """Those that have given no sign for too long, and have not ended."""
        return [name for name, known in self._known.items() if known.seen and not known.gone and not known.watch.alive]

    def mourned(self, replica: str) -> bool:
        """Whether one that does not live came to its end in this run, and not in order: a line may have done it."""
        known = self._meet(replica)
        return known.seen and known.watch.said.get("state") != "ended" and not known.blameless

    def bury(self, replica: str, *, blameless: bool) -> None:
        """Be told that one has ended, by who knows better than its signs; its lines are offered again at once."""
        known = self._meet(replica)
        if not known.gone:
            self._look_at(replica, known)  # it may have left in order
        known.gone, known.blameless = True, blameless
        if known.watch.said:
            self._write_down(known.watch.said)
        for end in (".json", ".lock"):
            (self.folder.replicas / f"{replica}{end}").unlink(missing_ok=True)

    def living(self) -> dict[str, Mapping[str, Any]]:
        """What those that live said last."""
        return {name: known.watch.said for name, known in self._known.items() if known.seen and self.alive(name)}

    def sum(self, counter: str) -> int:
        """A counter of all replicas of this run."""
        return sum(said[counter] for said in self.heard.values())

    def spent(self, counter: str) -> float:
        """One of ``SPENT``, of all replicas of the batch up to the last sign of each."""
        lives = {str(known.watch.said.get("life")): known.watch.said for known in self._known.values()}
        return sum(float(said.get(counter, 0)) for said in {**lives, **self._ended}.values())

    def close(self) -> None:
        if self._log is not None:
            with suppress(OSError):  # a full disk, of which was told when it was written to
                self._log.close()

    def _meet(self, replica: str) -> _Known:
        if replica not in self._known:
            path = self.folder.replicas / f"{replica}.json"
            self._known[replica] = _Known(Watch(path, path.with_suffix(".lock"), self.clock))
        return self._known[replica]

    def _look_at(self, replica: str, known: _Known) -> None:
        alive = known.watch.look()
        known.seen |= alive and bool(known.watch.said)
        said = known.watch.said
        if known.seen:
            self.heard[replica] = {name: int(said.get(name, 0)) for name in HEARD}
        if alive:
            return
        # One that only fell silent may speak again; one that left, or whose lock is free, will not.
        known.gone = known.watch.gone
        if known.seen and said.get("fatal"):
            if said.get("machine") == machine():
                self._fatal.append(str(said.get("reason")))
            else:
                self._lost.append((replica, f"{said.get('reason')} (on {said.get('host')})"))
        if known.gone:
            if said:
                self._write_down(said)
            for end in (".json", ".lock"):
                (self.folder.replicas / f"{replica}{end}").unlink(missing_ok=True)

    def _write_down(self, said: Mapping[str, Any]) -> None:
        """Count a life that has ended."""
        life = str(said.get("life"))
        if life in self._ended:
            return
        entry = {"life": life, **{counter: said.get(counter, 0) for counter in SPENT}}
        if self._log is None:
            self._log = open_log(self.folder.lives)
        with writing(self.folder.lives):
            self._log.write(json.dumps(entry).encode() + b"\n")
            self._log.flush()
        self._ended[life] = entry
