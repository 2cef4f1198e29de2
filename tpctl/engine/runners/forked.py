"""Processes forked from this one, which share what it has imported, and end when it does."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpctl.launch.lifeline import PARENT_PID, tie_to_parent

MOST_BYTES = 1 << 17
"""Of a message."""
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_AT_ONCE = 2
"""Calls that a process is given: while it is at one, the next is there for it."""


def live(parent: int, work: Callable[[], None]) -> None:
    """Do ``work`` in a process that was just forked from ``parent``, and end; never returns. Signals end it, and the
    kernel takes it before others where memory gets short. What it raises is one line on stderr."""
    try:
        os.environ[PARENT_PID] = str(parent)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        tie_to_parent()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):
            _OOM_SCORE.write_text("800")
        work()
    except BaseException as failed:  # the rank goes on without
        said = str(failed).splitlines()
        print(f"compiling ahead: {type(failed).__name__}{': ' + said[0] if said else ''}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


class Pool:
    """Up to ``most`` processes that call ``work``, forked as there is work for them and room for processes. ``work``
    raises where it fails; ``ended`` is called here as often as it has returned or raised."""

    def __init__(self, work: Callable[..., object], most: int, ended: Callable[[], object] = lambda: None) -> None:
        self._work, self._most, self._ended = work, most, ended
        self._waiting: deque[bytes] = deque()
        self._processes: list[_Process] = []
        self._failed = 0

    def put(self, *arguments: Any) -> None:
        """Have ``work`` called with these, as JSON keeps them; waits for nothing."""
        self._waiting.append(json.dumps(arguments).encode())
        self._go_on(0.0)

    def join(self) -> int:
        """Wait for all of it; how many failed."""
        self._go_on(0.0)
        while any(process.calls for process in self._processes):
            self._go_on(None)
        for process in self._processes:
            process.socket.close()
        for process in self._processes:
            os.waitpid(process.pid, 0)
        return self._failed + len(self._waiting)  # there was room for no process

    def _go_on(self, timeout: float | None) -> None:
        """Hear what has ended, and hand out what waits."""
        busy = [process for process in self._processes if process.calls]
        for process in select.select(busy, [], [], timeout)[0] if busy else ():
            self._hear(process)
        while self._waiting and (free := self._free()) is not None:
            try:
                free.socket.send(self._waiting[0], socket.MSG_DONTWAIT)
            except BlockingIOError:  # it has as many bytes to read as a socket keeps
                break
            except OSError:
                self._lose(free)
            else:
                self._waiting.popleft()
                free.calls += 1

    def _free(self) -> _Process | None:
        """One with nothing to do, else a new one, else one that has only what it is at."""
        least = min(self._processes, key=lambda process: process.calls, default=None)
        if (least is None or least.calls) and len(self._processes) < self._most:
            with suppress(OSError):  # too many processes, or too little memory
                return self._fork()
        return least if least is not None and least.calls < _AT_ONCE else None

    def _hear(self, process: _Process) -> None:
        said = b""
        with suppress(OSError):
            said = process.socket.recv(1)
        if not said:
            self._lose(process)
            return
        process.calls -= 1
        self._failed += said != b"1"
        self._ended()

    def _lose(self, process: _Process) -> None:
        """It has ended before its time, and what it was given is lost with it."""
        self._processes.remove(process)
        self._failed += process.calls
        process.socket.close()
        os.waitpid(process.pid, 0)

    def _fork(self) -> _Process:
        parent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if not pid:
                for process in self._processes:  # which hear by its end that this one's parent is done
                    process.socket.close()
                ours.close()
                live(parent, lambda: self._serve(theirs))
        self._processes.append(_Process(pid, ours))
        return self._processes[-1]

    def _serve(self, parent: socket.socket) -> None:
        while message := parent.recv(MOST_BYTES):
            try:
                self._work(*json.loads(message))
                said = b"1"
            except Exception:
                said = b"0"
            parent.send(said)


class _Process:
    """One of a pool. ``calls``: what it was given and has not ended."""

    def __init__(self, pid: int, socket: socket.socket) -> None:
        self.pid = pid
        self.socket = socket
        self.calls = 0

    def fileno(self) -> int:
        return self.socket.fileno()
