"""Whether this machine can talk to itself, as ranks must who are to form a group."""

from __future__ import annotations

import socket

from tpctl.errors import EngineError

_ADDRESS = "127.0.0.1"
_TIMEOUT = 10.0  # seconds; the kernel answers by itself, unless a filter swallows what is sent


def require_loopback() -> None:
    """Connect to a port of this machine. Without this, torch's rendezvous tries for minutes.

    Raises:
        EngineError: that is impossible, as in a network namespace whose loopback interface was never brought up.
    """
    try:
        with socket.create_server((_ADDRESS, 0), backlog=1) as server:
            socket.create_connection(server.getsockname(), timeout=_TIMEOUT).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise EngineError(
            f"ranks talk to each other over the loopback interface, and {_ADDRESS} cannot be reached ({why}); "
            "bring it up (ip link set lo up), or use --tp 1"
        ) from None
