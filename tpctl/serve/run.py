"""From running engines to a server that ends with them."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import TpctlError
from tpctl.serve.app import App
from tpctl.serve.asked import Reader
from tpctl.serve.endpoints import Endpoints
from tpctl.serve.lane import Engine
from tpctl.serve.memory import MAX_MEMORY
from tpctl.serve.metrics import Metrics
from tpctl.serve.pool import Pool
from tpctl.serve.server import Server
from tpctl.serve.sockets import raise_file_limit, take
from tpctl.serve.threads import Threads
from tpctl.wire.report import EngineInfo

_GARBAGE = 20_000  # objects made between two collections: at Python's 700 a third of a token's cost would be those


@dataclass(frozen=True)
class ServeSettings:
    """How a server behaves.

    Attributes:
        names: what the model is called; the first one is said in answers.
        defaults: fields of ``SamplingParams`` that hold where requests say nothing.
        max_body: bytes of a request's body.
        max_memory: bytes that requests may hold together, from their bodies to answers that were not read yet.
        max_waiting: requests that may wait, besides those that the engines compute together.
        drain: seconds in which the server ends once it is asked to.
        interval: tokens of an answer in a chunk of its stream.
        origins: of web pages that may use it besides its own.
        host: what it was told to listen at, by which its own page goes.
        access_log: whether each request that was answered is noted.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    api_keys: tuple[str, ...] = ()
    max_body: int = 16 << 20
    max_waiting: int = 1024
    drain: float = 30.0
    interval: int = 1
    max_memory: int = MAX_MEMORY
    origins: tuple[str, ...] = ()
    host: str = ""
    access_log: bool = False


def serve(
    engines: Sequence[Engine],
    tokenizer: Tokenizer,
    sock: socket.socket,
    settings: ServeSettings,
    *,
    at_once: int,
    ready: Callable[[EngineInfo], object],
    note: Callable[[str], object],
    signalled: Callable[[], int | None] = lambda: None,
) -> int | None:
    """Serve until a signal comes; the engines have ended then.

    Args:
        sock: is bound; it is closed at the end.
        at_once: requests that the engines compute together.
        ready: is called when requests are taken.
        note: is told of what should not have happened, of what takes engines long to start, of what an end waits for
            and cuts off, and of requests where that is asked for.
        signalled: the number of a signal that came before this could take any.

    Returns:
        The number of the signal, if it came before all engines were ready.

    Raises:
        TpctlError: an engine could not be started, or has ended; or another server was first at the port.
    """
    raise_file_limit()
    take(sock)
    before = gc.get_threshold()
    gc.freeze()  # what imports have left is visited by no collection
    gc.set_threshold(_GARBAGE, 20, 20)
    handlers = {number: signal.getsignal(number) for number in _signals()}
    try:
        failure, early = asyncio.run(_serve(engines, tokenizer, sock, settings, at_once, ready, note, signalled))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # a loop leaves the system's, which end this process at once
        gc.set_threshold(*before)
        gc.unfreeze()
    if failure is not None:
        raise failure
    return early


async def _serve(
    engines: Sequence[Engine],
    tokenizer: Tokenizer,
    sock: socket.socket,
    settings: ServeSettings,
    at_once: int,
    ready: Callable[[EngineInfo], object],
    note: Callable[[str], object],
    signalled: Callable[[], int | None],
) -> tuple[TpctlError | None, int | None]:
    """Why an engine ended, if one did, and the signal that came before all were ready, if one did."""
    servers: list[Server] = []

    def failed(reason: TpctlError) -> None:
        for server in servers:
            server.failed(reason)

    pool = Pool(
        engines,
        Metrics(),
        most=at_once + settings.max_waiting,
        on_failure=failed,
    )
    with Threads() as threads:
        reader = Reader(tokenizer, settings.defaults, threads)
        endpoints = Endpoints(pool, reader, settings.names, settings.interval)
        app = App(
            endpoints,
            api_keys=settings.api_keys,
            origins=settings.origins,
            host=settings.host,
            max_body=settings.max_body,
            max_memory=settings.max_memory,
            note=note,
            access=note if settings.access_log else None,
        )
        server = Server(app, pool, settings.drain, note, signalled)
        servers.append(server)
        starting = asyncio.create_task(_tell(pool, ready, note))
        try:
            await server.serve([sock])
        finally:
            for number in _signals():  # what they ask for is under way, and takes the engines some seconds at most
                asyncio.get_running_loop().add_signal_handler(number, lambda: None)
            starting.cancel()
            threads.drop()
            reader.interrupt()
            await pool.close()
    return pool.failure, server.early


def _signals() -> tuple[signal.Signals, ...]:
    """Those that a server is ended by; other threads than the first are told of none."""
    return (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()


async def _tell(pool: Pool, ready: Callable[[EngineInfo], object], note: Callable[[str], object]) -> None:
    try:
        info = await pool.wait_ready(note)
    except TpctlError:
        return  # the pool has it
    ready(info)
