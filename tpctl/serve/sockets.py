"""The socket that a server listens at, and how many connections there may be. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import struct
from typing import Protocol

from tpctl.errors import UsageError

BACKLOG = 2048
"""Connections that may wait until they are taken."""

_PROBE_AFTER, _PROBE_EVERY, _PROBES = 60, 15, 4  # seconds, seconds, count: for a client whose host is gone

LOOK_SECONDS = 15.0
"""Between two looks at whether the other end of a connection answers."""
_SILENT_SECONDS = 120.0

_INFO = struct.Struct("=2xBB20xI28xI")
"""Of Linux' ``struct tcp_info``: retransmissions and probes without an answer, segments that are not acknowledged,
milliseconds since anything was."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; others can connect once a server listens.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        said = f"--host {host}: {error.strerror or error}"
        raise UsageError(f"{said}; give a name or an address of this host alone, and the port as --port") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # which connections take over
        for name, value in (
            ("TCP_KEEPIDLE", _PROBE_AFTER),
            ("TCP_KEEPINTVL", _PROBE_EVERY),
            ("TCP_KEEPCNT", _PROBES),
        ):
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UsageError(_refusal(host, port, error)) from None
    return sock


def take(sock: socket.socket) -> None:
    """Let others connect: until then several may be bound to one port.

    Raises:
        UsageError: another server was first.
    """
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise UsageError(_refusal(host, port, error)) from None


class Sockopts(Protocol):
    """As much of a socket as is used here."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


class Peer:
    """Whether the host at the other end of a connection answers.

    While nothing is sent the system's own probes find that out; for an answer to what is sent it waits a quarter of an
    hour. With ``TCP_USER_TIMEOUT`` it waits as long as that says, but then (Linux 5.11) ends connections whose reader
    takes nothing for so long, too, though its host answers whenever it is asked for room. So it is looked at here.
    """

    def __init__(self, sock: Sockopts) -> None:
        self._sock = sock
        self._since: float | None = None  # when it was first seen that an answer is due

    def gone(self, now: float) -> bool:
        """Whether an answer has been due for two minutes. Raises ``OSError``: the connection is closed.

        ``now``: seconds of a clock that goes evenly. It is to be called again and again.
        """
        raw = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        *due, silent = _INFO.unpack(raw)
        if not any(due) or (self._since is not None and now - silent / 1000 > self._since):
            self._since = None
        if any(due) and self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= _SILENT_SECONDS


def _refusal(host: str, port: int, error: OSError) -> str:
    """Which of the two cannot be had."""
    said = error.strerror or str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return f"--host {host} --port {port}: {said}; give another --port, or 0 for any"
        case errno.EACCES | errno.EPERM:
            return f"--port {port}: {said}; ports below 1024 are mostly root's, give a higher one, or 0 for any"
        case errno.EADDRNOTAVAIL:
            return f"--host {host}: {said}; give an address of this host, or 0.0.0.0 for all of them"
    return f"--host {host} --port {port}: {said}"


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """A connection is an open file, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or hard == resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
