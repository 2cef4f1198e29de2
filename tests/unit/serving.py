"""A server in this process: the application over a fake engine, with Starlette's client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from tests.unit.fake_engine import FakeEngine
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.app import App
from tpctl.serve.asked import Reader
from tpctl.serve.endpoints import Endpoints
from tpctl.serve.metrics import Metrics
from tpctl.serve.pool import Pool
from tpctl.serve.threads import Threads


class Served:
    """A server and its engines.

    Attributes:
        notes: what it told whoever runs it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engines: list[FakeEngine],
        *,
        names: tuple[str, ...] = ("demo", "alias"),
        defaults: dict[str, Any] | None = None,
        most: int = 1000,
        interval: int = 1,
        **settings: Any,
    ) -> None:
        self.engines = engines
        self.notes: list[str] = []
        self.pool: Pool | None = None
        self._app: App | None = None
        self._reader = Reader(tokenizer, defaults or {"temperature": 1.0}, Threads())
        self._make = (names, most, interval, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{name}.complete"})
            return
        if self._app is None:  # on the loop that the client runs
            names, most, interval, settings = self._make
            self.pool = Pool(self.engines, Metrics(), most=most)
            self._app = App(Endpoints(self.pool, self._reader, names, interval), note=self.notes.append, **settings)
            if all(engine.ready.is_set() for engine in self.engines):
                await self.pool.wait_ready()
            else:
                self.loading = asyncio.create_task(self.pool.wait_ready())
        await self._app(scope, receive, send)


@contextmanager
def served(tokenizer: Tokenizer, *engines: FakeEngine, **settings: Any) -> Iterator[tuple[TestClient, Served]]:
    """A client of a server over engines, one by default."""
    server = Served(tokenizer, list(engines) or [FakeEngine(tokenizer)], **settings)
    with TestClient(server, raise_server_exceptions=True) as client:
        client.get("/health")
        yield client, server
    for engine in server.engines:
        engine.close()
