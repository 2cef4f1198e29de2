"""Where requests with grammars wait.

They are not handed to the ranks before their grammars are ready, so that all ranks learn of them at the same step, and
a grammar that takes long delays no other request. One that cannot be made ready ends its request here.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from tpctl.client.deep_threads import deep_thread, said
from tpctl.engine.guiding.guides import Guides
from tpctl.errors import RequestError, TpctlError
from tpctl.wire.messages import Abort, Add, Message, Output, Outputs, Request, to_wire

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Gate:
    """Where requests wait until their grammars are ready.

    Args:
        guides: given each request's matcher before the request is passed on.
        pass_on: hands a message, and its JSON, to all ranks.
        send: tells the front.
    """

    def __init__(
        self, guides: Guides, pass_on: Callable[[Message, bytes], None], send: Callable[[Message], None]
    ) -> None:
        self._guides = guides
        self._pass_on = pass_on
        self._send = send
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._pending: dict[str, bool] = {}  # ids of what waits; False: given up
        self._thread: threading.Thread | None = None

    def take(self, message: Message, text: bytes) -> None:
        """Pass a message on, but for requests that have to wait. Called by the thread that reads them all."""
        if isinstance(message, Add) and any(request.sampling.guide for request in message.requests):
            self._hold([request for request in message.requests if request.sampling.guide])
            others = [request for request in message.requests if not request.sampling.guide]
            if others:
                self._forward(others)
        elif isinstance(message, Abort):
            with self._lock:
                self._pending.update((id, False) for id in message.ids if id in self._pending)
                self._pass_on(message, text)
        else:
            self._pass_on(message, text)

    def _hold(self, requests: list[Request]) -> None:
        with self._lock:
            self._pending.update((request.id, True) for request in requests)
        if self._thread is None:
            try:
                self._thread = deep_thread(self._work, "tpctl-grammars")
            except RequestError as error:
                for request in requests:
                    self._refuse(request, str(error))
                return
        for request in requests:
            self._waiting.put(request)

    def _work(self) -> None:
        """Thread: in the order in which they came, those that are ready together."""
        grammars = self._guides.grammars
        ready: list[tuple[Request, LLMatcher]] = []
        while True:
            if self._waiting.empty():
                ready = self._release(ready)
            request = self._waiting.get()
            guide = request.sampling.guide
            assert guide is not None
            if not grammars.is_ready(guide):
                ready = self._release(ready)
            try:
                ready.append((request, grammars.matcher(guide)))
            except TpctlError as error:
                self._refuse(request, str(error))
            except BaseException as error:  # a panic of the library, or no memory: this request's end, nobody else's
                self._refuse(request, f"{guide.name}: {said(f'{type(error).__name__}: {error}')}")

    def _release(self, ready: list[tuple[Request, LLMatcher]]) -> list[tuple[Request, LLMatcher]]:
        """Let requests through, but for those that were given up; what is left, which is nothing."""
        if not ready:
            return []
        with self._lock:  # an Abort was seen before this, or is passed on behind it
            wanted = {request.id for request, _ in ready if self._pending.pop(request.id)}
            for request, matcher in ready:
                if request.id in wanted:
                    self._guides.open(request, matcher)
            if wanted:
                self._forward([request for request, _ in ready if request.id in wanted])
        if given_up := [Output(request.id, [], "abort") for request, _ in ready if request.id not in wanted]:
            self._send(Outputs(given_up))
        return []

    def _refuse(self, request: Request, message: str) -> None:
        with self._lock:
            wanted = self._pending.pop(request.id)
        self._send(Outputs([Output(request.id, [], *(("error", message) if wanted else ("abort", None)))]))

    def _forward(self, requests: list[Request]) -> None:
        message = Add(requests)
        self._pass_on(message, json.dumps(to_wire(message), separators=(",", ":")).encode())
