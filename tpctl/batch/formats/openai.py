"""OpenAI's batch lines, as its Batch API takes and gives them, and as its client's types describe them.

{"custom_id": "q7", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": [{…}]}}
{"id": …, "custom_id": "q7", "response": {"status_code": 200, "request_id": …, "body": {…}}, "error": null}

A line that cannot be run has status 400, one that the engine failed at 500; the body then is OpenAI's error. The model
that a line names is not looked at: the answer says which one gave it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from tpctl.client import openai_answers as answers
from tpctl.client.echoed import scored
from tpctl.client.fields import FieldError, flag, given, refuse
from tpctl.client.forms import Wanted
from tpctl.client.openai_fields import CHAT, TEXT, param_of, settings
from tpctl.client.openai_schemas import RESPONSES
from tpctl.client.results import as_they_are, json_row
from tpctl.client.token_ids import begins_with_id
from tpctl.errors import RequestError, shorten, shown

_LINE = frozenset({"custom_id", "method", "url", "body"})
_OF_A_SERVER: Mapping[str, tuple[Any, ...]] = {"stream": (False,), "stream_options": ()}
"""Fields that are for one who waits, with the values that ask for nothing."""


def is_batch_line(entry: object) -> bool:
    """Whether the JSON of a line is one."""
    return isinstance(entry, dict) and "custom_id" in entry and ("body" in entry or "url" in entry)


class OpenAIForm:
    """How such lines ask."""

    id_field = "custom_id"
    id_needed = True

    def refused(self, reason: Exception, *, chat: bool) -> Mapping[str, Any]:
        param = param_of(reason)
        return {"status": 400, "param": "messages" if chat and param == "prompt" else param}

    def beside(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"chat": entry.get("url") == CHAT, "created": int(time.time())}

    def wanted(self, entry: Mapping[str, Any]) -> Wanted:
        entry = given(entry)
        if unknown := sorted(entry.keys() - _LINE):
            raise RequestError(f"unknown field {shorten(repr(unknown[0]))}; known: {', '.join(sorted(_LINE))}")
        custom_id = entry.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise RequestError(f"custom_id is {shown(custom_id)}, but must be a string that is not empty")
        if entry.get("method") != "POST":
            raise RequestError(f"method is {shown(entry.get('method'))}, but must be POST")
        if entry.get("url") == RESPONSES:
            raise RequestError(f"url is {RESPONSES}, which only a server answers; ask for it as {CHAT}")
        if entry.get("url") not in (CHAT, TEXT):
            raise RequestError(f"url is {shown(entry.get('url'))}, but must be {CHAT} or {TEXT}")
        body = entry.get("body")
        if not isinstance(body, dict):
            raise RequestError(f"body is {shown(body)}, but must be a JSON object")
        return _asked(given(body), chat=entry["url"] == CHAT)


OPENAI = OpenAIForm()


def _asked(body: dict[str, Any], *, chat: bool) -> Wanted:
    refuse(body, _OF_A_SERVER)
    if chat:
        messages = _messages(body)
        wanted = settings(body, chat=True)
        return replace(wanted, fields={**wanted.fields, "messages": messages})
    prompt, echo = _prompt(body), flag(body.pop("echo", False), "echo")
    wanted, empty = scored(settings(body, chat=False))
    return replace(wanted, fields={**wanted.fields, "prompt": prompt}, echo=echo, scored=empty)


def _messages(body: dict[str, Any]) -> Any:
    if "messages" not in body:
        raise FieldError("the body has no messages", "messages")
    return body.pop("messages")


def _prompt(body: dict[str, Any]) -> str | list[int]:
    if "prompt" not in body:
        raise FieldError("the body has no prompt", "prompt")
    prompt = body.pop("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and (isinstance(prompt[0], str) or begins_with_id(prompt[0])):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return prompt
    if begins_with_id(prompt):
        return list(prompt)
    raise FieldError(
        f"prompt is {shown(prompt)}, but must be one string, or the token ids of one prompt, not empty; give each "
        "prompt a line of its own",
        "prompt",
    )


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
            body = answers.error(row["error"], status, param=row.get("param"))
        else:
            status, body = 200, self._completion(key, row)
        response = {"status_code": status, "request_id": f"req_{key}", "body": body}
        return {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": None}

    def _completion(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        usage = answers.usage(row["prompt_tokens"], row["completion_tokens"])
        choices = row.get("choices") or [row]
        if "prompt_logprobs" in row:
            choices = [{**choice, "prompt_logprobs": row["prompt_logprobs"]} for choice in choices]
        return answers.completion(key, row["created"], self._model, choices, usage, chat=row["chat"])
