"""An engine for a server's tests: the client's own router, behind which a thread answers token by token."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.unit.fake_client import engine_info, engine_stats
from tpctl.client.router import Mailbox, Router, Sink
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, TpctlError
from tpctl.wire.guide import BUSY
from tpctl.wire.messages import Abort, Add, Output, Request
from tpctl.wire.report import EngineInfo, EngineStats, TokenLogprob


def echoed(tokenizer: Tokenizer, request: Request) -> str:
    """A prompt between angle brackets."""
    return f"<{tokenizer.decode(request.token_ids, skip_special=False)}>"


class FakeEngine:
    """Answers each request with a text of its prompt's, a token a step, and an end-of-sequence token.

    Attributes:
        open: requests under way, with the tokens still to come.
        requests: all that were taken in; ``aborted``: ids, as the engine knows them.
        gate: steps are made while it is set; ``pace``: seconds that each one takes at least.
        closed: nothing is answered any more.
        router: what brings outputs to those who asked.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        say: Callable[[Tokenizer, Request], str] = echoed,
        max_model_len: int = 512,
        loading: bool = False,
    ) -> None:
        self.info: EngineInfo = engine_info(
            max_model_len=max_model_len, wanted_model_len=max_model_len, vocab_size=tokenizer.backend.get_vocab_size()
        )
        self.open: dict[str, tuple[Request, deque[int], int]] = {}
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pace = 0.0
        self.ready = threading.Event()
        if not loading:
            self.ready.set()
        self.closed = False
        self.failure: TpctlError | None = None
        self._tokenizer = tokenizer
        self._say = say
        self._wake = threading.Condition()
        self.router = Router(self._send, lambda: self.info.max_model_len)
        threading.Thread(target=self._run, daemon=True).start()

    def wait_ready(self, told: Callable[[str], object] | None = None) -> EngineInfo:
        if told is not None and not self.ready.is_set():
            told("compiling 113 kernels")
        self.ready.wait()
        if self.closed:
            raise self.failure or EngineError("the engine is closed")
        return self.info

    def mailbox(self, sink: Sink | None = None) -> Mailbox:
        return self.router.mailbox(sink)

    def stats(self) -> EngineStats:
        return engine_stats(num_blocks=10, free_blocks=4, running=len(self.open), preemptions=3, held_steps=2)

    def close(self) -> None:
        with self._wake:
            self.closed = True
            self._wake.notify()
        self.ready.set()
        self.gate.set()
        self.router.fail(self.failure or EngineError("the engine is closed"))  # as the client does

    def die(self, message: str = "rank 1 was killed (SIGKILL)") -> None:
        self.failure = EngineError(message)
        self.close()

    def _send(self, message: Add | Abort) -> None:
        if self.failure is not None:
            raise self.failure
        with self._wake:
            if isinstance(message, Add):
                for request in message.requests:
                    self.requests.append(request)
                    text = self._say(self._tokenizer, request)
                    ids = [*self._tokenizer.encode(text), self._tokenizer.backend.token_to_id("</s>")]
                    self.open[request.id] = (request, deque(ids), 0)
            else:
                self.aborted += message.ids
                known = [id for id in message.ids if self.open.pop(id, None) is not None]
                self.router.deliver([Output(id, [], "abort") for id in known])
            self._wake.notify()

    def _run(self) -> None:
        while not self.closed:
            self.gate.wait()
            with self._wake:
                self._wake.wait_for(lambda: self.open or self.closed)
                outputs = [self._next(id) for id in list(self.open)]
                self.router.deliver(outputs)
            time.sleep(self.pace)

    def _next(self, id: str) -> Output:
        request, ids, done = self.open[id]
        if self._tokenizer.decode(request.token_ids).endswith("break"):
            del self.open[id]
            return Output(id, [], "error", "the scores are not finite")
        if (guide := request.sampling.guide) is not None and "slow" in guide.text:
            del self.open[id]
            return Output(id, [], "error", BUSY)
        if (guide := request.sampling.guide) is not None and "stuck" in guide.text:
            del self.open[id]
            return Output(id, [], "error", f"{guide.name}: the grammar has no text that could follow")
        token, done = ids.popleft(), done + 1
        reason = "stop" if not ids else "length" if done >= request.sampling.max_tokens else None
        if reason is None:
            self.open[id] = (request, ids, done)
        else:
            del self.open[id]
        wanted = request.sampling.logprobs
        begun = request.sampling.prompt_logprobs
        prompt = None if begun is None or done > 1 else [TokenLogprob(-0.25, [])] * (len(request.token_ids) - 1)
        told: Any = None if wanted is None else [TokenLogprob(-0.5, [(token, -0.5), (1, -2.0)][:wanted])]
        return Output(id, [token], reason, None, told, num_cached_tokens=2, prompt_logprobs=prompt)
