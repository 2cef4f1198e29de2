"""What ties a worker to the process that started it, so that no process outlives the command line.

Two ties, because each covers what the other cannot: the kernel kills a worker whose parent dies (even one stuck in a
collective), and rank 0 reads an end of file from the socket when the command line is gone (on every system).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tpctl.wire.channel import Channel

PARENT_PID = "TPCTL_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LEAVE = 15.0  # seconds that a process may take to leave in order


def tie_to_parent() -> None:
    """Make this process die when its parent does. Call it first, before anything slow.

    On Linux the kernel does it (``prctl(2)``, PR_SET_PDEATHSIG); elsewhere a thread looks at the parent's id
    once a second. The environment's ``TPCTL_PARENT_PID`` says who the parent was, which catches one that died
    before the call.
    """
    expected = int(os.environ.get(PARENT_PID, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(expected,), daemon=True).start()
    if os.getppid() != expected:
        os._exit(1)


def tie_to_stdin() -> None:
    """Have this process sent SIGTERM when its standard input ends, and killed when that does not end it: whoever holds
    the other end, on this host or another, is gone. Nothing else may read it."""
    threading.Thread(target=_watch_stdin, daemon=True, name="tpctl-tie").start()


def connect(path: Path) -> Channel:
    """Connect to the command line's socket at ``path``.

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return Channel(sock)


def _watch_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LEAVE)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(1)
    os._exit(1)
