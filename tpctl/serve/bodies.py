"""The bodies of requests, read with limits."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from tpctl.errors import format_bytes, shown
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Gone

BODY_SECONDS = 60.0
"""In which a body has to arrive."""

_PATIENCE = 4
"""Limits' worth of a body that is too long are read, so that whoever sends it hears why it is refused."""


async def read_object(scope: Scope, receive: Receive, most: int, seconds: float = BODY_SECONDS) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Args:
        most: bytes of it.

    Raises:
        ApiError: it is too long, too slow, no JSON, or no object.
        Gone: whoever sent it hung up.
    """
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(scope, receive, most)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:.0f} s") from None
    try:
        body = msgspec.json.decode(raw)
    except msgspec.MsgspecError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply to be read") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}, but must be a JSON object")
    return body


async def _read(scope: Scope, receive: Receive, most: int) -> bytes:
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
                found.append(piece)
            else:
                found.clear()
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
