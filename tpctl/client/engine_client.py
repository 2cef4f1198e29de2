"""The front's side of a running engine: start the workers, hand in requests, take out tokens."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

from tpctl.client.router import Mailbox, Router, Sink
from tpctl.errors import EngineError, TpctlError, again
from tpctl.launch.nodes import ONE_HOST, Nodes
from tpctl.launch.torchrun import WORKER, WORKER_VARIABLE, Workers
from tpctl.wire.channel import Channel, ChannelClosed
from tpctl.wire.messages import Fatal, GetStats, Message, Output, Outputs, Progress, Ready, Request, Stats, Stop
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig

START_TIMEOUT = 1800.0  # seconds; weights from a slow network disk take their time


class EngineClient:
    """One engine and its workers.

    The constructor starts the workers and returns at once, so that the caller can tokenize while they load.
    Use it as a context manager: leaving it ends every process. Any thread may call any method. Consumers that share
    the engine take a ``mailbox`` each; ``submit``, ``outputs`` and ``abort`` are those of a first one, for a program
    that needs no other.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        module: str | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout: float = START_TIMEOUT,
        nodes: Nodes = ONE_HOST,
    ) -> None:
        """Start the workers.

        Args:
            module: the Python module that every rank runs, if not that of ``WORKER_VARIABLE`` or the engine's.
            env: variables for the workers beside this process's own.
            start_timeout: seconds until ``wait_ready`` gives up.
            nodes: hosts that the ranks are on; this one is the first.

        Raises:
            EngineError: the interpreter could not be started.
        """
        self._start_timeout = start_timeout
        self._deadline = time.monotonic() + start_timeout
        self._info: EngineInfo | None = None
        self._ready = threading.Event()  # or ended
        self._ended = threading.Event()
        self._channel: Channel | None = None
        self._stats: queue.SimpleQueue[EngineStats | None] = queue.SimpleQueue()  # None: rank 0 hung up
        self._stats_lock = threading.Lock()  # held by who waits for an answer
        self._failure: TpctlError | None = None
        self._told: list[Callable[[TpctlError], None]] = []
        self._progress: str | None = None
        self._told_progress: Callable[[str], object] = lambda text: None
        self._lock = threading.Lock()  # of the four above
        self._closed = False
        self._router = Router(self._send, lambda: self.wait_ready().max_model_len)
        self._own = self._router.mailbox()
        self._workers = Workers(config, module or os.environ.get(WORKER_VARIABLE) or WORKER, env, nodes)
        threading.Thread(target=self._receive, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self, told: Callable[[str], object] | None = None) -> EngineInfo:
        """Wait until the engine takes requests.

        Args:
            told: called with what takes its time, by another thread.

        Returns:
            What it told about itself.

        Raises:
            EngineError: the workers failed (or another ``TpctlError`` that one of them raised), or took too
                long.
        """
        if told is not None:
            with self._lock:
                self._told_progress, last = told, self._progress
            if last is not None:
                told(last)
        if not self._ready.wait(max(0.0, self._deadline - time.monotonic())):
            raise self._workers.late(self._start_timeout)
        if self._info is None:
            raise self._reason()
        return self._info

    def mailbox(self, sink: Sink | None = None) -> Mailbox:
        """A consumer's own way to the engine, beside that of others; ``sink`` as ``Router.mailbox`` takes it."""
        return self._router.mailbox(sink)

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand in requests, as ``Mailbox.submit``; ``outputs`` will carry their tokens."""
        self._own.submit(requests)

    def outputs(self, timeout: float | None = None) -> list[Output]:
        """Wait for new tokens of what was handed in here, as ``Mailbox.outputs``."""
        return self._own.outputs(timeout)

    def abort(self, ids: Iterable[str]) -> None:
        """Ask that requests of this mailbox end, as ``Mailbox.abort``."""
        self._own.abort(ids)

    def stats(self) -> EngineStats:
        """The engine's counters since it started.

        Raises:
            EngineError: the workers failed.
        """
        with self._stats_lock:
            self._send(GetStats())
            stats = self._stats.get()
        if stats is None:
            raise self._reason()
        return stats

    def failure_now(self) -> TpctlError | None:
        """Why the engine has ended, if it has without being asked to; does not wait."""
        return self._failure

    def on_failure(self, callback: Callable[[TpctlError], None]) -> None:
        """Have ``callback`` called with the reason once, when the engine ends without being asked to: by the thread
        that finds out, also while nobody waits for an answer; here and now if it has ended."""
        with self._lock:
            failure = self._failure
            if failure is None:
                self._told.append(callback)
        if failure is not None:
            callback(failure)

    def give_up(self, reason: TpctlError) -> None:
        """End every process of an engine that does not go on; whoever waits for it is told ``reason``. Any thread."""
        if self._closed or self._failure is not None:
            return
        self._fail(reason)
        self._workers.close()
        if self._channel is not None:
            self._channel.close()

    def close(self) -> None:
        """End every process of the engine. Takes up to a few seconds; may be called again."""
        if self._closed:
            return
        self._closed = True
        polite = 0.0
        if self._info is not None and self._failure is None and self._channel is not None:
            try:
                self._channel.send(Stop())
                polite = 3.0
            except ChannelClosed:
                pass
        self._workers.close(polite)
        if self._channel is not None:
            self._channel.close()

    def _receive(self) -> None:
        """Thread: hands on everything that rank 0 says and then, when it ends, the reason."""
        fatal: str | None = None
        try:
            while not (self._closed or self._workers.failed):
                channel = self._workers.accept(timeout=1.0)
                if channel is None:
                    continue
                self._channel = channel
                while fatal is None:
                    message = channel.receive()
                    if isinstance(message, Outputs):
                        self._router.deliver(message.outputs)
                    elif isinstance(message, Fatal):
                        fatal = message.message
                    elif isinstance(message, Progress):
                        with self._lock:
                            self._progress, hears = message.text, self._told_progress
                        hears(message.text)
                    elif isinstance(message, Ready):
                        self._info = message.info
                        self._ready.set()
                    elif isinstance(message, Stats):
                        self._stats.put(message.values)
                break
        except ChannelClosed:
            pass
        except Exception as error:  # a garbled message can fail in any way while it is read
            fatal = f"rank 0 sent a message that cannot be read: {error!r}"
            if self._channel is not None:
                self._channel.close()  # rank 0 ends when nobody listens
        finally:
            if not self._closed and self._failure is None:
                self._fail(self._workers.failure(fatal))
            self._router.fail(self._reason())
            self._ended.set()
            self._ready.set()
            self._stats.put(None)

    def _fail(self, reason: TpctlError) -> None:
        with self._lock:
            self._failure = reason
            told, self._told = self._told, []
        if not self._closed:
            for callback in told:
                callback(reason)

    def _reason(self) -> TpctlError:
        """Why nothing can be asked of the engine any more."""
        return EngineError("the engine is closed") if self._failure is None else again(self._failure)

    def _send(self, message: Message) -> None:
        self.wait_ready()
        assert self._channel is not None
        try:
            self._channel.send(message)
        except ChannelClosed:
            self._ended.wait()  # the reader is about to learn why
            raise self._reason() from None
