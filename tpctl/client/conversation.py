"""A chat of several turns with one engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.client.chat_messages import REASONING
from tpctl.client.engine_client import EngineClient
from tpctl.client.guides import guided
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, RequestError
from tpctl.json_file import read_object
from tpctl.wire.messages import Output, Request
from tpctl.wire.sampling import SamplingParams

CHAT_DEFAULTS: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_POLL = 0.1  # seconds between looks at whether the answer should stop

Show = Callable[[str], object]
"""Is given a text piece by piece."""


def _unseen(piece: str) -> None:
    pass


@dataclass(frozen=True)
class Answer:
    """One finished turn.

    ``reasoning`` is what was thought before ``text``, ``None`` where the model's template marks no thoughts.
    ``finish_reason`` is "stop", "length" or "abort"; token counts are of this turn's whole prompt (the
    conversation so far), of those of its tokens that the prefix cache held, and of the answer. ``note`` says what cut a
    "length", where that was not ``max_tokens``. Seconds are counted from the request to the first
    token (``None``: there was none) and to the last.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    note: str | None = None
    reasoning: str | None = None
    seconds_to_first: float | None = None
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of those behind the first, which waits for the prompt; ``None`` where there are none."""
        if self.seconds_to_first is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.seconds - self.seconds_to_first, 1e-9)


class Conversation:
    """Messages so far, and how to get the next answer.

    The whole conversation is submitted every time; the engine's prefix cache makes the known part cheap.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Begin.

        Args:
            sampling: fields of ``SamplingParams``; without ``max_tokens`` an answer may fill the context.
            stop: texts that end an answer.
        """
        self._client = client
        self._tokenizer = tokenizer
        self._system = system
        self._sampling = dict(sampling or {})
        self._stop = tuple(stop)
        self._requests = itertools.count()
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def system(self) -> str | None:
        return self._system

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The fields of ``SamplingParams`` that are set; without ``max_tokens`` an answer may fill the context."""
        return self._sampling

    @property
    def stop(self) -> tuple[str, ...]:
        return self._stop

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages but for the system prompt: the user's and the model's in turn."""
        return self.messages[len(self._opening()) :]

    @property
    def begun(self) -> bool:
        """Whether there is something to forget."""
        return bool(self.turns)

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        self.messages = self._opening()

    def set_system(self, text: str | None) -> None:
        """Use another system prompt from now on, or none.

        Raises:
            RequestError: the model's template takes none, or not this one.
        """
        opening = [] if text is None else [{"role": "system", "content": text}]
        messages = [*opening, *self.turns]
        self._tokenizer.encode_chat([*messages, {"role": "user", "content": "?"}])
        self._system, self.messages = text, messages

    def set_sampling(self, name: str, value: Any) -> None:
        """Set a field of ``SamplingParams``; ``None`` returns it to its default.

        Raises:
            RequestError: there is no such field, or the value is not one for it, or not beside the others.
        """
        values = {key: old for key, old in self._sampling.items() if key != name}
        if value is not None:
            values[name] = value
        SamplingParams.from_dict({"max_tokens": self.max_model_len, **values})
        self._sampling = values

    def set_stop(self, stop: Sequence[str]) -> None:
        """The texts that end an answer."""
        self._stop = tuple(stop)

    @property
    def max_model_len(self) -> int:
        """Tokens of the conversation at most."""
        return self._client.wait_ready().max_model_len

    def drafts(self) -> tuple[str, int, int] | None:
        """What proposes tokens (``EngineInfo.speculation``), how many it has proposed since the engine started, and how
        many of them became part of an answer; ``None``: nothing does.

        Raises:
            EngineError: the workers failed.
        """
        kind = self._client.wait_ready().speculation
        if kind == "off":
            return None
        stats = self._client.stats()
        return kind, stats.draft_tokens, stats.accepted_tokens

    def restore(
        self, system: str | None, turns: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], stop: Sequence[str]
    ) -> None:
        """Go on from where another conversation was.

        Raises:
            RequestError: the model's template refuses the messages, or a field of ``sampling`` is wrong.
        """
        SamplingParams.from_dict({"max_tokens": self.max_model_len, **sampling})
        opening = [] if system is None else [{"role": "system", "content": system}]
        messages = [*opening, *(dict(turn) for turn in turns)]
        self._tokenizer.encode_chat([*messages, {"role": "user", "content": "?"}])
        self._system, self.messages = system, messages
        self._sampling, self._stop = dict(sampling), tuple(stop)

    def ask(
        self, text: str, show: Show, should_stop: Callable[[], object] = lambda: False, think: Show = _unseen
    ) -> Answer:
        """Say ``text`` and wait for the answer, which becomes part of the conversation (also if cut short).

        What was thought before it does too, where the model's template reads that; whether it is shown to the model
        again is for the template to say.

        Where it is stopped before it begins, ``text`` is taken back: else the next message would wait for it.

        Args:
            show: called with each new piece of the answer.
            should_stop: asked often; once true, the answer ends at once. The engine gives the request up after the
                step that it is at.
            think: called with each new piece of what is thought before it.

        Raises:
            RequestError: the conversation is too long, or the template refuses it; ``text`` is forgotten
                then.
            EngineError: the workers failed.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        return self._answer(messages, self._sampling, show, should_stop, think)

    def regenerate(
        self, show: Show, should_stop: Callable[[], object] = lambda: False, think: Show = _unseen
    ) -> Answer:
        """Another answer to the last message, in place of the one it got.

        Where answers are sampled, the seed becomes the next one: the same would say the same.

        Raises:
            RequestError: there is no answer yet; else as ``ask``. The old answer stays then.
            EngineError: the workers failed.
        """
        if not self.turns:
            raise RequestError("there is no answer yet that could be made anew; say something first")
        sampling = {**self._sampling, "seed": (self._sampling.get("seed", 0) + 1) % 2**63}
        answer = self._answer(self.messages[:-1], sampling, show, should_stop, think)
        self._sampling = sampling
        return answer

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system is not None else []

    def _answer(
        self,
        messages: list[dict[str, str]],
        sampling: Mapping[str, Any],
        show: Show,
        should_stop: Callable[[], object],
        think: Show,
    ) -> Answer:
        token_ids = self._tokenizer.encode_chat(messages, most=self.max_model_len - 1)
        room = self.max_model_len - len(token_ids)
        self._check_room(len(token_ids), room)
        # One token more than there is room for: the engine ends the answer there, and says why.
        most = min(sampling.get("max_tokens", room + 1), room + 1)
        values = {**sampling, "max_tokens": most, "min_tokens": min(sampling.get("min_tokens", 0), most)}
        form = self._tokenizer.reasoning
        wanted = guided(SamplingParams.from_dict(values), self._tokenizer, token_ids, form)
        request, least = Request(f"turn-{next(self._requests)}", token_ids, wanted), wanted.min_tokens
        stream = TextStream(self._tokenizer, self._stop, token_ids, least, form)
        note: str | None = None
        started = time.monotonic()
        first: float | None = None
        with self._client.mailbox() as mailbox:
            mailbox.submit([request])
            while stream.finish_reason is None:
                # Closing the mailbox aborts it, and nobody waits for that, which may take the rest of a long step.
                given_up = [Output(request.id, [], "abort")] if should_stop() else None
                for output in given_up or mailbox.outputs(timeout=_POLL):
                    if output.finish_reason == "error":
                        raise RequestError(output.message or "the engine refused the request")
                    if output.token_ids and first is None:
                        first = time.monotonic() - started
                    for segment in stream.push(output):
                        (think if segment.reasoning else show)(segment.text)
                    note = output.message
        if stream.token_ids or stream.finish_reason != "abort":
            self.messages = [*messages, self._turn(stream)]
        return Answer(
            stream.text,
            stream.finish_reason,
            len(token_ids),
            stream.num_cached_tokens,
            len(stream.token_ids),
            note if stream.finish_reason == "length" else None,
            stream.reasoning,
            first,
            time.monotonic() - started,
        )

    def _turn(self, stream: TextStream) -> dict[str, str]:
        """An answer as a message."""
        turn = {"role": "assistant", "content": stream.text}
        if stream.reasoning and self._tokenizer.template.uses.reads(REASONING[0]):
            turn[REASONING[0]] = stream.reasoning
        return turn

    def _check_room(self, num_tokens: int, room: int) -> None:
        if room > 0:
            return
        most = num_tokens + room - 1
        if self.turns:
            what, so = "the conversation has", "begin a new one with /reset,"
        else:
            what = "the message has" if self._system is None else "the system prompt and the message have"
            so = "shorten it," if self._system is None else "shorten them,"
        raise RequestError(
            f"{what} {num_tokens} tokens with what the chat template adds, but at most {most} leave room for an "
            f"answer; {so} or raise --max-model-len, or --kv-cache-memory if that is the limit"
        )


def recommended_sampling(
    folder: Path,
    given: Mapping[str, Any] | None = None,
    shown: str | None = None,
    defaults: Mapping[str, float] = CHAT_DEFAULTS,
) -> dict[str, Any]:
    """Sampling for chat: ``given``, over what the model's ``generation_config.json`` sets, over ``defaults``.

    ``"do_sample": false`` there asks for greedy answers, whatever temperature stands beside it.

    Args:
        shown: what messages call ``folder``, where it is a copy that its user does not know.

    Raises:
        CheckpointError: the file is no JSON object, or holds a value that nothing can be sampled with and that
            ``given`` does not replace.
    """
    file = folder / "generation_config.json"
    config = read_object(file, default={})
    greedy = {"temperature": 0.0} if config.get("do_sample") is False else {}
    given = given or {}
    found = {name: config[name] for name in _RECOMMENDED if config.get(name) is not None and name not in given}
    values = {**found, **greedy}
    for name, value in values.items():
        try:
            SamplingParams.from_dict({name: value})
        except RequestError as error:
            option = name.replace("_", "-")
            name = f"{shown or folder}/{file.name}"
            raise CheckpointError(f"{name}: {error}; correct the file, or give --{option}") from None
    return {**defaults, **values, **given}
