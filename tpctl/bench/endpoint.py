"""A server with OpenAI's interface, as a client sees it: its address, its connections, what it says it has."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tpctl.bench.http import Response
from tpctl.errors import EndpointError, UsageError, printable, shorten

CONNECT_SECONDS = 30.0
"""In which a connection has to be there."""

MOST_BODY = 16 << 20
"""Bytes of an answer that does not stream."""

_MESSAGE = 300  # characters of what a server says went wrong

Clock = Callable[[], float]
Take = Callable[[float, bytes], None]


@dataclass(frozen=True)
class Address:
    """Where a server is: ``base`` is what stands before ``/v1`` of its paths."""

    host: str
    port: int
    secure: bool
    base: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ``UsageError`` where it is none."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = url.isascii() and url.isprintable() and " " not in url
        more = parts.username or parts.password or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or more or not plain:
            raise UsageError(f"--url {shorten(url, 100)} is no address such as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(str(parts.hostname), port or (443 if secure else 80), secure, base)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.base}"


class Endpoint:
    """Connections to a server, which are kept for the next request.

    Every error is an ``EndpointError`` whose message begins with the address.
    """

    def __init__(self, address: Address, api_key: str | None = None, clock: Clock = time.perf_counter) -> None:
        self.address = address
        self.clock = clock
        key = "" if api_key is None else f"authorization: Bearer {api_key}\r\n"
        host = str(address).partition("://")[2].partition("/")[0]
        self._head = f"host: {host}\r\n{key}user-agent: tpctl\r\n"
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._tls = ssl.create_default_context() if address.secure else None

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()

    def post(self, path: str, body: bytes) -> bytes:
        """A request with ``body``, JSON, as it is sent."""
        head = f"POST {self.address.base}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def get(self, path: str) -> bytes:
        return f"GET {self.address.base}{path} HTTP/1.1\r\n{self._head}\r\n".encode()

    async def ask(self, request: bytes, take: Take, response: Response | None = None) -> Response:
        """Send a request, and hand what comes of the answer's body to ``take``, with the time at which it came.

        Args:
            response: filled as the head comes, so that ``take`` can look at it.

        Raises:
            EndpointError: there is no connection, or no whole answer.
        """
        response = response or Response()
        while True:
            connection, kept = (self._idle.pop(), True) if self._idle else (await self._connect(), False)
            try:
                await connection.ask(request, response, take)
            except _Stale:  # it was closed before it heard of this
                if kept:
                    continue
                raise EndpointError(f"{self.address} closed the connection without an answer") from None
            except EndpointError as error:
                raise EndpointError(f"{self.address} {error}") from None
            if response.keep and connection.alive:
                self._idle.append(connection)
            else:
                connection.abort()
            return response

    async def whole(self, request: bytes, seconds: float = CONNECT_SECONDS) -> tuple[Response, bytes]:
        """An answer that does not stream. Raises ``EndpointError``, too, if it takes longer."""
        pieces: list[bytes] = []

        def take(now: float, piece: bytes) -> None:
            pieces.append(piece)
            if sum(map(len, pieces)) > MOST_BODY:
                raise EndpointError(f"answered with more than {MOST_BODY} bytes")

        try:
            async with asyncio.timeout(seconds):
                response = await self.ask(request, take)
        except TimeoutError:
            raise EndpointError(f"{self.address} did not answer within {seconds:g} s") from None
        return response, b"".join(pieces)

    async def model(self, wanted: str | None) -> str:
        """What to call the model: ``wanted``, or the first that the server has.

        Raises:
            EndpointError: it has none, or not that one, or does not say.
        """
        response, body = await self.whole(self.get("/v1/models"))
        if response.status == 404 and wanted is not None:
            return wanted  # a server without a list
        if response.status != 200:
            raise EndpointError(f"{self.address}/v1/models: {refusal(response, body)}")
        try:
            names = [one["id"] for one in json.loads(body)["data"]]
        except (ValueError, TypeError, KeyError):
            raise EndpointError(f"{self.address}/v1/models is no list of models; is that an OpenAI endpoint?") from None
        if wanted is None and names:
            return str(names[0])
        if not names or wanted not in names:
            known = shorten(", ".join(map(str, names)), _MESSAGE) or "none"
            which = "no model" if wanted is None else f"no model {wanted}"
            raise EndpointError(f"{self.address} has {which}; it has {known}")
        return str(wanted)

    async def _connect(self) -> _Connection:
        address, loop = self.address, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self.clock, self._gone), address.host, address.port, ssl=self._tls
                )
        except TimeoutError:
            raise EndpointError(f"cannot connect to {address}: no answer within {CONNECT_SECONDS:.0f} s") from None
        except ssl.SSLError as error:
            raise EndpointError(f"cannot connect to {address}: {_tls_reason(error)}") from None
        except OSError as error:
            raise EndpointError(f"cannot connect to {address}: {_reason(error)}; is a server there (--url)?") from None
        self._all.add(connection)
        return connection

    def _gone(self, connection: _Connection) -> None:
        self._all.discard(connection)
        with suppress(ValueError):
            self._idle.remove(connection)


class _Stale(Exception):
    """A connection was closed before a byte of the answer came."""


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self, clock: Clock, gone: Callable[[_Connection], None]) -> None:
        self.alive = False
        self._clock = clock
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._take: Take = lambda now, body: None
        self._begun = False
        self._waiting: asyncio.Future[None] | None = None

    async def ask(self, request: bytes, response: Response, take: Take) -> None:
        """Raises ``EndpointError`` without the address, or ``_Stale``."""
        if self._transport is None or not self.alive:
            raise _Stale
        self._response, self._take, self._begun = response, take, False
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._waiting
        except BaseException:
            self.abort()
            raise
        finally:
            self._response = self._waiting = None

    def abort(self) -> None:
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.alive = True

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        response = self._response
        if response is None:
            return self.abort()  # nothing was asked
        self._begun = True
        try:
            if body := response.feed(data):
                self._take(now, body)
        except EndpointError as error:
            return self._end(error)
        if response.ended:
            self._end(None)
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        if (response := self._response) is not None and not response.ended:
            error: Exception | None = None
            try:
                response.close()
            except EndpointError as found:
                error = found
            self._end(error if self._begun else _Stale())
        self._gone(self)

    def _end(self, error: Exception | None) -> None:
        if self._waiting is None or self._waiting.done():
            return
        if error is None:
            self._waiting.set_result(None)
        else:
            self._waiting.set_exception(error)


def refusal(response: Response, body: bytes) -> str:
    """What an answer that is no success says, in one line: its status, and the message of its error."""
    said = message_of(body)
    if not said and (place := response.headers.get("location")) is not None:
        said = f"it is at {place}"
    advice = " (--api-key, or TPCTL_API_KEY)" if response.status == 401 else ""
    return f"status {response.status}{': ' + said if said else ''}{advice}"


def message_of(body: bytes) -> str:
    """The message of an error: OpenAI's form, FastAPI's, or the text itself."""
    text = body[: 8 * _MESSAGE].decode(errors="replace")
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        found = text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if not isinstance(found, str):
        found = json.dumps(found, ensure_ascii=False)
    return shorten(printable(" ".join(found.split())), _MESSAGE)


def _tls_reason(error: ssl.SSLError) -> str:
    said = getattr(error, "verify_message", "") or (error.reason or str(error)).lower().replace("_", " ")
    return f"TLS: {said}; is it http:// (--url)?"


def _reason(error: OSError) -> str:
    """In the system's words; asyncio has its own, and of several addresses all of them."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return shorten(" ".join((error.strerror or str(error)).split()), 200)
