"""Where requests with grammars wait.

    take ── its grammar is there ─────────────────────────► _ready ── one thread ──► all ranks
         └─ it has to be made ──► _unmade ── some threads ──►┘

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
from tpctl.cores import affinity_cores
from tpctl.engine.guiding.guides import Guides
from tpctl.errors import RequestError, TpctlError
from tpctl.wire.guide import Guide
from tpctl.wire.messages import Abort, Add, Message, Output, Outputs, Request, to_wire

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MOST_MAKERS = 4
"""Threads that make grammars, of at most half of the cores."""


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
        self._ready: queue.SimpleQueue[tuple[Request, LLMatcher | str]] = queue.SimpleQueue()  # or why there is none
        self._unmade: queue.SimpleQueue[Guide] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._pending: dict[str, bool] = {}  # ids of what waits; False: given up
        self._waiting: dict[Guide, list[Request]] = {}  # for what is to be made, or is being made
        self._makers = 0
        self._opens = False  # whether there is a thread for what is ready

    def take(self, message: Message, text: bytes) -> None:
        """Pass a message on, but for requests that have to wait. Called by the thread that reads them all."""
        if isinstance(message, Add) and any(request.sampling.guide for request in message.requests):
            for request in message.requests:
                if request.sampling.guide:
                    self._hold(request, request.sampling.guide)
            others = [request for request in message.requests if not request.sampling.guide]
            if others:
                self._forward(others)
        elif isinstance(message, Abort):
            with self._lock:
                self._pending.update((id, False) for id in message.ids if id in self._pending)
                self._pass_on(message, text)
        else:
            self._pass_on(message, text)

    def _hold(self, request: Request, guide: Guide) -> None:
        if (problem := self._guides.refused(request)) is not None:
            self._send(Outputs([Output(request.id, [], "error", problem)]))
            return
        made = self._guides.grammars.kept(guide)
        try:
            self._start_threads(make=made is None)
        except RequestError as error:
            self._send(Outputs([Output(request.id, [], "error", str(error))]))
            return
        with self._lock:
            self._pending[request.id] = True
            if made is None:
                first = guide not in self._waiting
                self._waiting.setdefault(guide, []).append(request)
        if made is not None:
            self._ready.put((request, made))
        elif first:
            self._unmade.put(guide)

    def _start_threads(self, *, make: bool) -> None:
        """Those that are of use. Raises ``RequestError`` if there is none."""
        if not self._opens:
            deep_thread(self._open, "tpctl-grammars")
            self._opens = True
        if make and self._makers < min(_MOST_MAKERS, max(1, affinity_cores() // 2), len(self._waiting) + 1):
            try:
                deep_thread(self._make, f"tpctl-grammar-{self._makers}")
                self._makers += 1
            except RequestError:
                if not self._makers:
                    raise

    def _make(self) -> None:
        """Thread: make a grammar for all that wait for it, if any still does."""
        while True:
            guide = self._unmade.get()
            with self._lock:
                wanted = any(self._pending[request.id] for request in self._waiting[guide])
            made: LLMatcher | str = ""
            if wanted:
                try:
                    made = self._guides.grammars.kept(guide) or self._guides.grammars.make(guide)
                except TpctlError as error:
                    made = str(error)
                except BaseException as error:  # a panic of the library, or no memory: these requests' end alone
                    made = f"{guide.name}: {said(f'{type(error).__name__}: {error}')}"
            with self._lock:
                requests = self._waiting[guide]
                if not wanted and any(self._pending[request.id] for request in requests):
                    self._unmade.put(guide)  # one has come meanwhile that wants it
                    continue
                del self._waiting[guide]
            for request in requests:
                self._ready.put((request, made))

    def _open(self) -> None:
        """Thread: let requests through, those that are ready together at once."""
        while True:
            batch = [self._ready.get()]
            while not self._ready.empty():
                batch.append(self._ready.get())
            ready: list[tuple[Request, LLMatcher]] = []
            for request, made in batch:
                if isinstance(made, str):
                    self._refuse(request, made)
                    continue
                try:
                    ready.append((request, made.deep_copy()))
                except BaseException as error:  # no memory
                    self._refuse(request, f"its grammar: {said(f'{type(error).__name__}: {error}')}")
            self._release(ready)

    def _release(self, ready: list[tuple[Request, LLMatcher]]) -> None:
        """Let requests through, but for those that were given up."""
        with self._lock:  # an Abort was seen before this, or is passed on behind it
            wanted = {request.id for request, _ in ready if self._pending.pop(request.id)}
            for request, matcher in ready:
                if request.id in wanted:
                    self._guides.open(request, matcher)
            if wanted:
                self._forward([request for request, _ in ready if request.id in wanted])
        if given_up := [Output(request.id, [], "abort") for request, _ in ready if request.id not in wanted]:
            self._send(Outputs(given_up))

    def _refuse(self, request: Request, message: str) -> None:
        with self._lock:
            wanted = self._pending.pop(request.id)
        self._send(Outputs([Output(request.id, [], *(("error", message) if wanted else ("abort", None)))]))

    def _forward(self, requests: list[Request]) -> None:
        message = Add(requests)
        self._pass_on(message, json.dumps(to_wire(message), separators=(",", ":")).encode())
