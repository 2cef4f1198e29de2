"""A tokenizer of single bytes, and an engine client without processes that answers p with <p>."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tpctl.client.jobs import JobParser
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, TpctlError
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineInfo, EngineStats, TokenLogprob

TEMPLATE = (
    "{% for message in messages %}[{{ message.role[0] }}]{{ message.content }}{% endfor %}"
    "{% if messages[-1].content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}[a]"
)


def write_tokenizer(
    folder: Path, *, template: str | None = TEMPLATE, special: Sequence[str] = (), added: Sequence[str] = ()
) -> Path:
    """A byte-level tokenizer without merges, as a checkpoint folder holds it.

    Args:
        special: control tokens that it has besides; ``added``: others that it adds.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", *special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


INFO = EngineInfo(
    device="cpu",
    dtype="float32",
    tp_size=2,
    attention_backend="sdpa",
    kv_cache_dtype="float32",
    block_size=16,
    num_blocks=64,
    max_model_len=64,
    wanted_model_len=64,
    kv_cache_bytes=1 << 20,
    all_reduce=None,
    scheduling_policy="fcfs",
    weight_bytes=1 << 20,
    timings={},
    max_num_seqs=8,
)


def engine_info(**changes: Any) -> EngineInfo:
    """What a small engine of two ranks on a CPU would say of itself."""
    return replace(INFO, **changes)


def engine_stats(**counters: int) -> EngineStats:
    """Counters that are 0, but for some."""
    return EngineStats(**{field.name: counters.pop(field.name, 0) for field in fields(EngineStats)}, **counters)


class FakeClient:
    """Stands in for ``EngineClient``.

    Attributes:
        requests: everything that was submitted.
        aborted: ids, in the order in which they were aborted.
        most_open: requests that were under way at once, at most.
        policies: scheduling policies that engines were asked for.
        context_full: what answers are told that end with the context.
        dies_after: calls of ``outputs`` until the engine "fails".
        told: who wants to know when it does.
        answers: what it says to the next requests; without, it echoes.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int = 64, dies_after: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._open: dict[str, tuple[Request, int, list[int]]] = {}  # with the answer's tokens, and those to come
        self._ended: list[Output] = []
        self.max_model_len = max_model_len
        self.dies_after = dies_after
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.most_open = 0
        self.context_full: str | None = None
        self.policies: list[str] = []
        self.told: list[Callable[[TpctlError], None]] = []
        self.answers: list[str] = []
        self.failure: TpctlError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait_ready(self, told: object = None) -> EngineInfo:
        return engine_info(max_model_len=self.max_model_len, wanted_model_len=self.max_model_len)

    def mailbox(self) -> FakeMailbox:
        return FakeMailbox(self)

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.requests.append(request)
            text = self.answers.pop(0) if self.answers else f"<{self._tokenizer.decode(request.token_ids)}>"
            answer = [*self._tokenizer.encode(text), self._tokenizer.backend.token_to_id("</s>")]
            self._open[request.id] = (request, len(answer), answer)
        self.most_open = max(self.most_open, len(self._open))

    def outputs(self, timeout: float | None = None) -> list[Output]:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise EngineError("rank 1 was killed (SIGKILL)")
        outputs, self._ended = self._ended, []
        for id, (request, whole, rest) in list(self._open.items()):
            if self._tokenizer.decode(request.token_ids).startswith("refuse"):
                outputs.append(Output(id, [], "error", "the engine refuses"))
                del self._open[id]
                continue
            if request.sampling.regex == "stuck":
                outputs.append(Output(id, [], "error", "regex: the grammar has no text that could follow"))
                del self._open[id]
                continue
            outputs.append(self._next(request, whole, rest))
            if outputs[-1].finish_reason is not None:
                del self._open[id]
        return outputs

    def failure_now(self) -> TpctlError | None:
        return self.failure

    def on_failure(self, callback: Callable[[TpctlError], None]) -> None:
        self.told.append(callback)

    def fail(self, reason: TpctlError) -> None:
        self.failure = reason
        for callback in self.told:
            callback(reason)

    def abort(self, ids: Iterable[str]) -> None:
        for id in list(ids):
            self.aborted.append(id)
            if self._open.pop(id, None) is not None:
                self._ended.append(Output(id, [], "abort"))

    def stats(self) -> EngineStats:
        return engine_stats(preemptions=3)

    def _next(self, request: Request, whole: int, rest: list[int]) -> Output:
        token = rest.pop(0)
        answered = whole - len(rest)
        reason = "stop" if not rest else "length" if answered >= request.sampling.max_tokens else None
        full = self.context_full is not None and len(request.token_ids) + answered >= self.max_model_len
        if full:
            reason = "length"
        logprobs = [TokenLogprob(-0.5, [(token, -0.5)])] if request.sampling.logprobs is not None else None
        if request.token_ids == self._tokenizer.encode("nan"):
            logprobs = [TokenLogprob(float("nan"), [])]
        told = request.sampling.prompt_logprobs is not None and answered == 1
        prompt = [TokenLogprob(-0.25, []) for _ in request.token_ids[1:]] if told else None
        said = self.context_full if full else None
        return Output(request.id, [token], reason, said, logprobs, num_cached_tokens=1, prompt_logprobs=prompt)


class FakeMailbox:
    """A consumer's share of a ``FakeClient``, with ``Mailbox``'s methods."""

    def __init__(self, client: FakeClient) -> None:
        self._client = client
        self._ids: set[str] = set()
        self._open: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort(sorted(self._open))

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self._ids |= {request.id for request in requests}
        self._open |= {request.id for request in requests}
        self._client.submit(requests)

    def outputs(self, timeout: float | None = None) -> list[Output]:
        outputs = [output for output in self._client.outputs(timeout) if output.id in self._ids]
        self._open -= {output.id for output in outputs if output.finish_reason is not None}
        return outputs

    def abort(self, ids: Iterable[str]) -> None:
        ids = list(ids)
        self._open -= set(ids)
        self._client.abort(ids)


def job_parser(tokenizer: Tokenizer, **sampling: Any) -> JobParser:
    """What reads lines for the tests of batch."""
    return JobParser(tokenizer, sampling={"max_tokens": 30, **sampling}, stop=["default"], max_model_len=64)


class ScriptedPrompt:
    """Somebody at a terminal, who types ``left``; an exception there is raised."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.left = list(lines)
        self.error: TpctlError | None = None

    def read(self) -> str:
        if self.error is not None:
            raise self.error
        if not self.left:
            raise EOFError
        line = self.left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def fail(self, error: TpctlError) -> None:
        self.error = error
