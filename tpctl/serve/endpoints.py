"""/v1/chat/completions, /v1/completions, and the few that need no engine's work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tpctl.client.echoed import PromptLogprobs, scored
from tpctl.client.fields import FieldError, flag
from tpctl.client.forms import Wanted
from tpctl.client.openai_fields import settings
from tpctl.errors import shown
from tpctl.serve.answered import Answered, Said, Writer
from tpctl.serve.asked import Reader, Streaming, read_prompts
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation
from tpctl.serve.memory import Holding, prompt_size, token_size
from tpctl.serve.pool import Job, Pool
from tpctl.serve.response_asked import read_response
from tpctl.serve.responses import ResponseWriter
from tpctl.serve.text_writer import TextWriter
from tpctl.serve.tokens import detokenized, tokenized
from tpctl.serve.writers import ChatWriter


class _Asked(NamedTuple):
    """How an answer is asked for: whether as a stream, and when; and what the request holds. ``keeps``: what is told
    of it is kept as JSON has it until the end."""

    stream: bool
    since: float
    holding: Holding
    keeps: bool = False


class Endpoints:
    """What requests to one model are answered with."""

    def __init__(self, pool: Pool, reader: Reader, names: tuple[str, ...], interval: int = 1) -> None:
        """``names``: what the model is called; answers say the first. ``interval``: tokens in a chunk of a stream."""
        self.pool = pool
        self.reader = reader
        self.names = names
        self._interval = interval
        self._created = int(time.time())

    def _begun(
        self,
        jobs: Sequence[Job],
        wanted: Wanted,
        asked: _Asked,
        make: Callable[[Generation], Writer],
        kept: int = 0,
    ) -> ASGIApp:
        """Hand prompts in; their answer. Where that fails nothing of them stays under way, which nobody would end.

        Args:
            kept: bytes of the body that are needed until the end, beside the prompts.
        """
        stream, holding = asked.stream, asked.holding
        sampling, answers = jobs[0].sampling[0], sum(len(job.sampling) for job in jobs)
        each = token_size(sampling, rows=asked.keeps or not stream)
        holding.prompts(kept + sum(prompt_size(len(job.token_ids), job.sampling) for job in jobs))
        if wanted.fields.get("max_tokens") is not None:
            beside = "" if sampling.logprobs is None else f", each with {sampling.logprobs} likeliest ones"
            what = f"{answers} times {sampling.max_tokens} tokens{beside}"
            holding.fits(answers * sampling.max_tokens * each, what)
        generation = self.pool.begin(jobs, self._interval if stream else 0, holding.answers, each)
        try:
            self.pool.metrics.begun(generation, asked.since)
            tokens = sum(len(job.token_ids) for job in jobs)
            return Answered(generation, make(generation), self.reader.threads.answer, tokens)
        except BaseException:
            generation.close()
            raise

    async def chat(self, body: dict[str, Any], since: float, holding: Holding, client: str) -> ASGIApp:
        """/v1/chat/completions.

        Args:
            client: the host that asks, with which others take turns (``serve.trials``).

        Raises:
            ApiError, RequestError: it cannot be had; as all of these.
        """
        model = self.model(body)
        streaming = Streaming.taken(body)
        messages = _taken(body, "messages")
        wanted = settings(body, chat=True)
        _check_stream(wanted, streaming)
        with self.pool.reserve(wanted.choices) as info:
            job = await self.reader.conversation(messages, wanted, info, client)
            return self._begun(
                [job],
                wanted,
                _Asked(streaming.wanted, since, holding),
                lambda generation: ChatWriter(model, [job], generation, self.reader.tokenizer, streaming),
            )

    async def complete(self, body: dict[str, Any], since: float, holding: Holding, client: str) -> ASGIApp:
        """/v1/completions."""
        model = self.model(body)
        streaming = Streaming.taken(body)
        echo = flag(body.pop("echo", False), "echo")
        prompts = read_prompts(_taken(body, "prompt"))
        wanted, empty = scored(settings(body, chat=False))
        _check_stream(wanted, streaming)
        told = PromptLogprobs(wanted.fields.get("prompt_logprobs"), wanted.fields.get("logprobs") if echo else None)
        wanted = replace(wanted, fields={**wanted.fields, "prompt_logprobs": told.most})
        with self.pool.reserve(wanted.choices * len(prompts)) as info:
            jobs = await self.reader.texts(prompts, wanted, info, client)
            texts = await self.reader.echoed(prompts) if echo else None
            return self._begun(
                jobs,
                wanted,
                _Asked(streaming.wanted, since, holding),
                lambda generation: TextWriter(
                    texts, told, empty, model, jobs, generation, self.reader.tokenizer, streaming
                ),
                2 * (1 + wanted.choices) * sum(map(len, texts or ())),
            )

    async def respond(self, body: dict[str, Any], since: float, holding: Holding, client: str) -> ASGIApp:
        """/v1/responses."""
        model = self.model(body)
        stream = flag(body.pop("stream", False), "stream")
        asked = read_response(body)
        with self.pool.reserve(1) as info:
            job = await self.reader.conversation(asked.messages, asked.wanted, info, client)
            return self._begun(
                [job],
                asked.wanted,
                _Asked(stream, since, holding, keeps=True),
                lambda generation: ResponseWriter(model, asked, job, generation, self.reader.tokenizer),
                asked.size,
            )

    async def tokenize(self, body: dict[str, Any], since: float, holding: Holding, client: str) -> ASGIApp:
        """/tokenize."""
        self.model(body)
        return await tokenized(body, self.reader, self._max_model_len)

    async def detokenize(self, body: dict[str, Any], since: float, holding: Holding, client: str) -> ASGIApp:
        """/detokenize."""
        self.model(body)
        return await detokenized(body, self.reader, self._max_model_len)

    def tokenizer_info(self) -> Said:
        """/tokenizer_info: what lm-eval asks for, in the place of a tokenizer of its own."""
        tokenizer = self.reader.tokenizer
        return Said({**tokenizer.special_tokens, "chat_template": tokenizer.template_source})

    def models(self) -> Said:
        """/v1/models: by this, too, is seen whether requests are taken."""
        info = self.pool.check_open(0)
        return Said({"object": "list", "data": [self._model(name, info.max_model_len) for name in self.names]})

    def one_model(self, name: str) -> Said:
        """/v1/models/NAME. Raises ``HTTPException`` for no name, which here is no first one's."""
        if not name:
            raise HTTPException(404)
        return Said(self._model(self.model({"model": name}), self.pool.check_open(0).max_model_len))

    def health(self) -> Said:
        """/health: 200 only when requests are taken, and engines answer them."""
        pool = self.pool
        state = "failed" if pool.failure else "ending" if pool.closing else "ready" if pool.ready else "loading"
        if state == "ready" and pool.stalled:
            state = "stalled"
        return Said({"status": state}, 200 if state == "ready" else 503)

    def model(self, body: dict[str, Any]) -> str:
        """Take the model's name out of a body; one that is not given is the first."""
        name = body.pop("model", "")
        if not isinstance(name, str):
            raise FieldError(f"model is {shown(name)}, but must be a text", "model")
        name = name or self.names[0]
        if name not in self.names:
            known = " or ".join(self.names)
            said = f"the model {shown(name)} does not exist here; this server has {known}"
            raise ApiError(404, said, param="model", code="model_not_found")
        return name

    def _model(self, name: str, max_model_len: int) -> dict[str, Any]:
        said = {"id": name, "object": "model", "created": self._created, "owned_by": "tpctl", "root": self.names[0]}
        return {**said, "max_model_len": max_model_len}

    @property
    def _max_model_len(self) -> int:
        """0 while that is not known."""
        return 0 if self.pool.info is None else self.pool.info.max_model_len


def _check_stream(wanted: Wanted, streaming: Streaming) -> None:
    if streaming.wanted and wanted.fields.get("prompt_logprobs") is not None:
        raise FieldError("prompt_logprobs are set with stream, which has no place for them; leave one out", "stream")


def _taken(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise FieldError(f"the body has no {name}", name)
    return body.pop(name)
