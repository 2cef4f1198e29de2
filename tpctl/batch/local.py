"""Replicas on this host: started, each on its own GPUs or cores, watched, and started again when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tpctl.children import python_environment
from tpctl.launch.lifeline import PARENT_PID
from tpctl.launch.places import cores_of

ENGINE_FAILED = 75
"""A replica's exit code where its engine failed: another may do better (EX_TEMPFAIL of sysexits.h)."""

MOST_STARTS = 5
"""Deaths in a row, without a row answered in between, after which a replica is not started again."""

_SLOWEST = 30.0  # seconds between two starts


@dataclass
class Slot:
    """A place for one replica, and who is in it.

    Attributes:
        name: of the replica that is there, or was last.
        deaths: in a row, without a row answered in between.
    """

    number: int
    gpus: str | None
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    starts: int = 0
    deaths: int = 0
    due: float = 0.0
    reason: str = ""
    given_up: bool = False


@dataclass(frozen=True)
class Death:
    """A replica's end.

    Attributes:
        fatal: no other replica would do better.
        again: what comes next.
        certain: it has ended, whatever its signs, which come from another host, may say.
        blameless: no line that it was answering has done it.
    """

    name: str
    reason: str
    fatal: bool
    again: str = ""
    certain: bool = False
    blameless: bool = False


@dataclass
class Local:
    """The replicas of this host. Only the thread that made it may call it: the kernel ties a child to its thread."""

    root: Path
    slots: list[Slot]
    token: str
    command: Sequence[str] = (sys.executable, "-m", "tpctl", "replica")
    backoff: float = 0.5

    @property
    def pending(self) -> str:
        """What is to be said of replicas that cannot be started yet."""
        return ""

    @property
    def all_given_up(self) -> bool:
        return all(slot.given_up for slot in self.slots)

    def start_due(self) -> None:
        """Start what is not running and has waited long enough."""
        for slot in self.slots:
            if slot.process is None and not slot.given_up and time.monotonic() >= slot.due:
                self._start(slot)

    def deaths(self, answered: dict[str, int]) -> list[Death]:
        """Replicas that ended since the last call.

        Args:
            answered: rows by replica.
        """
        found = []
        for slot in self.slots:
            if slot.process is None or (code := slot.process.poll()) is None:
                continue
            reason, fatal, hopeless = self._judge(slot, code)
            slot.process = None
            slot.deaths = 1 if answered.get(slot.name) else slot.deaths + 1
            slot.given_up = hopeless or slot.deaths >= MOST_STARTS
            slot.due = time.monotonic() + min(_SLOWEST, self.backoff * 2 ** (slot.deaths - 1))
            slot.reason = reason
            again = "not started again" if slot.given_up else "started again"
            found.append(Death(slot.name, reason, fatal, again))
        return found

    def kill_silent(self, silent: Container[str]) -> None:
        """Kill replicas that give no signs of life: their engines hold what others could use."""
        for slot in self.slots:
            if slot.process is not None and slot.name in silent:
                self._kill(slot.process)

    def stop(self, patience: float, at_work: Container[str]) -> None:
        """End all of them, and what they have started.

        Args:
            patience: seconds in which those that are ``at_work`` may end by themselves. Others do not look whether
                they should: their engine is not ready.
        """
        for slot in self.slots:
            if slot.process is not None and slot.name not in at_work:
                self._ask_to_end(slot.process)
        deadline = time.monotonic() + patience
        for slot in self.slots:
            if slot.process is None:
                continue
            try:
                slot.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._ask_to_end(slot.process)
                try:
                    slot.process.wait(5)
                except subprocess.TimeoutExpired:
                    self._kill(slot.process)
                    slot.process.wait()
            slot.process = None

    def kill(self) -> None:
        for slot in self.slots:
            if slot.process is not None:
                self._kill(slot.process)
                slot.process.wait()
                slot.process = None

    def _start(self, slot: Slot) -> None:
        slot.starts += 1
        slot.name = self._name(slot)
        if slot.log is not None:
            slot.log.close()
        slot.log = tempfile.TemporaryFile()  # noqa: SIM115 — closed with the next one, or with this process
        slot.process = self._launch(slot, slot.log)

    def _name(self, slot: Slot) -> str:
        return f"{slot.number}-{self.token}-{slot.starts}"

    def _launch(self, slot: Slot, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The replica's process, or what stands for one that runs elsewhere; both write to ``log``."""
        env = {**python_environment(os.environ), PARENT_PID: str(os.getpid())}
        if slot.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = slot.gpus
        process = subprocess.Popen(
            [*self.command, str(self.root), "--name", slot.name],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C at the terminal is the coordinator's to handle
        )
        if slot.gpus is None and (cores := cores_of(slot.number, len(self.slots))) is not None:
            os.sched_setaffinity(process.pid, cores)  # before it has other threads, which then have it too
        return process

    def _ask_to_end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()

    def _judge(self, slot: Slot, code: int) -> tuple[str, bool, bool]:
        """Why a replica ended; whether no other one, and whether no next one in its place would do better."""
        return (*why_ended(code, last_line(slot.log)), False)


INTERRUPTED = "tpctl: interrupted"
"""What a replica says last that a signal has ended, in order."""


def why_ended(code: int, last: str) -> tuple[str, bool]:
    """What to say of a replica that ended, and whether no other one would do better."""
    if code > 128 and last == INTERRUPTED:
        code = 128 - code
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})", False
    ours = last.startswith("tpctl: ")
    said = last.removeprefix("tpctl: ")
    return (said or f"ended with exit code {code}"), ours and code in (1, 2)


def last_line(log: IO[bytes] | None, but: tuple[str, ...] = ()) -> str:
    """The last line with text that begins with none of ``but``."""
    if log is None:
        return ""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 8192))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith(but)), "")
