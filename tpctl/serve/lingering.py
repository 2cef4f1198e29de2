"""A connection's end that does not take back the last answer (RFC 9112, 9.6).

Bytes that come after a socket was closed, or lie in it unread, make the system reset the connection, and whoever is
still sending them sees that before the answer. So the sending side ends first, and what comes is read and dropped,
until the client ends the connection, is silent, or time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

SILENT_SECONDS = 2.0
"""For which a client may send nothing, once its last answer was written."""

LONGEST_SECONDS = 30.0
"""In which a client may go on sending."""

ENDING_SECONDS = 0.3
"""The same, and for silence, once the server itself is ending."""


class Lingering:
    """asyncio's transport, whose ``close`` asks ``wanted`` whether to linger.

    Attributes:
        closed: whether ``close`` was called, and what comes is to be told to ``drop``.
    """

    def __init__(self, transport: Any, wanted: Callable[[], bool]) -> None:
        self.write = transport.write  # for each token
        self.is_closing = transport.is_closing
        self.closed = False
        self._transport = transport
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._ends = 0.0
        self._hurried = False
        self._dropped = False  # something since it was looked for
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self.closed:
            return
        if self._transport.is_closing() or not self._wanted():
            self._transport.close()
            return
        self.closed, self.is_closing = True, lambda: True
        self._transport.resume_reading()
        try:
            self._transport.write_eof()  # behind what is still to be written
        except OSError:  # the other end has gone
            self._transport.close()
            return
        self._ends = self._loop.time() + (ENDING_SECONDS if self._hurried else LONGEST_SECONDS)
        self._wait()

    def hurry(self) -> None:
        """Wait for little more, from now on, whether this lingers or will."""
        self._hurried = True
        if self._timer is not None:
            self._timer.cancel()
            self._ends = min(self._ends, self._loop.time() + ENDING_SECONDS)
            self._wait()

    def drop(self) -> None:
        """Something came that nobody reads any more."""
        self._dropped = True

    def lost(self) -> None:
        """The connection is closed: leave no timer, and no circle that only a collection would end."""
        if self._timer is not None:
            self._timer.cancel()
        self._wanted = _never

    def _wait(self) -> None:
        self._dropped = False
        self._timer = self._loop.call_later(ENDING_SECONDS if self._hurried else SILENT_SECONDS, self._look)

    def _look(self) -> None:
        if self._dropped and self._loop.time() < self._ends:
            self._wait()
        else:
            self._transport.close()


def _never() -> bool:
    return False
