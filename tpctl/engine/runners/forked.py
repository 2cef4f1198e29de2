"""Processes forked from this one, which share what it has imported, and end when it does."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpctl.launch.lifeline import PARENT_PID, tie_to_parent

MOST_BYTES = 1 << 17
"""Of a message."""
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_LOOK = 0.5  # seconds between looks at whether processes are alive


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
        self._pids: list[int] = []
        # Each message is received by one of them.
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pending = self._failed = 0

    def put(self, *arguments: Any) -> None:
        """Have ``work`` called with these, as JSON keeps them; waits where many calls are waiting already."""
        if len(self._pids) < min(self._most, self._pending + 1):
            with suppress(OSError):  # too many processes, or too little memory
                self._fork()
        message = json.dumps(arguments).encode()
        self._pending += 1
        while self._pids:
            readable, writable, _ = select.select([self._ours], [self._ours], [], _LOOK)
            if readable:
                self._hear()
            elif writable:
                self._ours.send(message)
                return
            else:
                self._reap()

    def join(self) -> int:
        """Wait for all of it; how many failed."""
        while self._pending and self._pids:
            if select.select([self._ours], [], [], _LOOK)[0]:
                self._hear()
            else:
                self._reap()
        self._ours.close()
        self._theirs.close()
        for pid in self._pids:
            os.waitpid(pid, 0)
        return self._failed + self._pending

    def _hear(self) -> None:
        self._failed += self._ours.recv(1) != b"1"
        self._pending -= 1
        self._ended()

    def _reap(self) -> None:
        """Forget processes that have ended before their time, each with what it was at."""
        for pid in list(self._pids):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._pids.remove(pid)
                self._pending -= 1
                self._failed += 1

    def _fork(self) -> None:
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            self._ours.close()
            live(parent, self._loop)
        self._pids.append(pid)

    def _loop(self) -> None:
        while message := self._theirs.recv(MOST_BYTES):
            try:
                self._work(*json.loads(message))
                self._theirs.send(b"1")
            except Exception:
                self._theirs.send(b"0")
