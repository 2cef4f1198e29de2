"""The command line's side of a running engine: start the workers, hand in requests, take out tokens."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

from tpctl.errors import EngineError, RequestError, TpctlError
from tpctl.launch.torchrun import WORKER, Workers
from tpctl.wire.channel import Channel, ChannelClosed
from tpctl.wire.messages import (
    Abort,
    Add,
    Fatal,
    GetStats,
    Message,
    Output,
    Outputs,
    Ready,
    Request,
    Stats,
    Stop,
)
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig

START_TIMEOUT = 1800.0  # seconds; weights from a slow network disk take their time


class EngineClient:
    """One engine and its workers.

    The constructor starts the workers and returns at once, so that the caller can tokenize while they load.
    Use it as a context manager: leaving it ends every process. One thread at a time may call the methods that
    wait.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        module: str = WORKER,
        env: Mapping[str, str] | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        """Start the workers.

        Args:
            module: the Python module that every rank runs.
            env: variables for the workers beside this process's own.
            start_timeout: seconds until ``wait_ready`` gives up.

        Raises:
            EngineError: the interpreter could not be started.
        """
        self._start_timeout = start_timeout
        self._deadline = time.monotonic() + start_timeout
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: rank 0 hung up
        self._info: EngineInfo | None = None
        self._channel: Channel | None = None
        self._early: list[Output] = []
        self._error: TpctlError | None = None  # raised by every call, once what rank 0 had said before is taken out
        self._failure: TpctlError | None = None  # the same, from the moment the reader knows it
        self._told: list[Callable[[TpctlError], None]] = []
        self._lock = threading.Lock()  # of the two above
        self._closed = False
        self._workers = Workers(config, module, env)
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> EngineInfo:
        """Wait until the engine takes requests.

        Returns:
            What it told about itself.

        Raises:
            EngineError: the workers failed (or another ``TpctlError`` that one of them raised), or took too
                long.
        """
        while self._info is None:
            message = self._next(self._deadline - time.monotonic())
            if message is None:
                self._error = self._workers.late(self._start_timeout)
                raise self._error
            if isinstance(message, Ready):
                self._info = message.info
        return self._info

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand in requests; ``outputs`` will carry their tokens.

        Raises:
            RequestError: a prompt is empty or longer than the model takes; none of the requests was handed
                in.
            EngineError: the workers failed.
        """
        requests = list(requests)
        limit = self.wait_ready().max_model_len
        for request in requests:
            check_length(len(request.token_ids), limit)
        if requests:
            self._send(Add(requests))

    def outputs(self, timeout: float | None = None) -> list[Output]:
        """Wait for new tokens of any request.

        Returns:
            At least one output, or none after ``timeout`` seconds.

        Raises:
            EngineError: the workers failed.
        """
        if self._early:
            early, self._early = self._early, []
            return early
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._next(None if deadline is None else deadline - time.monotonic())
            if message is None:
                return []
            if isinstance(message, Outputs) and message.outputs:
                return message.outputs

    def abort(self, ids: Iterable[str]) -> None:
        """Ask that requests end; each one's last output has the finish reason "abort". Skips unknown ids."""
        ids = list(ids)
        if ids:
            self._send(Abort(ids))

    def stats(self) -> EngineStats:
        """The engine's counters since it started.

        Raises:
            EngineError: the workers failed.
        """
        self._send(GetStats())
        while True:
            message = self._next(None)
            if isinstance(message, Stats):
                return message.values
            if isinstance(message, Outputs):
                self._early += message.outputs

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

    def close(self) -> None:
        """End every process of the engine. Takes up to a few seconds; may be called again."""
        if self._closed:
            return
        self._closed = True
        polite = 0.0
        if self._info is not None and self._error is None and self._channel is not None:
            try:
                self._channel.send(Stop())
                polite = 3.0
            except ChannelClosed:
                pass
        self._workers.close(polite)
        if self._channel is not None:
            self._channel.close()

    def _receive(self) -> None:
        """Thread: everything rank 0 says goes to the inbox, then, when it ends, ``None`` behind the reason."""
        fatal: str | None = None
        try:
            while not (self._closed or self._workers.failed):
                channel = self._workers.accept(timeout=1.0)
                if channel is None:
                    continue
                self._channel = channel
                while fatal is None:
                    message = channel.receive()
                    if isinstance(message, Fatal):
                        fatal = message.message
                    else:
                        self._inbox.put(message)
                break
        except ChannelClosed:
            pass
        except Exception as error:  # a garbled message can fail in any way while it is read
            fatal = f"rank 0 sent a message that cannot be read: {error!r}"
            if self._channel is not None:
                self._channel.close()  # rank 0 ends when nobody listens
        finally:
            if not self._closed:
                self._fail(self._workers.failure(fatal))
            self._inbox.put(None)

    def _fail(self, reason: TpctlError) -> None:
        with self._lock:
            self._failure = reason
            told, self._told = self._told, []
        if not self._closed:
            for callback in told:
                callback(reason)

    def _next(self, timeout: float | None) -> Message | None:
        """The next message, or ``None`` after ``timeout`` seconds."""
        if self._error is not None:
            raise self._error
        try:
            message = self._inbox.get(timeout=None if timeout is None else max(0.0, timeout))
        except queue.Empty:
            return None
        if message is None:
            self._error = self._failure or EngineError("the engine is closed")
            raise self._error
        return message

    def _send(self, message: Message) -> None:
        self.wait_ready()
        assert self._channel is not None
        try:
            self._channel.send(message)
        except ChannelClosed:
            # Why it is closed stands in the inbox, behind what was said before.
            while True:
                received = self._next(None)
                if isinstance(received, Outputs):
                    self._early += received.outputs


def check_length(num_tokens: int, max_model_len: int) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        RequestError: it is empty, or as long as the longest sequence or longer.
    """
    if num_tokens == 0:
        raise RequestError("the prompt is empty; give it at least one token")
    if num_tokens >= max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens, but this engine takes at most {max_model_len - 1}"
            " (and one to answer with); shorten it, or raise --max-model-len, or --kv-cache-memory if that is the limit"
        )
