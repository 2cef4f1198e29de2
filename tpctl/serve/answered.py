"""A generation as an answer over HTTP: whole, or as events while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation, Gone, Piece
from tpctl.serve.json_pieces import encode_pieces
from tpctl.serve.straight import straight

encode = msgspec.json.encode

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
JSON = [(b"content-type", b"application/json")]


class Writer(Protocol):
    """What an endpoint says. ``id``: what the answer is called."""

    id: str

    def begin(self) -> bytes:
        """What comes before all else."""

    def slow(self, pieces: Sequence[Piece]) -> bool:
        """Whether to make what is said of new text, or of none the beginning or end, would hold up the event loop."""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """What is said of new text."""

    def text(self, text: str) -> bytes:
        """The same of text of the only answer that has begun, of which nothing else is to be said; it is never slow."""

    def end(self) -> bytes:
        """What comes at the end."""

    def broken(self, error: ApiError) -> bytes:
        """What comes in the place of an end."""

    def whole(self) -> Any:
        """All of it, once it has ended, as JSON has it."""


class Answered:
    """A response that is one generation's. Whoever hangs up ends that at once."""

    def __init__(
        self, generation: Generation, writer: Writer, run: Callable[..., Awaitable[Any]], prompt_tokens: int
    ) -> None:
        """``run``: has a thread do something; ``prompt_tokens``: of all prompts."""
        self._generation = generation
        self._writer = writer
        self._named = [(b"x-request-id", writer.id.encode())]  # as the server's log names it
        self._run = run
        self._prompt_tokens = prompt_tokens
        self._stream = generation.interval > 0
        self._failed = ""  # why a stream that had begun broke off

    @property
    def complete(self) -> bool:
        """Whether the engine has no more to say of it."""
        return self._generation.done

    @property
    def described(self) -> str:
        """Which one it is, and how far."""
        return f"{self._writer.id} after {self._generation.num_tokens} tokens"

    @property
    def account(self) -> str:
        """Its tokens, and whether whoever asked had all of them."""
        generation = self._generation
        given_up = " hung_up" if generation.given_up else ""
        tokens = f"prompt_tokens={self._prompt_tokens} completion_tokens={generation.num_tokens}"
        return f"{tokens} id={self._writer.id}{given_up}{self._failed}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(self._watch(receive))
        try:
            await (self._events(scope, send) if self._stream else self._at_once(scope, send))
        except Gone:
            pass
        finally:
            watching.cancel()
            self._generation.close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.close()

    def _broken(self, error: ApiError, scope: Scope) -> ApiError:
        """What its client is told, and where an engine failed at it and goes on, whoever runs the server, too."""
        if error.status == 500 and error.code is None:
            scope["app"].tell(f"{self.described} failed: {error.message}", scope)
        return error

    def _broken_off(self, error: ApiError, scope: Scope) -> bytes:
        """The same of a stream that has begun, whose status says that all is well."""
        self._failed = f" failed={error.code or error.status}"
        if error.status == 429:  # nobody counts it as one
            scope["app"].tell(f"{self.described} broke off: {error.message}", scope)
        return self._writer.broken(error)

    async def _at_once(self, scope: Scope, send: Send) -> None:
        try:
            await self._generation.finish()
        except ApiError as error:
            return await refused(self._broken(error, scope), send, self._named)
        body = await self._run(lambda: encode_pieces(self._writer.whole()))
        return await say(200, [*JSON, *self._named], body, send)

    async def _events(self, scope: Scope, send: Send) -> None:
        to = straight(scope)
        try:
            pieces = await self._generation.next()  # what goes wrong before there is anything has a status of its own
        except ApiError as error:
            return await refused(self._broken(error, scope), send, self._named)
        await send({"type": "http.response.start", "status": 200, "headers": [*EVENTS, *self._named]})
        writer = self._writer
        said = b""

        def at_once(pieces: list[Piece]) -> bool:
            if to is None or not to.open or writer.slow(pieces):
                return False
            to.write(writer.pieces(pieces))
            return True

        def text_at_once(text: str) -> bool:
            if to is None or not to.open:
                return False
            to.write(writer.text(text))
            return True

        taking = (None, None) if to is None else (at_once, text_at_once)
        try:
            said = await self._made(writer.begin)
            while pieces:
                if said := said + await self._made(writer.pieces, pieces):
                    await send({"type": "http.response.body", "body": said, "more_body": True})
                said = b""
                pieces = await self._generation.next(*taking)
            said += await self._made(writer.end)
        except ApiError as error:
            said += self._broken_off(self._broken(error, scope), scope)
        except Gone:
            raise
        except Exception as error:
            said += self._broken_off(scope["app"].failed(error, scope), scope)
        return await send({"type": "http.response.body", "body": said, "more_body": False})

    async def _made(self, make: Callable[..., bytes], *pieces: list[Piece]) -> bytes:
        """By a thread, if it is slow; what comes meanwhile waits its turn."""
        slow = self._writer.slow(pieces[0] if pieces else ())
        return await self._run(make, *pieces) if slow else make(*pieces)


async def say(status: int, headers: list[tuple[bytes, bytes]], body: bytes, send: Send) -> None:
    """A response that is all there."""
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def refused(error: ApiError, send: Send, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """``more``: headers besides."""
    await say(error.status, [*error.headers(), *more], error.body(), send)


class Encoded:
    """A response that is all there, as JSON."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.body = body
        self.status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await say(self.status, JSON, self.body, send)


class Said(Encoded):
    """A short one, as a value that JSON has a form for."""

    def __init__(self, value: Any, status: int = 200) -> None:
        super().__init__(encode(value), status)
