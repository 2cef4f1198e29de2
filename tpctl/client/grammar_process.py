"""The command's end of the processes in which grammars are tried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

from tpctl.client.grammar_worker import MEMORY, SECONDS
from tpctl.client.template_worker import NO_MEMORY
from tpctl.client.worker_process import close, exchange, how, start
from tpctl.errors import BusyError, RequestError
from tpctl.wire.guide import Guide

MOST = 4
"""Processes, some 30 MB each."""

_PATIENCE = 60.0  # seconds beyond a grammar's own: for the start, and for a machine that is busy
_WAIT = 30.0  # seconds that somebody waits for others' grammars

_TOO_LONG = f"it takes more than {SECONDS:.0f} s to compile, which is as much as it may; make it simpler"
_TOO_LARGE = f"it takes more than {MEMORY >> 20} MiB to compile, which is as much as it may; make it simpler"

_ITS_OWN = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGPROF, signal.SIGSEGV}
"""Signals that end a process for what it does itself. Others are sent, or the kernel's, for want of memory."""


class GrammarProcesses:
    """Processes, started when they are needed and again after a grammar has ended one. For several threads, and for
    children of this process, which have their own."""

    def __init__(self, most: int = MOST, wait: float = _WAIT) -> None:
        self._most, self._wait = most, wait
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._users = 0
        self._interrupts = 0
        self._free: list[subprocess.Popen[bytes]] = []
        self._at_work: set[subprocess.Popen[bytes]] = set()

    def problem(self, guide: Guide) -> str | None:
        """Why llguidance does not take a grammar; ``None``: it does.

        Raises:
            RequestError: that is not for a grammar to say.
            BusyError: all processes are at work for others, or something else than the grammar ended one.
        """
        if self._owner != os.getpid():
            self._reset()
        with self._changed:
            before = self._interrupts
            if not self._changed.wait_for(lambda: self._users < self._most or self._interrupts > before, self._wait):
                raise BusyError(f"grammars of others have been compiled for {self._wait:.0f} s; try again later")
            self._check(before)
            self._users += 1
        try:
            found = self._found(guide, before)
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify()
        if "refused" in found:
            raise RequestError(found["refused"])
        problem = found["problem"]
        assert problem is None or isinstance(problem, str)
        return problem

    def interrupt(self) -> None:
        """End all processes; whoever waits for one gets a ``BusyError``. Later grammars have others."""
        with self._changed:
            self._interrupts += 1
            self._changed.notify_all()
            for process in self._at_work:
                process.kill()
            free, self._free = self._free, []
        for process in free:
            close(process)

    def _check(self, before: int) -> None:
        """Raise ``BusyError`` if there was an interrupt since there were so many ``before``."""
        if self._interrupts > before:
            raise BusyError("grammars are not tried any more, since this process is ending")

    def _found(self, guide: Guide, before: int) -> dict[str, Any]:
        """A worker's answer, or what stands for one where the grammar has ended its process.

        A process that waits may have been ended by anybody, so that its end says nothing of the grammar that it is
        given next: a fresh one is. Nor does that of a fresh one, unless it ended itself.
        """
        while True:
            try:
                process, fresh = self._free.pop(), False
            except IndexError:
                process, fresh = _start(guide), True
            with self._changed:
                self._at_work.add(process)
                if self._interrupts > before:  # while it was started
                    process.kill()
            found = None
            try:
                found = _asked(process, guide)
            finally:
                with self._changed:
                    self._at_work.remove(process)
                    kept = found is not None and not found.get("worn") and self._interrupts == before
                    if kept:
                        self._free.append(process)
            if kept and found is not None:
                return found
            code = None if found is not None else _code(process)
            close(process)
            self._check(before)
            if found is not None:
                return found
            if code == -signal.SIGPROF:  # its timer is not set while it waits
                return {"problem": _TOO_LONG}
            if fresh:
                return {"problem": _problem(code, guide)}


def _start(guide: Guide) -> subprocess.Popen[bytes]:
    try:
        return start("tpctl.client.grammar_worker")
    except OSError as error:
        raise RequestError(f"{guide.name}: cannot start {sys.executable} for it: {error.strerror}") from None


def _asked(process: subprocess.Popen[bytes], guide: Guide) -> dict[str, Any] | None:
    """The worker's answer; ``None``: it has ended, or says nothing, or whoever asked was interrupted."""
    try:
        return exchange(process, guide._asdict(), SECONDS + _PATIENCE)
    except BaseException:
        close(process)
        raise


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """How a process that has said nothing ended; ``None``: it has not."""
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


def _problem(code: int | None, guide: Guide) -> str:
    """What a process that was ended by its grammar would have said.

    Raises:
        BusyError: it was ended, or stopped, by something else.
    """
    if code in (-signal.SIGABRT, NO_MEMORY):  # Rust ends so without memory
        return _TOO_LARGE
    end = "said nothing" if code is None else f"ended ({how(code)})"
    if code is None or -code not in _ITS_OWN:
        raise BusyError(
            f"{guide.name}: the process that compiled it {end}, for which it need not be the reason; try again"
        )
    return f"the process that compiled it {end}"
