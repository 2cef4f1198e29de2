"""What /v1/responses takes, items and tools, as a chat has it: messages with calls, and functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpctl.client.fields import FieldError
from tpctl.client.openai_schemas import MOST_ITEMS
from tpctl.client.tools.asked import MOST_TOOLS
from tpctl.errors import shown

_TEXTS = ("input_text", "output_text", "text")

_FIELDS: Mapping[str, Sequence[str]] = {
    "message": ("role", "content"),
    "reasoning": ("content", "summary", "encrypted_content"),
    "function_call": ("call_id", "name", "arguments", "parsed_arguments"),
    "function_call_output": ("call_id", "output"),
}
"""Fields of items, besides those of all. What OpenAI's client makes of an answer comes back in the next request."""

_OF_ALL = ("type", "id", "status")
_OF_PARTS = ("type", "text", "annotations", "logprobs", "parsed", "prompt_cache_breakpoint")
_NOTHING: tuple[Any, ...] = (None, "", [], {})  # values of a field that say nothing


def chat_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Of a body's tools and its choice of them those that are functions, as a chat's body has them."""
    found: dict[str, Any] = {}
    if isinstance(tools := body.get("tools"), list) and len(tools) <= MOST_TOOLS:  # more are refused as they are
        found["tools"] = [_tool(tool) for tool in tools]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "function" and choice.keys() == {"type", "name"}:
        found["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    return found


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or tool.get("function") is not None:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def read_items(body: dict[str, Any]) -> list[dict[str, Any]]:
    """``instructions`` and ``input``, which are taken out of a body, as a chat's messages.

    Raises:
        FieldError: they are no such items.
    """
    if "input" not in body:
        raise FieldError("the body has no input", "input")
    instructions, items = body.pop("instructions", None), body.pop("input")
    if not isinstance(instructions, str | None):
        raise FieldError(f"instructions is {shown(instructions)}, but must be a text", "instructions")
    opening = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*opening, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise FieldError(f"input is {shown(items)}, but must be a text or a list of items, not empty", "input")
    if len(items) > MOST_ITEMS:
        raise FieldError(f"input has {len(items)} items, but at most {MOST_ITEMS} are taken; leave some out", "input")
    conversation = _Conversation(opening)
    for number, item in enumerate(items, start=1):
        conversation.add(number, item)
    conversation.end()
    return conversation.messages


class _Conversation:
    """Messages, made of items one after the other."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages
        self._thoughts: list[str] = []  # of the answer whose message or call is to follow
        self._thinking = 0  # which item is the first of them

    def add(self, number: int, item: Any) -> None:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in _FIELDS:
            what = shown(item) if kind is None else f"of type {shown(kind)}"
            raise FieldError(f"item {number} of input is {what}, which tpctl cannot take; leave it out", "input")
        _check(item, (*_OF_ALL, *_FIELDS[kind]), f"item {number} of input")
        match kind:
            case "reasoning":
                self._think(number, item)
            case "message":
                self._say(number, item)
            case "function_call":
                self._call(number, item)
            case _:
                output = item.get("output")
                text = output if isinstance(output, str) else _joined(output, number, _TEXTS)
                self._add({"role": "tool", "tool_call_id": _text(item, "call_id", number), "content": text})

    def end(self) -> None:
        """There are no more items; what was thought last must have come to something."""
        if self._thoughts:
            raise FieldError(
                f"item {self._thinking} of input is reasoning, which no message or call of the assistant follows; "
                "leave it out",
                "input",
            )

    def _think(self, number: int, item: dict[str, Any]) -> None:
        """What was thought; where an item does not have it, what it says of it in short."""
        thought = _joined(item.get("content") or [], number, ("reasoning_text",))
        if not thought and item.get("encrypted_content"):
            raise FieldError(
                f"item {number} of input has its thoughts as encrypted_content, which tpctl cannot read; leave it out",
                "input",
            )
        if thought := thought or _joined(item.get("summary") or [], number, ("summary_text",)):
            self._thinking = self._thinking if self._thoughts else number
            self._thoughts.append(thought)

    def _say(self, number: int, item: dict[str, Any]) -> None:
        message = {"role": item.get("role"), "content": item.get("content")}
        if isinstance(message["content"], list):
            message["content"] = _joined(message["content"], number, _TEXTS)
        self._add(message)

    def _call(self, number: int, item: dict[str, Any]) -> None:
        """A call is part of the answer that the items before it are of."""
        function = {"name": _text(item, "name", number), "arguments": _text(item, "arguments", number)}
        call = {"id": _text(item, "call_id", number), "type": "function", "function": function}
        if not self.messages or self.messages[-1].get("role") != "assistant" or self._thoughts:
            self._add({"role": "assistant", "content": ""})
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _add(self, message: dict[str, Any]) -> None:
        """A message, an answer's with what was thought before it."""
        if self._thoughts and message["role"] == "assistant":
            message["reasoning_content"] = "\n".join(self._thoughts)
            self._thoughts = []
        self.end()
        self.messages.append(message)


def _check(fields: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a field that is not read, so that nothing somebody wrote is dropped without a word."""
    for name, value in fields.items():
        if name not in known and value not in _NOTHING:
            raise FieldError(f"{what} has the field {shown(name)}, which tpctl does not know; leave it out", "input")


def _text(item: dict[str, Any], name: str, number: int) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise FieldError(f"item {number} of input: {name} is {shown(value)}, but must be a text", "input")
    return value


def _joined(parts: Any, number: int, kinds: Sequence[str]) -> str:
    """The text of an item's parts."""
    texts = []
    for part in parts if isinstance(parts, list) else [parts]:
        fields = part if isinstance(part, dict) else {}
        if fields.get("type") not in kinds or not isinstance(fields.get("text"), str):
            raise FieldError(f"item {number} of input has a part {shown(part)}; tpctl takes text only", "input")
        _check(fields, _OF_PARTS, f"a part of item {number} of input")
        texts.append(fields["text"])
    return "\n".join(texts)
