"""The bodies of requests, read with limits."""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import re
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from tpctl.errors import format_bytes, shorten, shown
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Gone
from tpctl.serve.headers import header, headers
from tpctl.serve.memory import SMALL, Holding
from tpctl.serve.weight import Weight

BODY_SECONDS = 60.0
"""In which a body has to arrive."""

_TAIL = 32
_HALF = re.compile(rb'\\u[dD][89abAB][0-9a-fA-F]{2}[^\\]*"[^"]*$')
"""What a body ends with that msgspec calls truncated: it looks for the other half behind the end."""

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
    if raw.startswith(_MARKS):
        raise ApiError(400, "the body begins with a byte order mark (BOM); send it in UTF-8 without one")
    try:
        body = msgspec.json.decode(raw)
    except msgspec.ValidationError as error:
        if (found := _beyond(raw)) is not None:
            raise ApiError(400, found[1], param=found[0]) from None
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except msgspec.MsgspecError as error:
        said = "it holds half of a surrogate pair" if _HALF.search(raw[-_TAIL:]) else error
        raise ApiError(400, f"the body is not valid JSON: {said}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply to be read") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}, but must be a JSON object")
    return body


class _Beyond(str):
    """A number as it is written that is beyond those that a float has."""


def _number(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else _Beyond(text)


def _beyond(raw: bytes) -> tuple[str, str] | None:
    """The first field with a number that is too large for msgspec, and what is said of it; ``None``: it is not looked
    for, or not found."""
    if len(raw) > SMALL:
        return None
    try:
        body = json.loads(raw, parse_float=_number)
    except (ValueError, RecursionError):
        return None
    for name, value in body.items() if isinstance(body, dict) else ():
        left = [value]
        while left:
            one = left.pop()
            if isinstance(one, _Beyond):
                verb = "is" if one is value else "holds"
                field = shorten(name, 80)
                return field, f"{field} {verb} {shorten(one)}, but numbers are taken up to 1.8e308"
            left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return None


def _check_encoding(scope: Scope) -> None:
    """Raise ``ApiError`` for a body that would have to be unpacked first."""
    said = headers(scope, b"content-encoding").decode("latin-1")
    if said and any(one.strip().lower() != "identity" for one in said.split(",")):
        raise ApiError(
            415,
            f"the body is packed (Content-Encoding: {said}), and this server unpacks none; send it as it is",
            code="unsupported_encoding",
        )


async def _read(scope: Scope, receive: Receive, most: int, holding: Holding) -> bytes:
    said = header(scope, b"content-length") or b""
    announced = int(said) if said.isdigit() else 0
    found, size = [], 0
    while announced <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            break
        holding.body(size, long=size > SMALL)
        found.append(piece)
        if not message.get("more_body", False):
            return b"".join(found)
    found.clear()
    holding.refused()
    raise ApiError(
        413,
        f"the body has {'' if announced else 'at least '}{format_bytes(max(size, announced))}, but at most "
        f"{format_bytes(most)} are read (--max-body)",
        code="body_too_large",
    )
