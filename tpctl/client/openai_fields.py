"""What the body of a request in OpenAI's form asks for, as its client's types describe it.

Of a line in a batch and of a request to a server alike. A field that nobody knows, and one that asks for what tpctl
cannot do, is refused by name; one that changes no answer is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tpctl.client import vllm_fields
from tpctl.client.fields import FieldError, flag, refuse, whole
from tpctl.client.forms import FIELDS as OWN_FIELDS
from tpctl.client.forms import SAMPLING_FIELDS, Wanted
from tpctl.client.openai_schemas import (
    CHAT,
    FIELDS,
    MEANINGLESS,
    MOST_CHOICES,
    MOST_PAIR_NAME,
    MOST_PAIR_TEXT,
    MOST_PAIRS,
    NOT_DONE,
    OF_CHATS_ALONE,
    TEXT,
    VERBOSITY,
)
from tpctl.client.tools.asked import FIELDS as TOOL_FIELDS
from tpctl.client.tools.asked import ToolsError, read_tools
from tpctl.errors import shorten, shown
from tpctl.wire.ranges import MAX_LOGPROBS

_SAME = (SAMPLING_FIELDS - {"logprobs", "prompt_logprobs", "seed", "max_tokens"}) | {"stop", "chat_template_kwargs"}
"""Fields that mean what tpctl's own of that name mean; some are those that other servers add."""

_FIRST = re.compile(r"(?:the )?(message|\w+)(?: \d+)?(?: is| holds| has|:) ")


def param_of(reason: Exception) -> str | None:
    """The field of a body that an error is about: that which it names, or begins with; ``None``: no one field."""
    if isinstance(reason, FieldError | ToolsError):
        return reason.param
    found = _FIRST.match(str(reason))
    name = None if found is None else {"message": "messages"}.get(found[1], found[1])
    return name if name in OWN_FIELDS else None


def check_names(body: dict[str, Any], path: str, others: Collection[str] = ()) -> None:
    """Refuse fields that nobody knows, and make whole numbers of 7.0 and the like, which JSON does not tell from 7.

    Args:
        others: names that are known besides, since they are refused, each in its own words.

    Raises:
        FieldError: there is one.
    """
    if unknown := body.keys() - FIELDS[path].keys() - NOT_DONE.keys() - {"guided_grammar"} - set(others):
        name = min(unknown)
        raise FieldError(f"unknown field {shorten(repr(name))} in the body of a request to {path}", name)
    for name, value in body.items():
        if isinstance(value, float) and value.is_integer() and FIELDS[path].get(name, {}).get("type") == "integer":
            body[name] = int(value)


def settings(body: dict[str, Any], *, chat: bool, checked: bool = False) -> Wanted:
    """How a body without its prompt or messages wants its answers made: fields as of a line in tpctl's own form.

    Args:
        body: what is given; it is used up.
        checked: its names have been looked at; those of a request to another path are others.

    Raises:
        FieldError: a field is unknown, or cannot be had as it is.
    """
    if not checked:
        check_names(body, CHAT if chat else TEXT)
    refuse(body, {**NOT_DONE, **VERBOSITY})
    _check_metadata(body.pop("metadata", {}))
    for name in ("model", *MEANINGLESS, *OF_CHATS_ALONE):
        body.pop(name, None)
    choices = whole(body.pop("n", 1), "n", 1, MOST_CHOICES)
    if (best := body.pop("best_of", choices)) != choices:
        raise FieldError(f"best_of is {shown(best)} with n {choices}, which tpctl cannot do; leave it out", "best_of")
    tools = read_tools({name: body.pop(name) for name in TOOL_FIELDS if name in body}) if chat else None
    asked = {"max_completion_tokens": "max_tokens", "reasoning_effort": "reasoning_effort"}
    names = {own: name for name, own in asked.items() if name in body}
    fields: dict[str, Any] = {}
    if "seed" in body:
        fields["seed"] = whole(body.pop("seed"), "seed", -(2**63), 2**63 - 1) % 2**63
    if "prompt_logprobs" in body:
        fields["prompt_logprobs"] = whole(body.pop("prompt_logprobs"), "prompt_logprobs", 0, MAX_LOGPROBS)
    of_vllm, called = vllm_fields.taken(body)
    fields, names = {**fields, **of_vllm}, {**names, **called}
    fields |= _length(body)
    fields |= _chat(body) if chat else _text(body)
    fields |= {name: body.pop(name) for name in _SAME & body.keys()}
    return Wanted(fields, choices, tools, names)


def _check_metadata(value: Any) -> None:
    """Raises ``FieldError`` for what is not as ``METADATA`` has it."""
    if not isinstance(value, dict):
        raise FieldError(f"metadata is {shown(value)}, but must be a JSON object", "metadata")
    if len(value) > MOST_PAIRS:
        raise FieldError(
            f"metadata has {len(value)} pairs, but at most {MOST_PAIRS} are taken; leave some out", "metadata"
        )
    for name, text in value.items():
        if not isinstance(text, str):
            raise FieldError(f"metadata: {shown(name)} is {shown(text)}, but must be a text", "metadata")
        if len(name) > MOST_PAIR_NAME or len(text) > MOST_PAIR_TEXT:
            raise FieldError(
                f"metadata: {shown(name)} has {len(name)} characters and its text {len(text)}, but at most "
                f"{MOST_PAIR_NAME} and {MOST_PAIR_TEXT} are taken; shorten them",
                "metadata",
            )


def _length(body: dict[str, Any]) -> dict[str, Any]:
    """``max_completion_tokens`` is the newer name of ``max_tokens``."""
    old, new = body.pop("max_tokens", None), body.pop("max_completion_tokens", None)
    if old is not None and new is not None and old != new:
        raise FieldError(
            f"max_tokens is {shown(old)}, and max_completion_tokens {shown(new)}; give one of them", "max_tokens"
        )
    most = new if old is None else old
    return {} if most is None else {"max_tokens": most}


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    flag(wanted, "logprobs", "; top_logprobs says how many")
    if top is not None and not wanted:
        raise FieldError(f"top_logprobs is {shown(top)}, but logprobs is not true", "top_logprobs")
    if wanted:
        found["logprobs"] = 0 if top is None else whole(top, "top_logprobs", 0, MAX_LOGPROBS)
    if "reasoning_effort" in body:
        variables = body.pop("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise FieldError(
                f"chat_template_kwargs is {shown(variables)}, but must be a JSON object", "chat_template_kwargs"
            )
        effort = body.pop("reasoning_effort")
        if not isinstance(effort, str):
            raise FieldError(f"reasoning_effort is {shown(effort)}, but must be a text", "reasoning_effort")
        found["chat_template_kwargs"] = {"reasoning_effort": effort, **variables}
    return found


def _text(body: dict[str, Any]) -> dict[str, Any]:
    if "logprobs" not in body:
        return {}
    return {"logprobs": whole(body.pop("logprobs"), "logprobs", 0, MAX_LOGPROBS)}
