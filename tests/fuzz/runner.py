"""Runs cases in a process of their own, which is ended and replaced where a case takes too long or kills it."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fuzz.bases import make_bases
from tests.fuzz.case import Case, Outcome

SECONDS = 30.0
"""What a command may take."""

_START = 120.0
"""Seconds that a process may take until it is ready for cases."""

_MUCH = 700_000_000
"""Bytes of memory after which a process is not used again."""

_CASES = 1000
"""After so many a process is replaced: what libraries keep must not be taken for the memory of a case."""


class Runner:
    """Cases in, outcomes out.

    Attributes:
        seconds: what a command may take.
        work: the folder of the last case's commands, as they left it.
        cases: how many were run.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        memory = Path("/dev/shm")  # thousands of small files are made and removed
        place = memory if os.access(memory, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="tpctl-fuzz-", dir=place)).resolve()
        make_bases(self._folder / "pristine")
        self._process: subprocess.Popen[bytes] | None = None
        self._here = 0
        self.work = self._folder / "case" / "work"
        self.cases = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, case: Case) -> list[Outcome]:
        """The outcome of each of the case's commands, up to the first that fails."""
        if self._process is None or self._here >= _CASES:
            self._end()
            self._start()
        self._here += 1
        self.cases += 1
        outcomes: list[Outcome] = []
        with contextlib.suppress(BrokenPipeError):
            raw = pickle.dumps(case)
            self._cases.write(struct.pack("<Q", len(raw)) + raw)
            self._cases.flush()
        while True:
            begun = time.monotonic()
            try:
                outcome = self._receive(begun + self.seconds)
            except TimeoutError:
                place = self._stack()
                self._end()
                failure = f"took more than {self.seconds:.0f} s"
                return [*outcomes, self._lost(case, outcomes, failure, place, time.monotonic() - begun)]
            except EOFError:
                failure = self._death()
                self._end()
                return [*outcomes, self._lost(case, outcomes, failure, "", time.monotonic() - begun)]
            if outcome is None:
                if any(done.failure is not None or done.peak > _MUCH for done in outcomes):
                    self._end()  # what an exception keeps alive must not be taken for the memory of the next case
                return outcomes
            outcomes.append(outcome)

    def _lost(self, case: Case, done: list[Outcome], failure: str, place: str, seconds: float) -> Outcome:
        return Outcome(case.commands[len(done)], None, failure=failure, place=place, seconds=seconds)

    def _start(self) -> None:
        there, self_in = os.pipe()
        self_out, here = os.pipe()
        arguments = [str(self._folder / "case"), str(self._folder / "pristine"), str(there), str(here)]
        root = str(Path(__file__).parent.parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz.server", *arguments],
            cwd=root,
            env={**_environment(), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"},
            pass_fds=(there, here),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stderr=(self._folder / "log").open("wb"),
        )
        os.close(there)
        os.close(here)
        self._cases = os.fdopen(self_in, "wb")
        self._answers = self_out
        self._here = 0
        self._receive(time.monotonic() + _START)  # it is ready

    def _receive(self, until: float) -> Any:
        return pickle.loads(self._read(struct.unpack("<Q", self._read(8, until))[0], until))

    def _read(self, count: int, until: float) -> bytes:
        parts = b""
        while len(parts) < count:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._answers, count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    def _stack(self) -> str:
        """Where the process hangs: its innermost line of tpctl."""
        assert self._process is not None
        file = self._folder / "case-stack"
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        found = re.findall(r'File ".*/tpctl/([^"]+)", line \d+ in (\w+)', file.read_text() if file.exists() else "")
        return ":".join(found[0]) if found else ""

    def _death(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        logs = [file for file in (self._folder / "log", self._folder / "case-streams" / "2") if file.exists()]
        said = "\n".join(file.read_text(errors="replace") for file in logs).strip().splitlines()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        return f"{how} ({said[-1][:200]})" if said else how

    def _end(self) -> None:
        if self._process is None:
            return
        self._cases.close() if not self._cases.closed else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)
        self._process = None


def _environment() -> dict[str, str]:
    """Ours, without what would tell a command where to look or whom to ask."""
    strange = ("HF_", "TPCTL_", "TRANSFORMERS_", "XDG_", "PIP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}
