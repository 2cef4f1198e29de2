"""/v1/chat/completions, /v1/completions, and the few that need no engine's work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp

from tpctl.client.fields import FieldError, flag
from tpctl.client.forms import Wanted
from tpctl.client.openai_fields import settings
from tpctl.errors import shown
from tpctl.serve.answered import Answered, Said
from tpctl.serve.asked import Reader, Streaming, check_ids, read_prompts
from tpctl.serve.errors import ApiError
from tpctl.serve.pool import Pool
from tpctl.serve.responses import ResponseWriter, read_response
from tpctl.serve.text_writer import PromptLogprobs, TextWriter
from tpctl.serve.writers import ChatWriter


class Endpoints:
    """What requests to one model are answered with."""

    def __init__(self, pool: Pool, reader: Reader, names: tuple[str, ...], interval: int = 1) -> None:
        """``names``: what the model is called; answers say the first. ``interval``: tokens in a chunk of a stream."""
        self.pool = pool
        self.reader = reader
        self.names = names
        self._interval = interval
        self._created = int(time.time())

    def _told(self, stream: bool) -> int:
        """``Generation.interval`` of an answer that streams, or does not."""
        return self._interval if stream else 0

    async def chat(self, body: dict[str, Any], since: float) -> ASGIApp:
        """/v1/chat/completions. Raises ``ApiError`` or ``RequestError``, as all of these."""
        model = self.model(body)
        streaming = Streaming.taken(body)
        messages = _taken(body, "messages")
        wanted = settings(body, chat=True)
        _check_stream(wanted, streaming)
        with self.pool.reserve(wanted.choices) as info:
            job = await self.reader.conversation(messages, wanted, info)
            generation = self.pool.begin([job], self._told(streaming.wanted))
        self.pool.metrics.begun(generation, since)
        writer = ChatWriter(model, [job], generation, self.reader.tokenizer, streaming)
        return Answered(generation, writer, self.reader.run)

    async def complete(self, body: dict[str, Any], since: float) -> ASGIApp:
        """/v1/completions."""
        model = self.model(body)
        streaming = Streaming.taken(body)
        echo = flag(body.pop("echo", False), "echo")
        prompts = read_prompts(_taken(body, "prompt"))
        wanted, scored = _scored(settings(body, chat=False))
        _check_stream(wanted, streaming)
        told = PromptLogprobs(wanted.fields.get("prompt_logprobs"), wanted.fields.get("logprobs") if echo else None)
        wanted = replace(wanted, fields={**wanted.fields, "prompt_logprobs": told.most})
        with self.pool.reserve(wanted.choices * len(prompts)) as info:
            jobs = await self.reader.texts(prompts, wanted, info)
            texts = None
            if echo:
                texts = [prompt if isinstance(prompt, str) else await self._text(prompt) for prompt in prompts]
            generation = self.pool.begin(jobs, self._told(streaming.wanted))
        self.pool.metrics.begun(generation, since)
        writer = TextWriter(texts, told, scored, model, jobs, generation, self.reader.tokenizer, streaming)
        return Answered(generation, writer, self.reader.run)

    async def respond(self, body: dict[str, Any], since: float) -> ASGIApp:
        """/v1/responses."""
        model = self.model(body)
        stream = flag(body.pop("stream", False), "stream")
        asked = read_response(body)
        with self.pool.reserve(1) as info:
            job = await self.reader.conversation(asked.messages, asked.wanted, info)
            generation = self.pool.begin([job], self._told(stream))
        self.pool.metrics.begun(generation, since)
        writer = ResponseWriter(model, asked, job, generation, self.reader.tokenizer)
        return Answered(generation, writer, self.reader.run)

    async def tokenize(self, body: dict[str, Any], since: float) -> ASGIApp:
        """/tokenize: of a text, or of a conversation as the chat template has it."""
        self.model(body)
        texts = flag(body.pop("return_token_strs", False), "return_token_strs")
        tokenizer = self.reader.tokenizer
        if "messages" in body and "prompt" in body:
            raise FieldError("the body has both a prompt and messages; give one of them", "prompt")
        if "messages" in body:
            messages, variables = body.pop("messages"), body.pop("chat_template_kwargs", None)
            _refuse_rest(body, "/tokenize")
            ids = await self.reader.run(self.reader.render, messages, variables, None)
        else:
            if "prompt" not in body:
                raise FieldError("the body has neither a prompt nor messages; give one of them", "prompt")
            prompt, special = body.pop("prompt"), flag(body.pop("add_special_tokens", True), "add_special_tokens")
            _refuse_rest(body, "/tokenize")
            if not isinstance(prompt, str):
                raise FieldError(f"prompt is {shown(prompt)}, but must be a text", "prompt")
            ids = await self.reader.run(tokenizer.encode if special else tokenizer.encode_rendered, prompt)
        most = 0 if self.pool.info is None else self.pool.info.max_model_len
        found: dict[str, Any] = {"count": len(ids), "max_model_len": most, "tokens": ids}
        if texts:
            found["token_strs"] = [tokenizer.backend.id_to_token(id) for id in ids]
        return Said(found)

    async def detokenize(self, body: dict[str, Any], since: float) -> ASGIApp:
        """/detokenize."""
        self.model(body)
        ids = _taken(body, "tokens")
        _refuse_rest(body, "/detokenize")
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise FieldError(f"tokens is {shown(ids)}, but must be a list of token ids", "tokens")
        return Said({"prompt": await self._text(ids)})

    def tokenizer_info(self) -> Said:
        """/tokenizer_info: what lm-eval asks for, in the place of a tokenizer of its own."""
        tokenizer = self.reader.tokenizer
        return Said({**tokenizer.special_tokens, "chat_template": tokenizer.template_source})

    def models(self) -> Said:
        """/v1/models: by this, too, is seen whether requests are taken."""
        info = self.pool.check_open(0)
        return Said({"object": "list", "data": [self._model(name, info.max_model_len) for name in self.names]})

    def one_model(self, name: str) -> Said:
        """/v1/models/NAME."""
        self.model({"model": name})
        return Said(self._model(name, self.pool.check_open(0).max_model_len))

    def health(self) -> Said:
        """/health: 200 only when requests are taken."""
        pool = self.pool
        state = "ready" if pool.ready else "failed" if pool.failure else "ending" if pool.closing else "loading"
        return Said({"status": state}, 200 if pool.ready else 503)

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

    async def _text(self, ids: list[int]) -> str:
        tokenizer = self.reader.tokenizer
        check_ids(ids, max(tokenizer.backend.get_vocab_size(), 1), "tokens")
        return await self.reader.run(lambda: tokenizer.decode(ids, skip_special=False))


def _scored(wanted: Wanted) -> tuple[Wanted, bool]:
    """What is asked of an engine, and whether that is about prompts alone: no tokens are to follow, but it makes one.

    Raises:
        FieldError: there must be more than none.
    """
    fields = dict(wanted.fields)
    if type(fields.get("max_tokens")) is not int or fields["max_tokens"] != 0:
        return wanted, False
    if fields.pop("min_tokens", 0):
        raise FieldError("min_tokens is set, and max_tokens is 0; leave one of them out", "min_tokens")
    return replace(wanted, fields={**fields, "max_tokens": 1}), True


def _check_stream(wanted: Wanted, streaming: Streaming) -> None:
    if streaming.wanted and wanted.fields.get("prompt_logprobs") is not None:
        raise FieldError("prompt_logprobs are set with stream, which has no place for them; leave one out", "stream")


def _taken(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise FieldError(f"the body has no {name}", name)
    return body.pop(name)


def _refuse_rest(body: Mapping[str, Any], path: str) -> None:
    if body:
        raise FieldError(f"unknown field {min(body)!r} in the body of a request to {path}", min(body))
