"""Chunks of a body written to their connection at once.

ASGI's ``send`` is awaited, so that each token of each stream would wake a task, and pass through the server's HTTP
library: half of what a token costs. Where a response has begun in chunks (RFC 9112, 7.1) and its reader keeps up,
the next chunk is a write to the transport.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from starlette.types import Scope

STATE = "tpctl.connection"
"""Where in a scope's state a server leaves a weak reference to the connection that a request came by."""


class Flow(Protocol):
    """As much of uvicorn's flow control as is used here."""

    write_paused: bool

    async def drain(self) -> None: ...


class Connection(Protocol):
    """As much of a connection of uvicorn's as is used here."""

    transport: Any
    flow: Flow


class Straight:
    """Writes chunks of one response's body."""

    def __init__(self, connection: Connection) -> None:
        self._transport, self._flow = connection.transport, connection.flow

    @property
    def open(self) -> bool:
        """Whether what was written before has gone, so that more may be."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, data: bytes) -> None:
        if data:  # a chunk of nothing would be the last one
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def straight(scope: Scope) -> Straight | None:
    """To write the response to a request; ``None``: its body is in no chunks, or the server has no such way."""
    connection = _connection(scope)
    return None if connection is None or scope["http_version"] != "1.1" else Straight(connection)


async def gone_out(scope: Scope) -> None:
    """Wait until the response to a request is the system's to send, all but a little, or its connection has ended.

    ASGI's ``send`` waits before it writes, not behind it, so that a body that is sent as one would wait in this process
    for a reader of whom nobody knows any more.
    """
    if (connection := _connection(scope)) is not None:
        await connection.flow.drain()


def _connection(scope: Scope) -> Connection | None:
    found: weakref.ref[Connection] | None = scope.get("state", {}).get(STATE)
    return None if found is None else found()
