"""A server at a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from tests.unit.fake_engine import FakeEngine
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import TpctlError
from tpctl.serve import run as run_module
from tpctl.serve.run import ServeSettings, serve
from tpctl.serve.server import Server
from tpctl.serve.sockets import listen, url_of

PATIENCE = 60.0  # seconds that anything may take on a busy machine
LONG = "abcdefgh" * 3000


class Running:
    """A server in a thread.

    Attributes:
        notes: what it told whoever runs it.
        failed: why it ended, if not as it was told to.
    """

    def __init__(self, tokenizer: Tokenizer, engine: FakeEngine, settings: dict[str, Any]) -> None:
        self.engine = engine
        self.notes: list[str] = []
        self.failed: TpctlError | None = None
        self.server: Server | None = None
        self.sock = listen("127.0.0.1", 0)
        self.address = self.sock.getsockname()
        self.url = url_of(self.sock)
        self._begun: Future[None] = Future()  # done when requests are taken, or when that will not be
        self._settings = ServeSettings(("demo",), {"temperature": 1.0}, **settings)
        self._tokenizer = tokenizer
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self, patch: pytest.MonkeyPatch) -> None:
        def made(*arguments: Any) -> Server:
            self.server = Server(*arguments)
            self.loop = asyncio.get_running_loop()
            return self.server

        patch.setattr(run_module, "Server", made)
        self.thread.start()
        if self.engine.ready.is_set():
            self._begun.result(PATIENCE)

    def end(self) -> None:
        assert self.server is not None
        self.loop.call_soon_threadsafe(self.server.end)

    def heard(self) -> list[str]:
        """What it told since this was asked before; waits until it has ended."""
        self.thread.join(PATIENCE)
        told, self.notes[:] = list(self.notes), []
        return told

    def connect(self, room: int | None = None) -> socket.socket:
        """A connection; ``room``: bytes that the system keeps of what is not read."""
        sock = socket.socket()
        sock.settimeout(PATIENCE)
        if room is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        sock.connect(self.address)
        return sock

    def ask(self, path: str, body: dict[str, Any], room: int | None = None) -> socket.socket:
        """A connection that a request was sent over."""
        sock = self.connect(room)
        raw = json.dumps(body).encode()
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(raw)) + raw)
        return sock

    def _run(self) -> None:
        try:
            serve(
                [self.engine],
                self._tokenizer,
                self.sock,
                self._settings,
                at_once=8,
                ready=lambda info: self._begun.set_result(None),
                note=self.notes.append,
            )
        except TpctlError as error:
            self.failed = error
            self._never(error)
        except BaseException as error:
            if not self._never(error):
                raise
        else:
            self._never(RuntimeError("the server ended before it took requests"))

    def _never(self, reason: BaseException) -> bool:
        """Have ``start`` raise it, unless it has returned."""
        if before := not self._begun.done():
            self._begun.set_exception(reason)
        return before


@contextmanager
def running(tokenizer: Tokenizer, engine: FakeEngine, **settings: Any) -> Iterator[Running]:
    """A server that is ended afterwards, if it has not been, and told nothing but what was ``heard``.

    Raises:
        Exception: what it failed at before it took requests.
    """
    found = Running(tokenizer, engine, settings)
    with pytest.MonkeyPatch.context() as patch:
        try:
            found.start(patch)
            yield found
        except BaseException:
            engine.close()  # else its threads are waited for when all tests have ended
            raise
        if found.thread.is_alive():
            found.end()
        found.thread.join(PATIENCE)
    assert not found.thread.is_alive() and not found.notes
    assert not engine.open and engine.closed, "the engine was left with work"


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything(sock: socket.socket, until: bytes | None = None) -> bytes:
    """What comes until the server closes the connection, or until the end of what came is ``until``."""
    found = bytearray()
    while piece := sock.recv(1 << 16):
        found += piece
        if until is not None and found.endswith(until):
            break
    return bytes(found)


def unchunked(body: bytes) -> bytes:
    """What chunks hold."""
    found, at = [], 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        found.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(found)


BODY = {"prompt": "ab", "max_tokens": 20000, "stream": True}


def talkative(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, say=lambda *_: LONG, max_model_len=100_000)
