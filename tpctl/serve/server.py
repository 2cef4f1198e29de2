"""Uvicorn around the application: a socket, signals, an end in order, and nothing to do while idle."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import uvicorn

from tpctl.errors import TpctlError
from tpctl.serve.app import App
from tpctl.serve.connection import HEAD_SECONDS, Connection
from tpctl.serve.errors import ApiError
from tpctl.serve.pool import Pool
from tpctl.serve.sockets import BACKLOG
from tpctl.serve.work import Work, named


class Server(uvicorn.Server):
    """Serves until a signal comes or an engine ends.

    The first signal lets what is under way finish within ``drain`` seconds, the second one ends it.

    Attributes:
        early: the first signal, if it came before the engines were ready.
    """

    def __init__(
        self,
        app: App,
        pool: Pool,
        drain: float,
        note: Callable[[str], object],
        signalled: Callable[[], int | None] = lambda: None,
    ) -> None:
        """``note``: is told what an end waits for, and what it cuts off; ``signalled``: the number of a signal that
        came before this could take any."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(HEAD_SECONDS),
                timeout_graceful_shutdown=None,
                backlog=BACKLOG,
            )
        )
        self._app = app
        self._pool = pool
        self._drain = drain
        self._note = note
        self._ending = asyncio.Event()
        self._given_up = False
        self._unread: list[Work] = []  # answers that only their readers are waited for
        self._abandoned = asyncio.Event()
        self._signals = 0
        self._signalled = signalled
        self.early: int | None = None

    async def main_loop(self) -> None:
        """In the place of uvicorn's, which looks around ten times a second.

        While what is under way goes on, others are still answered: new requests that there will be none, and
        whoever looks at /health that this ends. Only then nobody can connect any more.
        """
        await self._ending.wait()
        either = [asyncio.create_task(self._app.under_way.finish()), asyncio.create_task(self._abandoned.wait())]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        for task in either:
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        ours = threading.current_thread() is threading.main_thread()  # others are told of no signals
        numbers = (signal.SIGINT, signal.SIGTERM) if ours else ()
        for number in numbers:
            loop.add_signal_handler(number, self.end, number)
        if (came := self._signalled()) is not None:
            self.end(came)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Take no new requests, and end within the drain's seconds; at once if it is called again."""
        self._signals += 1
        if self._pool.info is None and self._pool.failure is None:
            self.early = self.early or number
        if self._signals > 1:
            self._give_up()
            return
        self._pool.closing = reason = ApiError(503, "the server is ending", code="ending", retry_after=5)
        self._app.end(reason)
        if count := len(self._app.under_way):
            many, them = ("1 request is", "it") if count == 1 else (f"{count} requests are", "them")
            self._note(
                f"tpctl serve: {many} under way, with {self._drain:g} s to end; a second signal ends {them} at once"
            )
        self._ending.set()
        asyncio.get_running_loop().call_later(self._drain, self._give_up)

    def failed(self, reason: TpctlError) -> None:
        """An engine has ended: so does this, once its clients have been told."""
        self._app.end(ApiError(500, f"the engine has ended: {reason}", code="engine_ended"))
        self._ending.set()
        asyncio.get_running_loop().call_later(min(self._drain, 5.0), self._give_up)

    def _give_up(self) -> None:
        if self._given_up:
            return
        self._given_up = True
        if cut := [work for work in self._app.under_way if not work.complete]:
            self._note(f"tpctl serve: {_answers(len(cut))} cut off: {named(cut)}")
        self._unread = [work for work in self._app.under_way if work.complete]
        self._pool.give_up(ApiError(503, "the server has ended before this answer did", code="ended"))
        asyncio.get_running_loop().call_later(1.0, self._abandon)

    def _abandon(self) -> None:
        """End connections that read nothing of what they are told."""
        if left := [work for work in self._app.under_way if work in self._unread]:
            self._note(f"tpctl serve: {_answers(len(left))} not read to the end: {named(left)}")
        self.force_exit = True
        self._abandoned.set()
        for connection in list(self.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()


def _answers(count: int) -> str:
    return "1 answer was" if count == 1 else f"{count} answers were"
