"""A server with OpenAI's interface that answers as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """A response: pieces of its body, each in a chunk and a write of its own.

    Attributes:
        cut: the connection is closed before the body has ended.
        stall: nothing more comes after the pieces, and the connection stays.
        raw: all that is sent, in the place of a response.
    """

    pieces: Sequence[bytes] = ()
    status: int = 200
    kind: str = "text/event-stream"
    headers: str = ""
    cut: bool = False
    stall: bool = False
    raw: bytes | None = None


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def usage(prompt: int, completion: int) -> dict[str, Any]:
    found = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"choices": [], "usage": found}


def text(piece: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": reason}]}


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def completed(body: dict[str, Any], *, counted: bool = True) -> Reply:
    """An answer of ``max_tokens`` tokens, in the form of the request."""
    count, prompt = body["max_tokens"], body.get("prompt")
    if prompt is None:
        chunks = [delta(role="assistant", content=""), *[delta(content=" a")] * count, delta("length")]
        length = len(body["messages"][-1]["content"].split())
    else:
        chunks = [*[text(" a")] * count, text("", "length")]
        length = len(prompt.split() if isinstance(prompt, str) else prompt)
    ended = [usage(length, count)] if counted else []
    return Reply([*map(event, [*chunks, *ended]), event(b"[DONE]")])


def failed(status: int, message: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    return Reply([body], status, "application/json")


@dataclass
class OpenAIServer:
    """What it is asked, and what it answers.

    Attributes:
        answer: makes the reply to a body that is posted.
        models: of /v1/models; ``None``: there is no such path.
        seen: paths and bodies of what was posted.
        keys: the authorization of every request.
        connections: how many there were.
    """

    answer: Callable[[dict[str, Any]], Reply] = completed
    models: Sequence[str] | None = ("demo",)
    api_key: str | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            reply = self._reply(method, path, headers.get("authorization"), raw)
            if reply.raw is not None:
                writer.write(reply.raw)
                await writer.drain()
                return False
            writer.write(f"HTTP/1.1 {reply.status} x\r\nContent-Type: {reply.kind}\r\n{reply.headers}".encode())
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for piece in reply.pieces:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
                await asyncio.sleep(0)
            if reply.stall:
                await reader.read()
            if reply.cut:
                return False
            writer.write(b"0\r\n\r\n")
            return True
        finally:
            self.open -= 1

    def _reply(self, method: str, path: str, key: str | None, raw: bytes) -> Reply:
        self.keys.append(key)
        if self.api_key is not None and key != f"Bearer {self.api_key}":
            return failed(401, "the API key is wrong")
        if method == "GET":
            if self.models is None or path != "/v1/models":
                return failed(404, "not here")
            listed = {"object": "list", "data": [{"id": name} for name in self.models]}
            return Reply([json.dumps(listed).encode()], kind="application/json")
        body = json.loads(raw)
        self.seen.append((path, body))
        return self.answer(body)


@contextmanager
def openai_server(**settings: Any) -> Iterator[OpenAIServer]:
    """One that runs in a thread."""
    server = OpenAIServer(**settings)
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        listening.close()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(main())
        stop.append(task.cancel)
        loop.run_until_complete(task)
        for left in asyncio.all_tasks(loop):
            left.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    stop: list[Callable[[], object]] = []
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop[0])
        thread.join(30)
        assert not thread.is_alive()
