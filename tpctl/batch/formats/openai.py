"""OpenAI's batch lines, as its Batch API takes and gives them, and as its client's types describe them.

{"custom_id": "q7", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": [{…}]}}
{"id": …, "custom_id": "q7", "response": {"status_code": 200, "request_id": …, "body": {…}}, "error": null}

A line that cannot be run has status 400, one that the engine failed at 500; the body then is OpenAI's error. The model
that a line names is not looked at: the answer says which one gave it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from tpctl.client.forms import SAMPLING_FIELDS, Wanted
from tpctl.client.results import as_they_are, json_row
from tpctl.errors import RequestError, shown

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

MOST_CHOICES = 128

_LINE = frozenset({"custom_id", "method", "url", "body"})
_MEANINGLESS = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_options", "prompt_cache_retention"}
)
"""Fields that change no answer."""

_SAME = (SAMPLING_FIELDS - {"logprobs", "prompt_logprobs", "seed", "max_tokens"}) | {"stop", "chat_template_kwargs"}
"""Fields that mean what tpctl's own of that name mean; some are those that other servers add."""

_NOT_ASKED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "stream": (False,),
    "stream_options": (),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields for what the engine has not, with the values that do not ask for it."""


def is_batch_line(entry: object) -> bool:
    """Whether the JSON of a line is one."""
    return isinstance(entry, dict) and "custom_id" in entry and ("body" in entry or "url" in entry)


class OpenAIForm:
    """How such lines ask."""

    id_field = "custom_id"
    id_needed = True
    refused: Mapping[str, Any] = {"status": 400}

    def beside(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"chat": entry.get("url") == CHAT, "created": int(time.time())}

    def wanted(self, entry: Mapping[str, Any]) -> Wanted:
        entry = _given(entry)
        if unknown := sorted(entry.keys() - _LINE):
            raise RequestError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_LINE))}")
        if not isinstance(entry.get("custom_id"), str):
            raise RequestError(f"custom_id is {shown(entry.get('custom_id'))}, but must be a string")
        if entry.get("method", "POST") != "POST":
            raise RequestError(f"method is {shown(entry['method'])}, but must be POST")
        if entry.get("url") not in (CHAT, TEXT):
            raise RequestError(f"url is {shown(entry.get('url'))}, but must be {CHAT} or {TEXT}")
        body = entry.get("body")
        if not isinstance(body, dict):
            raise RequestError(f"body is {shown(body)}, but must be a JSON object")
        return _asked(_given(body), chat=entry["url"] == CHAT)


OPENAI = OpenAIForm()


def _given(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is not given."""
    return {name: value for name, value in entry.items() if value is not None}


def _asked(body: dict[str, Any], *, chat: bool) -> Wanted:
    for name, harmless in _NOT_ASKED.items():
        if name in body and (value := body.pop(name)) not in harmless:
            raise RequestError(f"{name} is {shown(value)}, which tpctl cannot do; leave it out")
    for name in _MEANINGLESS & body.keys():
        del body[name]
    choices = _whole(body.pop("n", 1), "n", 1, MOST_CHOICES)
    if (best := body.pop("best_of", choices)) != choices:
        raise RequestError(f"best_of is {shown(best)} with n {choices}, which tpctl cannot do; leave it out")
    fields: dict[str, Any] = {}
    if "seed" in body:
        fields["seed"] = _whole(body.pop("seed"), "seed", -(2**63), 2**63 - 1) % 2**63
    fields |= _length(body)
    fields |= _chat(body) if chat else _text(body)
    fields |= {name: body.pop(name) for name in _SAME & body.keys()}
    if body:
        raise RequestError(f"unknown field {min(body)!r} in the body of a request to {CHAT if chat else TEXT}")
    return Wanted(fields, choices)


def _length(body: dict[str, Any]) -> dict[str, Any]:
    """``max_completion_tokens`` is the newer name of ``max_tokens``."""
    old, new = body.pop("max_tokens", None), body.pop("max_completion_tokens", None)
    if old is not None and new is not None and old != new:
        raise RequestError(f"max_tokens is {shown(old)}, and max_completion_tokens {shown(new)}; give one of them")
    most = new if old is None else old
    return {} if most is None else {"max_tokens": most}


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in body:
        raise RequestError("the body has no messages")
    found: dict[str, Any] = {"messages": body.pop("messages")}
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise RequestError(f"logprobs is {shown(wanted)}, but must be true or false; top_logprobs says how many")
    if top is not None and not wanted:
        raise RequestError(f"top_logprobs is {shown(top)}, but logprobs is not true")
    if wanted:
        found["logprobs"] = 0 if top is None else _whole(top, "top_logprobs", 0, 20)
    if "reasoning_effort" in body:
        given = body.pop("chat_template_kwargs", {})
        found["chat_template_kwargs"] = {"reasoning_effort": body.pop("reasoning_effort"), **given}
    return found


def _text(body: dict[str, Any]) -> dict[str, Any]:
    if "prompt" not in body:
        raise RequestError("the body has no prompt")
    prompt = body.pop("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise RequestError(f"prompt is {shown(prompt)}, but must be one string; give each prompt a line of its own")
    found: dict[str, Any] = {"prompt": prompt}
    if "logprobs" in body:
        found["logprobs"] = _whole(body.pop("logprobs"), "logprobs", 0, 20)
    return found


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} is {shown(value)}, but must be a whole number from {least} to {most}")
    return value


class OpenAISink:
    """Such lines' answers.

    A row that is read back from a file is not taken apart: ``as_is`` has it.
    """

    suffix = ".jsonl"

    def __init__(self, model: str) -> None:
        """``model``: what answers say that they are from."""
        self._model = model

    def encode(self, out: IO[bytes], first: int, rows: Iterable[bytes]) -> None:
        for index, raw in enumerate(rows, start=first):
            row = json.loads(raw)
            out.write(json_row(row.get("as_is") or self._answer(index, row)))

    def decode(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as stream:
            for raw in stream:
                row = json.loads(raw)
                body = row["response"]["body"]
                found = {"id": row["custom_id"], "as_is": row}
                if "error" in body:
                    yield {**found, "error": body["error"]["message"]}
                else:
                    usage = body["usage"]
                    yield {**found, **{name: usage[name] for name in ("prompt_tokens", "completion_tokens")}}

    def join(self, out: IO[bytes], parts: Iterable[Path]) -> None:
        for path in parts:
            with path.open("rb") as part:
                as_they_are(out, 0, part)

    def _answer(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        custom_id = row["id"] if isinstance(row["id"], str) else None
        key = blake2b(f"{index} {custom_id}".encode("utf-8", "replace"), digest_size=12).hexdigest()
        if "error" in row:
            status = row.get("status", 500)
            body = _error(row["error"], status)
        else:
            status, body = 200, self._completion(key, row)
        response = {"status_code": status, "request_id": f"req_{key}", "body": body}
        return {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": None}

    def _completion(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        choices = row.get("choices") or [row]
        make: Callable[[int, Mapping[str, Any]], dict[str, Any]] = _message if row["chat"] else _completed
        tokens_in, out = row["prompt_tokens"], row["completion_tokens"]
        return {
            "id": f"{'chatcmpl' if row['chat'] else 'cmpl'}-{key}",
            "object": "chat.completion" if row["chat"] else "text_completion",
            "created": row["created"],
            "model": self._model,
            "choices": [make(at, choice) for at, choice in enumerate(choices)],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": out, "total_tokens": tokens_in + out},
        }


def _error(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _message(at: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """One answer of a chat."""
    message = {"role": "assistant", "content": choice["text"], "refusal": None}
    if "reasoning" in choice:
        message["reasoning_content"] = choice["reasoning"]
    logprobs = None
    if "logprobs" in choice:
        content = [{**_token(one), "top_logprobs": [_token(top) for top in one["top"]]} for one in choice["logprobs"]]
        logprobs = {"content": content, "refusal": None}
    return {"index": at, "message": message, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}


def _token(one: Mapping[str, Any]) -> dict[str, Any]:
    """A token of which a character's other bytes are elsewhere has no text, and bytes that are not known."""
    text = one["token"]
    return {"token": text, "logprob": one["logprob"], "bytes": list(text.encode("utf-8", "replace")) if text else None}


def _completed(at: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """One answer to a text."""
    logprobs = None
    if "logprobs" in choice:
        tokens = [one["token"] for one in choice["logprobs"]]
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token)
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [one["logprob"] for one in choice["logprobs"]],
            "top_logprobs": [{top["token"]: top["logprob"] for top in one["top"]} for one in choice["logprobs"]],
            "text_offset": offsets,
        }
    return {"index": at, "text": choice["text"], "logprobs": logprobs, "finish_reason": choice["finish_reason"]}
