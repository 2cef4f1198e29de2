"""The socket that a server listens at, and how many connections there may be. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket

from tpctl.errors import UsageError

BACKLOG = 2048
"""Connections that may wait until they are taken."""

_PROBE_AFTER, _PROBE_EVERY, _PROBES = 60, 15, 4  # seconds, seconds, count: for a client whose host is gone


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
            ("TCP_USER_TIMEOUT", 1000 * (_PROBE_AFTER + _PROBES * _PROBE_EVERY)),
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
