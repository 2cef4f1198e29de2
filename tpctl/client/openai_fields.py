"""What the body of a request in OpenAI's form asks for, as its client's types describe it.

Of a line in a batch and of a request to a server alike. A field that nobody knows, and one that asks for what tpctl
cannot do, is refused by name; one that changes no answer is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.client.forms import SAMPLING_FIELDS, Wanted
from tpctl.client.tools.asked import FIELDS as TOOL_FIELDS
from tpctl.client.tools.asked import read_tools
from tpctl.errors import RequestError, shown

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

MOST_CHOICES = 128

_MEANINGLESS = frozenset(
    {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_options", "prompt_cache_retention"}
)
"""Fields that change no answer."""

_SAME = (SAMPLING_FIELDS - {"logprobs", "prompt_logprobs", "seed", "max_tokens"}) | {"stop", "chat_template_kwargs"}
"""Fields that mean what tpctl's own of that name mean; some are those that other servers add."""

_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "modalities": (["text"],),
    "suffix": ("",),
}
"""Fields for what tpctl has not, with the values that do not ask for it."""


class FieldError(RequestError):
    """A field of a body cannot be had as it is.

    Attributes:
        param: its name.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def given(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is not given."""
    return {name: value for name, value in entry.items() if value is not None}


def refuse(body: dict[str, Any], names: Mapping[str, tuple[Any, ...]]) -> None:
    """Take fields out of ``body`` that ask for nothing.

    Args:
        names: of fields, with the values that ask for nothing.

    Raises:
        FieldError: one has another value.
    """
    for name, harmless in names.items():
        if name in body and (value := body.pop(name)) not in harmless:
            raise FieldError(f"{name} is {shown(value)}, which tpctl cannot do; leave it out", name)


def settings(body: dict[str, Any], *, chat: bool, path: str | None = None) -> Wanted:
    """How a body without its prompt or messages wants its answers made: fields as of a line in tpctl's own form.

    Args:
        body: what is given; it is used up.
        path: what it was sent to, if that is another than ``CHAT`` or ``TEXT``.

    Raises:
        FieldError: a field is unknown, or cannot be had as it is.
    """
    refuse(body, _NOT_DONE)
    for name in _MEANINGLESS & body.keys():
        del body[name]
    choices = whole(body.pop("n", 1), "n", 1, MOST_CHOICES)
    if (best := body.pop("best_of", choices)) != choices:
        raise FieldError(f"best_of is {shown(best)} with n {choices}, which tpctl cannot do; leave it out", "best_of")
    tools = read_tools({name: body.pop(name) for name in TOOL_FIELDS if name in body}) if chat else None
    fields: dict[str, Any] = {}
    if "seed" in body:
        fields["seed"] = whole(body.pop("seed"), "seed", -(2**63), 2**63 - 1) % 2**63
    fields |= _length(body)
    fields |= _chat(body) if chat else _text(body)
    fields |= {name: body.pop(name) for name in _SAME & body.keys()}
    if body:
        name = min(body)
        where = path or (CHAT if chat else TEXT)
        raise FieldError(f"unknown field {name!r} in the body of a request to {where}", name)
    return Wanted(fields, choices, tools)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``; raises ``FieldError``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FieldError(f"{name} is {shown(value)}, but must be a whole number from {least} to {most}", name)
    return value


def flag(value: Any, name: str, hint: str = "") -> bool:
    """``value`` if it is true or false; raises ``FieldError``."""
    if not isinstance(value, bool):
        raise FieldError(f"{name} is {shown(value)}, but must be true or false{hint}", name)
    return value


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
        found["logprobs"] = 0 if top is None else whole(top, "top_logprobs", 0, 20)
    if "reasoning_effort" in body:
        variables = body.pop("chat_template_kwargs", {})
        found["chat_template_kwargs"] = {"reasoning_effort": body.pop("reasoning_effort"), **variables}
    return found


def _text(body: dict[str, Any]) -> dict[str, Any]:
    if "logprobs" not in body:
        return {}
    return {"logprobs": whole(body.pop("logprobs"), "logprobs", 0, 20)}
