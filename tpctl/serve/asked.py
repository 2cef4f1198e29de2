"""From the body of a request to prompts in tokens and how they are to be answered."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tpctl.client import guides
from tpctl.client.batch import CHOICES_APART
from tpctl.client.chat_messages import check_messages
from tpctl.client.fields import FieldError, asked_as, flag, given, refuse
from tpctl.client.forms import SAMPLING_FIELDS, Wanted, read_stop, read_variables
from tpctl.client.guides import called
from tpctl.client.openai_schemas import MOST_MESSAGES, MOST_PROMPTS, NOT_IN_STREAMS, STREAM_OPTIONS
from tpctl.client.reasoning import Form
from tpctl.client.text_stream import TextStream
from tpctl.client.token_ids import begins_with_id, check_ids
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tool_grammar import formed
from tpctl.client.tool_stream import check_tools
from tpctl.client.tools.asked import Tools, with_tools
from tpctl.errors import RequestError, TooLongError, shorten, shown
from tpctl.serve.errors import ApiError
from tpctl.serve.pool import Job
from tpctl.serve.threads import Threads
from tpctl.wire.guide import NAMES as GUIDES
from tpctl.wire.report import EngineInfo
from tpctl.wire.sampling import SamplingParams

T = TypeVar("T")

TOO_LONG = "context_length_exceeded"
"""The code of errors that say that a prompt, or prompt and answer, have too many tokens."""


@dataclass(frozen=True)
class Streaming:
    """Whether an answer is to come as it grows, and what is said beside it."""

    wanted: bool = False
    usage: bool = False
    continuous_usage: bool = False

    @classmethod
    def taken(cls, body: dict[str, Any]) -> Streaming:
        """Take ``stream`` and ``stream_options`` out of a body. Raises ``FieldError``."""
        wanted = flag(body.pop("stream", False), "stream")
        options = body.pop("stream_options", None)
        if options is None:
            return cls(wanted)
        if not wanted:
            raise FieldError(f"stream_options is {shown(options)}, but stream is not true", "stream_options")
        if not isinstance(options, dict):
            raise FieldError(f"stream_options is {shown(options)}, but must be a JSON object", "stream_options")
        left = given(options)
        if unknown := left.keys() - STREAM_OPTIONS["properties"].keys():
            raise FieldError(f"unknown field {shorten(repr(min(unknown)))} in stream_options", "stream_options")
        refuse(left, NOT_IN_STREAMS)
        usage, continuous = (
            flag(left.get(name, False), f"stream_options.{name}")
            for name in ("include_usage", "continuous_usage_stats")
        )
        return cls(True, usage or continuous, continuous)


class Reader:
    """Makes jobs of what is asked for; slow work is done by threads, so that the event loop goes on."""

    def __init__(self, tokenizer: Tokenizer, defaults: Mapping[str, Any], threads: Threads) -> None:
        """Prepare.

        Args:
            defaults: fields of ``SamplingParams`` that hold where a request says nothing.
        """
        self.tokenizer = tokenizer
        self.tokenizer.shared = True
        self.threads = threads
        self._defaults = defaults

    async def conversation(self, messages: Any, wanted: Wanted, info: EngineInfo, client: str = "") -> Job:
        """A chat's; its answers are told from what is thought before them.

        Args:
            client: who asks, as far as that is known: grammars of one wait for each other.

        Raises:
            ApiError: it cannot be had.
        """
        return await self._run(client, wanted, self._conversation, messages, wanted, info)

    async def texts(
        self, prompts: Sequence[str | list[int]], wanted: Wanted, info: EngineInfo, client: str = ""
    ) -> list[Job]:
        """Texts' and token ids'. Raises ``ApiError``."""
        return await self._run(client, wanted, self._texts, prompts, wanted, info)

    async def _run(self, client: str, wanted: Wanted, work: Callable[..., T], *arguments: Any) -> T:
        """By the threads for what is wanted."""
        if wanted.tools is not None or any(wanted.fields.get(name) is not None for name in GUIDES):
            return await self.threads.formed(client, work, *arguments)
        return await self.threads.prompt(work, *arguments)

    def interrupt(self) -> None:
        """End what the threads wait for in other processes."""
        self.tokenizer.interrupt()
        guides.interrupt()

    async def echoed(self, prompts: Sequence[str | list[int]]) -> list[str]:
        """The texts of prompts, whose tokens are known to be some."""
        decode = self.tokenizer.decode
        return await self.threads.prompt(
            lambda: [one if isinstance(one, str) else decode(one, skip_special=False) for one in prompts]
        )

    def rendered(self, messages: Any, variables: Any, tools: Tools | None = None) -> str:
        """What the chat template makes of a conversation. Raises ``TpctlError``."""
        if isinstance(messages, list) and len(messages) > MOST_MESSAGES:
            raise RequestError(
                f"messages is a list of {len(messages)}, but at most {MOST_MESSAGES} are taken; leave some out"
            )
        if tools is not None:
            check_tools(self.tokenizer)
        own = with_tools(read_variables(variables), tools)
        return self.tokenizer.template.render(check_messages(messages), variables=own)

    def _conversation(self, messages: Any, wanted: Wanted, info: EngineInfo) -> Job:
        variables, what = wanted.fields.get("chat_template_kwargs"), wanted.names.get("messages", "messages")
        with _asked_in(what), asked_as(wanted.names):
            text = self.rendered(messages, variables, wanted.tools)
            token_ids = self.tokenizer.encode_rendered(text, most=info.max_model_len - 1)
            return self._job(token_ids, wanted, info, None, self.tokenizer.reasoning, what)

    def _texts(self, prompts: Sequence[str | list[int]], wanted: Wanted, info: EngineInfo) -> list[Job]:
        if wanted.fields.get("chat_template_kwargs") is not None:
            raise FieldError("chat_template_kwargs are for messages; leave them out", "chat_template_kwargs")
        jobs = []
        for prompt in prompts:
            most = info.max_model_len - 1
            with _asked_in("prompt"), asked_as(wanted.names):
                token_ids = self.tokenizer.encode(prompt, most=most) if isinstance(prompt, str) else prompt
                jobs.append(self._job(token_ids, wanted, info, 16, None, "prompt"))  # so many are OpenAI's default
        return jobs

    def _job(
        self, token_ids: list[int], wanted: Wanted, info: EngineInfo, most: int | None, form: Form | None, what: str
    ) -> Job:
        """``most``: tokens of an answer where nothing is said of them; ``what``: the field that the prompt is of."""
        fields = wanted.fields
        room = info.max_model_len - len(token_ids)
        name = wanted.names.get("max_tokens", "max_tokens")
        check_room(len(token_ids), fields.get("max_tokens"), info.max_model_len, name, what)
        check_ids(token_ids, info.vocab_size, what)
        own = {name: value for name, value in fields.items() if name in SAMPLING_FIELDS}
        seed = secrets.randbits(63)
        values = {"seed": seed, "max_tokens": min(room, most or room), **self._defaults, **own}
        sampling = SamplingParams.from_dict(values)
        sampling = called(formed(sampling, self.tokenizer, token_ids, form, wanted.tools), wanted.names)
        check_ids(sampling.stop_token_ids, info.vocab_size, "stop_token_ids")
        check_ids([token for token, _ in sampling.logit_bias], info.vocab_size, "logit_bias")
        stop = read_stop(fields["stop"]) if "stop" in fields else ()
        each = [sampling]  # which alone asks for the prompt's log-probabilities: they are the same for all
        for at in range(1, wanted.choices):
            seed = (sampling.seed + at * CHOICES_APART) % 2**63
            each.append(replace(sampling, seed=seed, prompt_logprobs=None))
        tools, least = wanted.tools, sampling.min_tokens
        streams = [TextStream(self.tokenizer, stop, token_ids, least, form, tools) for _ in each]
        return Job(token_ids, each, streams)


def read_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of /v1/completions: a text, token ids, or a list of either. What begins with a token id may go on
    with something else: ``check_ids`` looks at all, once they are known to be no more than a model takes.

    Raises:
        FieldError: it is none of these.
    """
    if begins_with_id(value):
        return [value]
    each = value if isinstance(value, list) else [value]
    if not each or len(each) > MOST_PROMPTS:
        raise FieldError(f"prompt has {len(each)} prompts, but must have from 1 to {MOST_PROMPTS}", "prompt")
    for prompt in each:
        if not (isinstance(prompt, str) and prompt) and not begins_with_id(prompt):
            raise FieldError(
                f"prompt is {shown(prompt)}, but must be a text or a list of token ids, or a list of such, none empty",
                "prompt",
            )
    return each


@contextmanager
def _asked_in(what: str) -> Iterator[None]:
    """What is wrong with messages, and what is too long, is the field ``what``."""
    try:
        yield
    except TooLongError as error:
        raise ApiError(400, str(error), param=what, code=TOO_LONG) from None
    except RequestError as error:
        refused = ApiError.of(error)
        if refused.param == "messages":
            refused.param = what
        raise refused from None


def check_room(
    num_tokens: int, max_tokens: Any, max_model_len: int, name: str = "max_tokens", what: str = "prompt"
) -> None:
    """Refuse a prompt that leaves no room for an answer, or not for one as long as is asked for, as ``name``.

    Args:
        what: the field that the prompt is made of.

    Raises:
        ApiError: it does; the message has both numbers.
    """
    asked = max_tokens if isinstance(max_tokens, int) else 1
    if num_tokens + asked <= max_model_len:
        return
    if max_tokens is None or num_tokens >= max_model_len:
        said = (
            f"the prompt has {num_tokens} tokens, but prompt and answer together may have {max_model_len}, "
            "and an answer at least 1; shorten it"
        )
        raise ApiError(400, said, param=what, code=TOO_LONG)
    raise ApiError(
        400,
        f"the prompt has {num_tokens} tokens, and {name} is {asked}: {num_tokens + asked} in all, but prompt and "
        f"answer together may have {max_model_len}; ask for at most {max_model_len - num_tokens}",
        param=name,
        code=TOO_LONG,
    )
