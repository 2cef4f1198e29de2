"""What a body of /v1/responses asks for, as a chat would ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tpctl.client.fields import FieldError, given, refuse, whole
from tpctl.client.forms import Wanted
from tpctl.client.openai_fields import check_names, settings
from tpctl.client.openai_schemas import INCLUDED, LOGPROBS, NOT_IN_RESPONSES, RESPONSES, VERBOSITY
from tpctl.client.tools.asked import FIELDS as TOOL_FIELDS
from tpctl.errors import shorten, shown
from tpctl.serve.answered import encode
from tpctl.serve.items import chat_tools, read_items
from tpctl.serve.weight import Weight
from tpctl.wire.guide import NAMES as GUIDES
from tpctl.wire.ranges import MAX_LOGPROBS

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What a body says for tpctl's own fields."""


@dataclass(frozen=True)
class ResponseAsked:
    """What a body asks for; ``said``: those of its fields that an answer repeats."""

    messages: list[dict[str, Any]]
    wanted: Wanted
    said: Mapping[str, Any]

    @cached_property
    def size(self) -> int:
        """Bytes that ``said`` takes."""
        return Weight.of(encode(self.said)).size


def read_response(body: dict[str, Any]) -> ResponseAsked:
    """What a body asks for, without its model and whether it streams; it is used up.

    Raises:
        FieldError: a field is unknown, or cannot be had as it is.
    """
    check_names(body, RESPONSES, NOT_IN_RESPONSES)
    names = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata")
    said = {name: body.get(name) for name in names}
    messages = read_items(body)
    logprobs = _logprobs(body)
    refuse(body, NOT_IN_RESPONSES)
    text = _object(body, "text", ("format", "verbosity"))
    refuse(text, VERBOSITY)
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
    tools = {name: body.get(name) for name in TOOL_FIELDS}
    body |= chat_tools(body)
    wanted = settings({**body, **logprobs}, chat=True, checked=True)
    forms = {own: name for own, name in wanted.names.items() if own in GUIDES}  # by vLLM's names
    wanted = replace(wanted, names={**_NAMES, **forms})
    return ResponseAsked(messages, wanted, {**said, **tools, "effort": reasoning.get("effort"), "format": format_})


def _logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Take what answers are to include out of a body; a chat's fields for log-probabilities."""
    value, top = body.pop("include", []), body.pop("top_logprobs", None)
    if not isinstance(value, list):
        raise FieldError(f"include is {shown(value)}, but must be a list", "include")
    if left := [one for one in value if one not in INCLUDED]:
        raise FieldError(f"include has {shown(left[0])}, which tpctl cannot do; leave it out", "include")
    if LOGPROBS in value:
        return {"logprobs": True} if top is None else {"logprobs": True, "top_logprobs": top}
    if whole(0 if top is None else top, "top_logprobs", 0, MAX_LOGPROBS):
        raise FieldError(f"top_logprobs is {top}, but include has no {LOGPROBS}", "top_logprobs")
    return {}


def _response_format(value: Any) -> Any:
    """A chat's form of it, where a schema stands in an object of its own."""
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {name: one for name, one in value.items() if name != "type"}}


def _object(body: dict[str, Any], name: str, known: Sequence[str]) -> dict[str, Any]:
    value = body.pop(name, {})
    if not isinstance(value, dict):
        raise FieldError(f"{name} is {shown(value)}, but must be a JSON object", name)
    if unknown := (found := given(value)).keys() - set(known):
        raise FieldError(f"unknown field {shorten(repr(min(unknown)))} in {name}", name)
    return found
