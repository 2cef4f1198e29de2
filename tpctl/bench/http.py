"""HTTP/1.1 as a client that measures needs it: bytes in, a response out, and nothing between them that takes time.

Of RFC 9112 what servers' answers are made of: bodies in chunks, of a known length, or up to the connection's end. There
is no compression (none is asked for) and no following of redirects.
"""

from __future__ import annotations

from tpctl.errors import EndpointError

MOST_HEAD = 64 << 10
"""Bytes of a response's head, and of a line between its chunks."""


class Response:
    """A response as its bytes come.

    Attributes:
        status: 0 until the head is there.
        headers: by their names in small letters.
        ended: all of it has come.
        keep: another request may be sent on its connection then.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
        self.keep = True
        self._rest = b""  # what has come and could not be read yet
        self._left = 0  # bytes of the body, or of its chunk, that are to come
        self._chunked = self._until_close = False
        self._between = self._trailers = False  # behind a chunk's data; behind the last chunk

    def feed(self, data: bytes) -> bytes:
        """Take what has come, and return what of the body is in it.

        Raises:
            EndpointError: it is no HTTP/1.1 response.
        """
        if not self.status:
            data = self._head(data)
            if not self.status or self.ended:
                return b""
        if self._chunked:
            return self._pieces(data)
        if self._until_close:
            return data
        if len(data) > self._left:
            raise EndpointError("sent more than its content-length says")
        self._left -= len(data)
        self.ended = self._left == 0
        return data

    def close(self) -> None:
        """The connection has ended.

        Raises:
            EndpointError: the response has not.
        """
        if not self.status:
            raise EndpointError("closed the connection without an answer")
        if not self.ended and not self._until_close:
            raise EndpointError("closed the connection before its answer ended")
        self.ended = True
        self.keep = False

    def _head(self, data: bytes) -> bytes:
        """Read the head, once all of it is there; returns what comes behind it."""
        data = self._rest + data
        while True:
            head, found, behind = data.partition(b"\r\n\r\n")
            if not found:
                if len(data) > MOST_HEAD or not b"HTTP/1.".startswith(data[:7]):
                    raise EndpointError("sent what is no HTTP/1.1 response")
                self._rest = data
                return b""
            status = self._status(head)
            if not 100 <= status < 200:
                break
            data = behind  # an interim response: the real one follows
        self._rest = b""
        self.status = status
        self._measure()
        return behind

    def _status(self, head: bytes) -> int:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.0", "HTTP/1.1") or not (code.isascii() and code.isdigit() and len(code) == 3):
            raise EndpointError("sent what is no HTTP/1.1 response")
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
        connection = self.headers.get("connection", "").lower()
        self.keep = "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection
        return int(code)

    def _measure(self) -> None:
        """How long the body is."""
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self.ended = True
        elif (coding := self.headers.get("transfer-encoding")) is not None:
            if coding.lower() != "chunked":
                raise EndpointError(f"sent a body with transfer-encoding {coding!r}, which nobody asked for")
            self._chunked = True
        elif length is None:
            self._until_close = True
            self.keep = False
        elif not (length.isascii() and length.isdigit()) or len(length) > 18:
            raise EndpointError(f"sent content-length {length!r}, which is no number")
        else:
            self._left = int(length)
            self.ended = self._left == 0

    def _pieces(self, data: bytes) -> bytes:
        """The data of the chunks."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        found, place = [], 0
        while not self.ended:
            if self._left:
                piece = data[place : place + self._left]
                if not piece:
                    break
                found.append(piece)
                place += len(piece)
                self._left -= len(piece)
                self._between = not self._left
                continue
            if (end := data.find(b"\r\n", place)) < 0:
                self._rest = data[place:]
                if len(self._rest) > MOST_HEAD:
                    raise EndpointError("sent a chunk whose length has no end")
                break
            line, place = data[place:end], end + 2
            self._line(line)
        return b"".join(found)

    def _line(self, line: bytes) -> None:
        """A line between chunks: the end of one's data, the next one's length, or what comes behind the last one."""
        if self._trailers:
            self.ended = not line
        elif self._between:
            if line:
                raise EndpointError("sent a chunk that is longer than it says")
            self._between = False
        else:
            digits = line.partition(b";")[0].strip()
            if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
                raise EndpointError("sent a chunk without a length")
            self._left = int(digits, 16)
            self._trailers = not self._left


class Events:
    """Server-sent events as the body that they are sent in comes (WHATWG HTML, 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that have become whole."""
        body = self._rest + body if self._rest else body
        if b"\r" in body:
            body, held = (body[:-1], b"\r") if body.endswith(b"\r") else (body, b"")
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *whole, self._rest = body.split(b"\n\n")
        return [data for event in whole if (data := _data(event)) is not None]


def _data(event: bytes) -> bytes | None:
    """What an event's ``data`` fields hold; ``None`` where it has none, as comments that keep a connection alive."""
    if event.startswith(b"data: ") and b"\n" not in event:  # as nearly all are
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
