"""/v1/responses: what it asks for, and its answer, whole and as events. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.client.forms import Wanted
from tpctl.client.openai_fields import FieldError, given, refuse, settings
from tpctl.errors import shown
from tpctl.serve.answered import encode
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation, Piece
from tpctl.serve.pool import Job

PATH = "/v1/responses"

_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "context_management": (),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
}
"""Fields for what tpctl has not, beside those of a chat, with the values that do not ask for it."""

_TEXTS = ("input_text", "output_text", "text")


@dataclass(frozen=True)
class ResponseAsked:
    """What a body asks for; ``said``: those of its fields that an answer repeats."""

    messages: list[dict[str, Any]]
    wanted: Wanted
    said: Mapping[str, Any]


def read_response(body: dict[str, Any]) -> ResponseAsked:
    """What a body asks for, without its model and whether it streams; it is used up.

    Raises:
        FieldError: a field is unknown, or cannot be had as it is.
    """
    names = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata")
    said = {name: body.get(name) for name in names}
    messages = _messages(body)
    refuse(body, _NOT_DONE)
    text = _object(body, "text", ("format", "verbosity"))
    refuse(text, {"verbosity": ("medium",)})
    format_ = text.get("format")
    if format_ is not None:
        body["response_format"] = _response_format(format_)
    reasoning = _object(body, "reasoning", ("effort", "summary", "generate_summary"))
    for name in ("summary", "generate_summary"):
        reasoning.pop(name, None)  # thoughts are given as they are, whatever summary is wanted
    if "max_output_tokens" in body:
        body["max_tokens"] = body.pop("max_output_tokens")
    if "effort" in reasoning:
        body["reasoning_effort"] = reasoning["effort"]
    if "n" in body:
        raise FieldError(f"unknown field 'n' in the body of a request to {PATH}", "n")
    wanted = settings(body, chat=True, path=PATH)
    return ResponseAsked(messages, wanted, {**said, "effort": reasoning.get("effort"), "format": format_})


def _response_format(value: Any) -> Any:
    """A chat's form of it, where a schema stands in an object of its own."""
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {name: one for name, one in value.items() if name != "type"}}


def _object(body: dict[str, Any], name: str, known: Sequence[str]) -> dict[str, Any]:
    value = body.pop(name, {})
    if not isinstance(value, dict):
        raise FieldError(f"{name} is {shown(value)}, but must be a JSON object", name)
    if unknown := sorted(value.keys() - set(known)):
        raise FieldError(f"unknown field {unknown[0]!r} in {name}", name)
    return given(value)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """``instructions`` and ``input`` as a chat's messages."""
    if "input" not in body:
        raise FieldError("the body has no input", "input")
    instructions, items = body.pop("instructions", None), body.pop("input")
    if not isinstance(instructions, str | None):
        raise FieldError(f"instructions is {shown(instructions)}, but must be a text", "instructions")
    found = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*found, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise FieldError(f"input is {shown(items)}, but must be a text or a list of items, not empty", "input")
    thought: str | None = None
    for number, item in enumerate(items, start=1):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":
            thought = _joined(item.get("content") or [], number, ("reasoning_text",)) or None
        elif kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if message["role"] == "developer":
                message["role"] = "system"
            if isinstance(message["content"], list):
                message["content"] = _joined(message["content"], number, _TEXTS)
            if thought is not None and message["role"] == "assistant":
                message["reasoning_content"], thought = thought, None
            found.append(message)
        else:
            what = shown(item) if kind is None else f"of type {shown(kind)}"
            raise FieldError(f"item {number} of input is {what}, which tpctl cannot take; leave it out", "input")
    return found


def _joined(parts: Any, number: int, kinds: Sequence[str]) -> str:
    """The text of an item's parts."""
    texts = []
    for part in parts if isinstance(parts, list) else [parts]:
        fields = part if isinstance(part, dict) else {}
        if fields.get("type") not in kinds or not isinstance(fields.get("text"), str):
            raise FieldError(f"item {number} of input has a part {shown(part)}; tpctl takes text only", "input")
        texts.append(fields["text"])
    return "\n".join(texts)


class ResponseWriter:
    """An answer's items, a message and what was thought before it, each opened when its first text comes."""

    def __init__(self, model: str, asked: ResponseAsked, job: Job, generation: Generation) -> None:
        self._id = secrets.token_hex(24)
        self._created = int(time.time())
        self._model = model
        self._asked = asked
        self._job = job
        self._generation = generation
        self._stream = generation.streams[0]
        self._number = 0
        self._open: bool | None = None  # which item is: that of thoughts, or the message
        self._items = 0

    def begin(self) -> bytes:
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        found = []
        for piece in pieces:
            for text, reasoning in piece.segments:
                if self._open is not reasoning:
                    found += [self._close(), self._begin(reasoning)]
                kind = "reasoning_text" if reasoning else "output_text"
                more: dict[str, Any] = {} if reasoning else {"logprobs": []}
                found.append(self._event(f"response.{kind}.delta", **self._place(), delta=text, **more))
        return b"".join(found)

    def end(self) -> bytes:
        found = b"" if self._open is False else self._close() + self._begin(False)
        found += self._close()
        response = self.whole()
        return found + self._event(f"response.{response['status']}", response=response)

    def broken(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response={**self._response("failed", []), "error": said})

    def whole(self) -> dict[str, Any]:
        cut = self._stream.finish_reason == "length"
        output = [self._item(reasoning) for reasoning in (True, False) if self._stream.reasoning or not reasoning]
        found = self._response("incomplete" if cut else "completed", output)
        cached, thought = self._stream.num_cached_tokens, self._generation.reasoning_tokens
        tokens_in, out = len(self._job.token_ids), len(self._stream.token_ids)
        found["usage"] = {
            "input_tokens": tokens_in,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": out,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": tokens_in + out,
        }
        return found

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        said, sampling = self._asked.said, self._job.sampling[0]
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": said["instructions"],
            "max_output_tokens": said["max_output_tokens"],
            "metadata": said["metadata"] or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": said["effort"], "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": said["format"] or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _begin(self, reasoning: bool) -> bytes:
        """Open an item and the one part that it has."""
        self._open = reasoning
        item = {**self._item(reasoning), "content": [], "status": "in_progress"}
        added = self._event("response.output_item.added", output_index=self._items, item=item)
        return added + self._event("response.content_part.added", **self._place(), part=self._part(reasoning, ""))

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        reasoning = self._open
        item = self._item(reasoning)
        (part,) = item["content"]
        kind = "reasoning_text" if reasoning else "output_text"
        more: dict[str, Any] = {} if reasoning else {"logprobs": []}
        found = self._event(f"response.{kind}.done", **self._place(), text=part["text"], **more)
        found += self._event("response.content_part.done", **self._place(), part=part)
        found += self._event("response.output_item.done", output_index=self._items, item=item)
        self._open = None
        self._items += 1
        return found

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id(self._open is True), "output_index": self._items, "content_index": 0}

    def _item_id(self, reasoning: bool) -> str:
        return f"{'rs' if reasoning else 'msg'}_{self._id}"

    def _item(self, reasoning: bool) -> dict[str, Any]:
        """An item with the text that there is."""
        text = (self._stream.reasoning or "") if reasoning else self._stream.text
        found = {"id": self._item_id(reasoning), "status": "completed", "content": [self._part(reasoning, text)]}
        if reasoning:
            return {**found, "type": "reasoning", "summary": []}
        cut = self._stream.finish_reason == "length"
        return {**found, "type": "message", "role": "assistant", **({"status": "incomplete"} if cut else {})}

    def _part(self, reasoning: bool, text: str) -> dict[str, Any]:
        if reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
