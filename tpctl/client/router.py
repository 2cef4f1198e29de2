"""One engine, several consumers: each has a mailbox, and is given the outputs of its own requests and no others.

    consumers' threads                          the client's reader thread
    Mailbox.submit  ── Add ──►  rank 0  ── Outputs ──►  Router.deliver
    Mailbox.outputs ◄──────── the mailbox's queue ◄────────┘

The reader never waits for a consumer: a mailbox grows until it is emptied or closed. A consumer with threads of its own
way, as an event loop, has a sink in the queue's place, which the reader calls.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

from tpctl.errors import RequestError, TpctlError, again
from tpctl.wire.messages import Abort, Add, Output, Request

Share = list[tuple[str, Output]]
"""Outputs of one's own requests, each beside its request's own id: that in the output is the engine's."""

Sink = Callable[[Share | TpctlError], object]
"""Takes those, or why there will be no more."""


class Router:
    """Knows whose every open request is. Any thread may call any method."""

    def __init__(self, send: Callable[[Add | Abort], None], max_model_len: Callable[[], int]) -> None:
        """Begin.

        Args:
            send: hands a message to rank 0; any thread may call it. Raises a ``TpctlError`` if the engine has ended.
            max_model_len: waits until the engine is ready; the longest prompt and answer that it takes.
        """
        self.send = send
        self.max_model_len = max_model_len
        self._lock = threading.Lock()  # of what follows
        self._numbers = itertools.count()
        self._mailboxes: set[Mailbox] = set()
        self._routes: dict[str, tuple[Mailbox, str]] = {}  # by the id that the engine knows: whose, and its own id
        self._failure: TpctlError | None = None

    def mailbox(self, sink: Sink | None = None) -> Mailbox:
        """One for a new consumer.

        Args:
            sink: is given what comes, in the place of ``Mailbox.outputs``; it must not wait.
        """
        with self._lock:
            mailbox = Mailbox(self, next(self._numbers), sink)
            self._mailboxes.add(mailbox)
            failure = self._failure
        if failure is not None:
            mailbox.put(failure)
        return mailbox

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Put each output where its request came from; drop it if that mailbox is closed."""
        shares: dict[Mailbox, Share] = {}
        with self._lock:
            for output in outputs:  # hundreds a step, so no more than need be is done for each
                if (known := self._routes.get(output.id)) is None:
                    continue
                if output.finish_reason is not None:
                    del self._routes[output.id]
                mailbox, own = known
                if (share := shares.get(mailbox)) is None:
                    share = shares[mailbox] = []
                share.append((own, output))
        for mailbox, share in shares.items():
            mailbox.put(share)

    def fail(self, reason: TpctlError) -> None:
        """Have every mailbox, also a later one, raise ``reason`` behind what it has been given."""
        with self._lock:
            self._failure = reason
            mailboxes = list(self._mailboxes)
        for mailbox in mailboxes:
            mailbox.put(reason)

    def open(self, mailbox: Mailbox, ids: Iterable[tuple[str, str]]) -> None:
        """Expect outputs of requests, each by the id that the engine knows and the consumer's own."""
        with self._lock:
            for id, own in ids:
                if id in self._routes:
                    raise ValueError(f"a request {own!r} is under way in this mailbox")
                self._routes[id] = (mailbox, own)

    def forget(self, mailbox: Mailbox) -> list[str]:
        """Close a mailbox; the ids, as the engine knows them, of what was under way."""
        with self._lock:
            self._mailboxes.discard(mailbox)
            left = [id for id, (owner, _) in self._routes.items() if owner is mailbox]
            for id in left:
                del self._routes[id]
        return left


class Mailbox:
    """One consumer's requests, and what comes of them. Its requests' ids need only differ from each other.

    Closing it, or leaving it as a context manager, aborts those that are under way. One thread at a time may wait.
    """

    def __init__(self, router: Router, number: int, sink: Sink | None = None) -> None:
        self._router = router
        self._sink = sink
        self._prefix = f"{number}:"
        self._queue: queue.SimpleQueue[list[Output] | TpctlError] = queue.SimpleQueue()
        self._failure: TpctlError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand in requests; ``outputs`` will carry their tokens.

        Raises:
            RequestError: a prompt is empty or longer than the model takes; none of the requests was handed in.
            EngineError: the workers failed.
        """
        requests = list(requests)
        limit = self._router.max_model_len()
        for request in requests:
            check_length(len(request.token_ids), limit)
        if requests:
            named = [replace(request, id=self._prefix + request.id) for request in requests]
            self._router.open(self, ((new.id, old.id) for new, old in zip(named, requests, strict=True)))
            self._router.send(Add(named))

    def outputs(self, timeout: float | None = None) -> list[Output]:
        """Wait for new tokens of any request.

        Returns:
            At least one output, or none after ``timeout`` seconds.

        Raises:
            EngineError: the workers failed, and what they had said before is taken out.
        """
        if self._failure is not None:
            raise again(self._failure)
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return []
        if isinstance(item, TpctlError):
            self._failure = item
            raise again(item)  # it is told to every mailbox
        return item

    def abort(self, ids: Iterable[str]) -> None:
        """Ask that requests end; each one's last output has the finish reason "abort". Skips unknown ids."""
        named = [self._prefix + id for id in ids]
        if named:
            self._router.send(Abort(named))

    def close(self) -> None:
        """Give up what is under way. May be called again."""
        if left := self._router.forget(self):
            with suppress(TpctlError):  # an engine that has ended computes nothing any more
                self._router.send(Abort(left))

    def put(self, item: Share | TpctlError) -> None:
        """Called by the router."""
        if self._sink is not None:
            self._sink(item)
        elif isinstance(item, TpctlError):
            self._queue.put(item)
        else:
            self._queue.put([Output._make((own, *output[1:])) for own, output in item])


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
