"""A connection whose other end answers no more, and what the system knows of it."""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest

from tpctl.serve import connection, sockets

_ATTACH_FILTER = 26  # SO_ATTACH_FILTER, which Python has no name for


def deafen(sock: socket.socket) -> None:
    """Have the system drop all that comes for a socket, so that it acknowledges nothing: as if its host were gone."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # of the packet filter: return 0
    sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop)))


def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds in the place of two minutes."""
    for name in ("_PROBE_AFTER", "_PROBE_EVERY", "_PROBES"):
        monkeypatch.setattr(sockets, name, 1)
    monkeypatch.setattr(sockets, "_SILENT_SECONDS", 2.0)
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.25)


def doublings(sock: socket.socket) -> int:
    """How often the system has doubled the time between two questions whether there is room (``tcpi_backoff``)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[4]
