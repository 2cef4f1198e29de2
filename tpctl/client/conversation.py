"""A chat of several turns with one engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.client.engine_client import EngineClient
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.engine.sampling_params import SamplingParams
from tpctl.errors import CheckpointError, RequestError
from tpctl.launch.messages import Request

CHAT_DEFAULTS: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_POLL = 0.1  # seconds between looks at whether the answer should stop


@dataclass(frozen=True)
class Answer:
    """One finished turn.

    ``finish_reason`` is "stop", "length" or "abort"; token counts are of this turn's whole prompt (the
    conversation so far), of those of its tokens that the prefix cache held, and of the answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


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
        self._turns = itertools.count()
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []

    def ask(self, text: str, show: Callable[[str], None], should_stop: Callable[[], object] = lambda: False) -> Answer:
        """Say ``text`` and wait for the answer, which becomes part of the conversation (also if cut short).

        Args:
            show: called with each new piece of the answer.
            should_stop: asked often; once true, the answer ends.

        Raises:
            RequestError: the conversation is too long, or the template refuses it; ``text`` is forgotten
                then.
            EngineError: the workers failed.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        token_ids = self._tokenizer.encode_chat(messages)
        room = self._client.wait_ready()["max_model_len"] - len(token_ids)
        self._check_room(len(token_ids), room)
        values = {**self._sampling, "max_tokens": min(self._sampling.get("max_tokens", room), room)}
        request = Request(f"turn-{next(self._turns)}", token_ids, SamplingParams.from_dict(values))
        stream = TextStream(self._tokenizer, self._stop, token_ids)
        self._client.submit([request])
        asked_to_stop = False
        done = False
        while not done:
            if not asked_to_stop and (stream.stopped_early or should_stop()):
                asked_to_stop = True
                self._client.abort([request.id])
            for output in self._client.outputs(timeout=_POLL):
                if output.id != request.id:
                    continue
                if output.finish_reason == "error":
                    raise RequestError(output.message or "the engine refused the request")
                if piece := stream.push(output):
                    show(piece)
                done = output.finish_reason is not None
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
        return Answer(
            stream.text,
            stream.finish_reason or "abort",
            len(token_ids),
            stream.num_cached_tokens,
            len(stream.token_ids),
        )

    @property
    def begun(self) -> bool:
        """Whether there is something to forget."""
        return any(message["role"] != "system" for message in self.messages)

    def _check_room(self, num_tokens: int, room: int) -> None:
        if room > 0:
            return
        most = num_tokens + room - 1
        if self.begun:
            what, so = "the conversation has", "begin a new one with /reset,"
        else:
            what = "the message has" if self._system is None else "the system prompt and the message have"
            so = "shorten it," if self._system is None else "shorten them,"
        raise RequestError(
            f"{what} {num_tokens} tokens with what the chat template adds, but at most {most} leave room for an "
            f"answer; {so} or raise --max-model-len, or --kv-cache-memory if that is the limit"
        )


def recommended_sampling(
    folder: Path, given: Mapping[str, Any] | None = None, shown: str | None = None
) -> dict[str, Any]:
    """Sampling for chat: ``given``, over what the model's ``generation_config.json`` sets, over our own defaults.

    ``"do_sample": false`` there asks for greedy answers, whatever temperature stands beside it.

    Args:
        shown: what messages call ``folder``, where it is a copy that its user does not know.

    Raises:
        CheckpointError: the file holds a value that nothing can be sampled with, and that ``given`` does not replace.
    """
    file = folder / "generation_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    if not isinstance(config, dict):
        config = {}
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
    return {**CHAT_DEFAULTS, **values, **given}
