"""A connection: uvicorn's with h11, whichever else is installed, and what it takes of those who do not keep to HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tpctl.errors import again
from tpctl.serve.errors import ApiError
from tpctl.serve.heads import checked
from tpctl.serve.lingering import Lingering
from tpctl.serve.sockets import LOOK_SECONDS, Peer
from tpctl.serve.straight import STATE

HEAD_SECONDS = 30.0
"""In which the head of a request has to arrive, and between two requests of a connection."""

_AHEAD = 1 << 16
"""Bytes that are taken in while a request is under way that stands before them."""

_OVER = frozenset((h11.MUST_CLOSE, h11.CLOSED, h11.ERROR))
"""States of a client from which nothing more is taken."""


class Connection(H11Protocol):
    """Differs from uvicorn's in this:

    - The head of a request has a limit of time, else whoever sends half of one stays.
    - It goes on being read when something comes behind a request that is under way, else nobody sees that it ends.
    - One whose other end does not answer any more is ended, while one that only takes nothing is kept.
    - What comes behind a request that is the last one is dropped, as are empty lines before any (RFC 9112, 2.2).
    - What is no HTTP is answered in OpenAI's form, and only where no answer has begun.
    - It is closed only once its client has ended it, or is silent (``serve.lingering``).

    A client that ends its sending side is taken for gone, as by uvicorn: one that closes the connection looks the same.
    """

    _deadline: asyncio.TimerHandle | None = None
    _next_look: asyncio.TimerHandle

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn: _Requests = _Requests()

    def connection_made(self, transport: Any) -> None:
        self._lingering = Lingering(transport, self._lingers)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        # The scopes of its requests have a copy of it. It holds no circle, which only a collection would end.
        self.app_state: dict[str, Any] = {STATE: weakref.ref(self)}
        self._peer = Peer(transport.get_extra_info("socket"))
        self._look_again()
        self._look()

    def data_received(self, data: bytes) -> None:
        if self._lingering.closed:
            self._lingering.drop()
            return
        if self.conn.their_state in _OVER:
            return
        super().data_received(data)
        under_way = self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)
        if under_way and self.flow.read_paused and len(self.conn.trailing_data[0]) < _AHEAD:
            self.flow.resume_reading()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. ``msg`` is uvicorn's; what h11 said tells more.

        An answer that has begun is told to its end, and the connection ends behind it.
        """
        if self.conn.our_state is h11.SEND_BODY:
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer before was the last one
            self.transport.close()
            return
        error = self.conn.refusal()
        body = error.body()
        headers = [*error.headers(), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        headers.append((b"date", formatdate(usegmt=True).encode()))
        reason = HTTPStatus(error.status).phrase.encode()
        said: tuple[h11.Event, ...] = (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in said))
        if self.cycle is not None and not self.cycle.response_complete:  # whose body will not come
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._next_look):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._lingering.lost()

    def shutdown(self) -> None:
        """The server ends: so does this, behind the answer that is under way."""
        self._lingering.hurry()
        super().shutdown()

    def _lingers(self) -> bool:
        """Whether its client may be sending still: not between two requests."""
        return not self.conn.ended_idle and self.conn.their_state not in (h11.IDLE, h11.CLOSED)

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if not idle and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif idle and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _look_again(self) -> None:
        self._next_look = self.loop.call_later(LOOK_SECONDS, self._look_at_peer)

    def _look_at_peer(self) -> None:
        with contextlib.suppress(OSError):  # it has been lost, which is told next
            if self._peer.gone(self.loop.time()):
                return self.transport.abort()
        return self._look_again()


class _Requests(h11.Connection):
    """h11's, which calls an empty line before a request wrong. Many clients send one behind a body.

    Heads are ``checked``.

    Attributes:
        ended_idle: whether the server ended it between two requests.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._wrong: h11.RemoteProtocolError | None = None
        self.ended_idle = False

    def send(self, event: Any) -> Any:
        if type(event) is h11.ConnectionClosed and self.our_state is h11.IDLE is self.their_state:
            self.ended_idle = True  # the states do not say so afterwards
        return super().send(event)

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE is self.our_state:
            rest, _ = self.trailing_data
            if rest.startswith((b"\r", b"\n")):
                super().__init__(h11.SERVER)  # the only way to be rid of what it has taken in
                if rest := rest.lstrip(b"\r\n"):  # nothing would be an end
                    self.receive_data(rest)
        try:
            event = super().next_event()
            return checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self._wrong = again(error)
            error.__traceback__ = None  # h11's frames hold it and this: a circle, which only a collection would end
        raise again(self._wrong)

    def refusal(self) -> ApiError:
        """What is wrong with what came."""
        said, status = (str(self._wrong), self._wrong.error_status_hint) if self._wrong else ("", 400)
        return ApiError(status, f"what was sent is no HTTP that this server reads: {said}")
