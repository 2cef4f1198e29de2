"""A client that soak tests of a server ask with, and what they wait for between two rounds."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any, NamedTuple

from tests.distributed.server_process import PATIENCE, ServerProcess
from tests.distributed.soak_checks import children, unchunked


def request(body: Any, path: str = "/v1/completions", more: str = "connection: close\r\n") -> bytes:
    """``more``: headers besides."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(raw)}\r\n\r\n".encode() + raw


async def connected(server: ServerProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), limit=1 << 20)


async def answer(server: ServerProcess, raw: bytes) -> bytes:
    """What comes until the server closes the connection."""
    reader, writer = await connected(server)
    writer.write(raw)
    found = await reader.read()
    while piece := await reader.read(1 << 20):
        found += piece
    writer.close()
    return found


async def given_up(server: ServerProcess, raw: bytes, after: float) -> None:
    """Ask, and hang up after so many seconds."""
    with suppress(ConnectionError):
        reader, writer = await connected(server)
        writer.write(raw)
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1 << 20), after)
        writer.transport.abort()


class Heard(NamedTuple):
    """What a response to one request says.

    Attributes:
        status: of an error that broke off a stream the one that it would have had.
        text: of its one answer; of an error its message.
        calls: names and arguments of functions.
        reason: why the answer ended; "": it did not.
    """

    status: int
    text: str
    calls: list[tuple[str, str]]
    reason: str


def heard(raw: bytes) -> Heard:
    """Of a completion or a chat, whole or as events. Raises ``ValueError``: it is neither whole nor an error."""
    head, _, body = raw.partition(b"\r\n\r\n")
    try:
        status = int(head.split()[1])
        if b"chunked" not in head.lower():
            said = json.loads(body)
            if "error" in said:
                return Heard(status, said["error"]["message"], [], "")
            return Heard(status, *_choice([said]))
        *events, last, rest = unchunked(body).decode().removesuffix("data: [DONE]\n\n").split("\n\n")
        found = [json.loads(event.removeprefix("data: ")) for event in (*events, last)]
        ended = body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        if not rest and not ended and "error" in found[-1]:
            error = found[-1]["error"]
            own = 400 if error["type"] == "invalid_request_error" else 500
            return Heard(503 if error["code"] in ("busy", "ended") else own, error["message"], [], "")
        if rest or not ended:
            raise ValueError("a stream does not end")
        return Heard(status, *_choice(found))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{error!r} in {raw[:300]!r} … {raw[-300:]!r}") from None


def _choice(chunks: list[Any]) -> tuple[str, list[tuple[str, str]], str]:
    """Text, calls and end of the answer that chunks have together; of a whole one there is one."""
    text, reason, calls = "", "", {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        part = choice.get("delta") or choice.get("message") or choice
        text += part.get("content") or part.get("text") or ""
        for at, call in enumerate(part.get("tool_calls") or ()):
            name, arguments = calls.get(call.get("index", at), ("", ""))
            function = call["function"]
            calls[call.get("index", at)] = (function.get("name") or name, arguments + (function.get("arguments") or ""))
        reason = choice["finish_reason"] or reason
    return text, list(calls.values()), reason


def free(server: ServerProcess) -> None:
    """Wait until the engine holds nothing; it checks its books when it is asked while idle."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = server.counters()
        if not found["tpctl_requests_open"] and not found['tpctl_kv_cache_usage_ratio{engine="0"}']:
            return
        time.sleep(0.2)
    raise SystemExit(f"blocks are held: {found}")


def idle(server: ServerProcess, seconds: float = 0.5) -> None:
    """Wait until no thread of the server's and of its children's is at work any more."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = _processor(server)
        time.sleep(seconds)
        if before == (now := _processor(server)) or (before.keys() == now.keys() and _rest(before, now) < 0.05):
            return
    raise SystemExit(f"something is still at work: {before}, {now}")


def _processor(server: ServerProcess) -> dict[int, float]:
    """Seconds that each process has computed."""
    found = {}
    for pid in (server.process.pid, *children(server)):
        with suppress(OSError):  # it has ended
            found[pid] = server.processor_seconds(pid)
    return found


def _rest(before: dict[int, float], now: dict[int, float]) -> float:
    return sum(now.values()) - sum(before.values())
