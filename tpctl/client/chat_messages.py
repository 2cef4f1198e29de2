"""The messages of a conversation, as a chat template is given them.

A message is a JSON object with a ``role``, a ``content``, and whatever else the model's template reads. What it does
not read is refused by name, so that nothing somebody wrote is dropped without a word; but for what was thought before
an earlier answer, which most templates leave out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.errors import RequestError, shown

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else a model's template reads."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which services and templates keep what a model thought before it answered."""

_ADDRESSES = ("tool_call_id",)
"""What says which call a result is of. Templates that do not read it go by the order, see ``in_order``."""

_OF_PARTS = ("type", "text")
_OF_CALLS = ("id", "type", "index", "function")
_OF_FUNCTIONS = ("name", "arguments", "parsed_arguments")
_HINTS = ("prompt_cache_breakpoint", "cache_control")
"""Fields of parts that change no answer: services go by them for what they keep of a prompt."""

_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say nothing."""


def check_messages(value: Any) -> list[dict[str, Any]]:
    """``value`` as messages.

    Raises:
        RequestError: it is no list of them; the message says which one is wrong, and how.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(
            f'messages is {shown(value)}, but must be a list of {{"role": "…", "content": "…"}}, not empty'
        )
    for number, message in enumerate(value, start=1):
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str):
            raise RequestError(f"message {number} is {shown(message)}, but must have a string as its role")
        content = fields.get("content")
        if isinstance(content, list):
            _check_parts(number, content)
        elif not isinstance(content, str) and (content is not None or not _says_else(fields)):
            raise RequestError(f"message {number} is {shown(message)}, but must have a string as its content")
        thoughts = _thoughts(fields)
        if other := [name for name, thought in thoughts.items() if thought != next(iter(thoughts.values()))]:
            raise RequestError(
                f"message {number} has two different thoughts, as its {next(iter(thoughts))} and as its {other[0]}; "
                "leave one of them out"
            )
    return list(value)


@dataclass(frozen=True)
class Uses:
    """What a template reads.

    Attributes:
        variables: names that it does not set itself.
        names: of fields, and all other texts in its expressions, one of which may name a field.
        whole: whether it shows messages with all their fields, whatever their names.
        text_arguments: whether it takes the arguments of a tool's call as text, too.
    """

    variables: Sequence[str]
    names: frozenset[str]
    whole: bool
    text_arguments: bool

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Uses:
        return cls(found["variables"], frozenset(found["names"]), found["whole"], found["text_arguments"])

    def reads(self, field: str) -> bool:
        """Whether a field of a message is read under its name, or as what a model thought under another one."""
        if self.whole or field in ("role", "content") or field in self.names:
            return True
        return field in REASONING and any(other in self.names for other in REASONING)


def suited(messages: Sequence[Message], uses: Uses) -> list[Message]:
    """Messages as they are said to a model whose template reads ``uses``.

    What was thought before an answer is left out where it reads no thoughts, and so is what OpenAI's client makes of an
    answer of a given form: such answers come back in the next request. A ``developer``, whom newer interfaces have in
    the place of ``system``, is called so unless the template knows him.
    """
    return [_suited(message, uses) for message in messages]


def _suited(message: Message, uses: Uses) -> Message:
    role = message.get("role")
    if role == "developer" and role not in uses.names:
        return {**message, "role": "system"}
    unread = [name for name in (*REASONING, "parsed") if name in message and not uses.reads(name)]
    if role != "assistant" or not unread:
        return message
    said = {name: value for name, value in message.items() if name not in unread}
    return {**said, "content": ""} if said.get("content") is None else said


_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""OpenAI's. Most templates repeat any role, so that a misspelt one would stand in the prompt."""


def refuse_unread(messages: Sequence[Message], uses: Uses) -> None:
    """Refuse fields that a template does not read, and roles that neither OpenAI's interface nor it names.

    Raises:
        RequestError: a message has such a field, or such a role.
    """
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in _ROLES and role not in uses.names and not uses.whole:
            raise RequestError(
                f"message {number} has the role {shown(role)}, which the model's chat template does not name; use "
                "system, user, assistant or tool"
            )
        for name, value in message.items():
            if value not in _NOTHING and not uses.reads(name) and name not in _ADDRESSES:
                raise _unread(number, "", name)
        for what, known, fields in _inner(message, whole=uses.whole):
            for name, value in fields.items():
                if name not in known and value not in _NOTHING and name not in uses.names:
                    raise _unread(number, what, name)


def _unread(number: int, what: str, name: str) -> RequestError:
    return RequestError(
        f"message {number} has {what}the field {shown(name)}, which the model's chat template does not read; leave it "
        "out"
    )


def _inner(message: Message, *, whole: bool) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Any]]]:
    """The objects within a message: how they are called, the fields that are known of them, and those they have.

    Args:
        whole: the message is shown with all of its fields, but for those of parts, which become one text.
    """
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        yield "a part with ", (*_OF_PARTS, *_HINTS), part
    for call in () if whole else _calls_of(message):
        yield "a call with ", _OF_CALLS, call
        if isinstance(function := call.get("function"), Mapping):
            yield "a call's function with ", _OF_FUNCTIONS, function


def prepared(
    messages: Sequence[Message],
    uses: Uses,
    takes_parts: Callable[[], bool],
    takes_thoughts: Callable[[], bool] = lambda: False,
    text_arguments: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Messages under the names and in the forms that a template reads.

    Fields that are null are left out. What was thought is there under every name for it that the template may read, and
    where the template takes it as a part of the content, before the others, there as well.
    The arguments of a tool's call, which services write as text, become the object that templates expect, or stay text
    where the template takes nothing else; a message of calls alone has an empty content. Parts of a
    content are one text, line by line, where the template takes no parts. What OpenAI's client makes of a call's
    arguments and puts beside them is left out.
    """
    ordered = messages if "tool_call_id" in uses.names else in_order(messages)
    if "name" in uses.names:
        ordered = named(ordered)
    return [_prepared(message, uses, takes_parts, takes_thoughts, text_arguments) for message in ordered]


def in_order(messages: Sequence[Message]) -> list[Message]:
    """Messages with the results of tools that follow each other in the order of the calls."""
    found: list[Message] = []
    order: dict[Any, int] = {}
    results: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(message)
            continue
        found += sorted(results, key=lambda result: order.get(result.get("tool_call_id"), 0))
        results = []
        order = {call.get("id"): at for at, call in enumerate(_calls_of(message))}
        found.append(message)
    return found + sorted(results, key=lambda result: order.get(result.get("tool_call_id"), 0))


def named(messages: Sequence[Message]) -> list[Message]:
    """Messages with the results of tools under the tools' names, where the calls are known by ids."""
    names: dict[Any, Any] = {}
    found: list[Message] = []
    for message in messages:
        for call in _calls_of(message):
            function = call.get("function")
            names[call.get("id")] = function.get("name") if isinstance(function, Mapping) else None
        name = names.get(message.get("tool_call_id")) if message.get("role") == "tool" else None
        found.append({**message, "name": name} if name and not message.get("name") else message)
    return found


def _calls_of(message: Message) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []


def thought_parts(thought: str, text: str) -> list[dict[str, Any]]:
    """An answer's content and what was thought before it, in parts as Mistral's templates take them."""
    return [{"type": "thinking", "thinking": thought, "closed": True}, {"type": "text", "text": text}]


def _prepared(
    message: Message,
    uses: Uses,
    takes_parts: Callable[[], bool],
    takes_thoughts: Callable[[], bool],
    text_arguments: Callable[[], bool],
) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if value is not None}
    given = {name: fields[name] for name in REASONING if name in fields}
    thought = next(iter({**_thoughts(given), **given}.values()), None)
    if thought is not None:
        # The first two are there always, as in transformers, for templates that show a message whole.
        read = {"reasoning_content", "thinking"} | {name for name in REASONING if name in uses.names}
        known, alike = dict.fromkeys(sorted(read, key=REASONING.index), thought), dict.fromkeys(given, thought)
        fields = {**known, **fields, **alike, "reasoning_content": thought}
    if isinstance(parts := fields.get("content"), list):
        told = [{name: value for name, value in part.items() if name not in _HINTS} for part in parts]
        fields["content"] = told if takes_parts() else "\n".join(part["text"] for part in parts)
    if isinstance(thought, str) and isinstance(fields.get("content"), str) and takes_thoughts():
        fields["content"] = thought_parts(thought, fields["content"])
    if fields.get("tool_calls"):
        fields.setdefault("content", "")
    if isinstance(fields.get("tool_calls"), list):
        as_text = uses.text_arguments or text_arguments()
        fields["tool_calls"] = [call if as_text else _call(call) for call in map(_unparsed, fields["tool_calls"])]
    return fields


def _thoughts(message: Message) -> dict[str, Any]:
    """What a message holds of thoughts, by the names for them; what is null or empty is none."""
    return {name: message[name] for name in REASONING if message.get(name) not in _NOTHING}


def _unparsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "parsed_arguments" not in function:
        return call
    return {**call, "function": {name: value for name, value in function.items() if name != "parsed_arguments"}}


def _call(call: Any) -> Any:
    """A tool's call with its arguments as an object, if they are the text of one."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    text = call.get("arguments")
    if isinstance(text, str) and re.match(r"\s*\{", text):
        try:
            return {**call, "arguments": json.loads(text)}
        except (ValueError, RecursionError):
            return call
    return call


def _says_else(message: Message) -> bool:
    return any(message.get(name) for name in ("tool_calls", "function_call", *REASONING))


def _check_parts(number: int, parts: list[Any]) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else shown(part)
            raise RequestError(
                f"message {number} has a part {what} in its content; tpctl takes text only: "
                '{"type": "text", "text": "…"}'
            )
