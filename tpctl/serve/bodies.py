"""The bodies of requests, read with limits."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope

from tpctl.errors import format_bytes, shown
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Gone
from tpctl.serve.memory import SMALL, Holding
from tpctl.serve.weight import Weight

BODY_SECONDS = 60.0
"""In which a body has to arrive."""

_PATIENCE = 4
"""Limits' worth of a body that is too long are read, so that whoever sends it hears why it is refused."""


_UNWANTED, _UNWANTED_SECONDS = 16 << 20, 5.0
"""Bytes of a body that are read though it is refused, and in how much time."""


_TAIL = 32
_HALF = re.compile(rb'\\u[dD][89abAB][0-9a-fA-F]{2}[^\\]*"[^"]*$')
"""What a body ends with that msgspec calls truncated: it looks for the other half behind the end."""


async def read_object(
    scope: Scope, receive: Receive, most: int, holding: Holding, seconds: float = BODY_SECONDS
) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Args:
        most: bytes of it.
        holding: grows by them.

    Raises:
        ApiError: it is packed, too long, too slow, no JSON, of too many values, or no object, or there is no room for
            it.
        Gone: whoever sent it hung up.
    """
    _check_encoding(scope)
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(scope, receive, most, holding)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:.0f} s") from None
    holding.body(max(Weight.of(raw).size, len(raw)), long=len(raw) > SMALL)
    if not raw.strip():
        raise ApiError(400, "the body is empty, but must be a JSON object")
    try:
        body = msgspec.json.decode(raw)
    except msgspec.MsgspecError as error:
        said = "it holds half of a surrogate pair" if _HALF.search(raw[-_TAIL:]) else error
        raise ApiError(400, f"the body is not valid JSON: {said}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply to be read") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}, but must be a JSON object")
    return body


class Heard:
    """What is received of one request, and whether its body has come whole."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._version = scope["http_version"]
        self._whole = False

    async def __call__(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._whole = True
        return message

    async def drain(self) -> None:
        """Where the connection ends with an answer, read what is left of a body that nobody wants, as far as that is
        not too much: bytes that are there and are not read would make the system drop the answer on its way."""
        headers = self._headers
        ends = self._version != "1.1" or b"close" in headers.get(b"connection", b"").lower()
        sent = b"expect" not in headers and int(headers.get(b"content-length", b"0")) <= _UNWANTED
        if self._whole or not ends or not sent:
            return
        left = _UNWANTED
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNWANTED_SECONDS):
                while left > 0 and not self._whole:
                    left -= len((await self()).get("body", b""))


def _check_encoding(scope: Scope) -> None:
    """Raise ``ApiError`` for a body that would have to be unpacked first."""
    said = b", ".join(value for name, value in scope["headers"] if name == b"content-encoding").decode("latin-1")
    if said and any(one.strip().lower() != "identity" for one in said.split(",")):
        raise ApiError(
            415,
            f"the body is packed (Content-Encoding: {said}), and this server unpacks none; send it as it is",
            code="unsupported_encoding",
        )


async def _read(scope: Scope, receive: Receive, most: int, holding: Holding) -> bytes:
    said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    announced = int(said) if said.isdigit() else 0
    found, size = [], 0
    if announced <= most * _PATIENCE:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            piece = message.get("body", b"")
            size += len(piece)
            if size <= most:
                holding.body(size, long=size > SMALL)
                found.append(piece)
            else:
                found.clear()
                holding.refused()
            if not message.get("more_body", False) or size > most * _PATIENCE:
                break
    if (size := max(size, announced)) > most:
        raise ApiError(
            413,
            f"the body has {'at least ' if not announced else ''}{format_bytes(size)}, but at most "
            f"{format_bytes(most)} are read (--max-body)",
            code="body_too_large",
        )
    return b"".join(found)
