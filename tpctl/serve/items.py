"""What /v1/responses takes, items and tools, as a chat has it: messages with calls, and functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpctl.client.fields import FieldError
from tpctl.errors import shown

_TEXTS = ("input_text", "output_text", "text")


def chat_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Of a body's tools and its choice of them those that are functions, as a chat's body has them."""
    found: dict[str, Any] = {}
    if isinstance(tools := body.get("tools"), list):
        found["tools"] = [_tool(tool) for tool in tools]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "function" and choice.keys() == {"type", "name"}:
        found["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    return found


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or "function" in tool:
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
    conversation = _Conversation(opening)
    for number, item in enumerate(items, start=1):
        conversation.add(number, item)
    return conversation.messages


class _Conversation:
    """Messages, made of items one after the other."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages
        self._thought: str | None = None

    def add(self, number: int, item: Any) -> None:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        match kind:
            case "reasoning":
                self._thought = _joined(item.get("content") or [], number, ("reasoning_text",)) or None
            case "message":
                self._say(number, item)
            case "function_call":
                self._call(number, item)
            case "function_call_output":
                output = item.get("output")
                text = output if isinstance(output, str) else _joined(output, number, _TEXTS)
                self.messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", number), "content": text})
            case _:
                what = shown(item) if kind is None else f"of type {shown(kind)}"
                raise FieldError(f"item {number} of input is {what}, which tpctl cannot take; leave it out", "input")

    def _say(self, number: int, item: dict[str, Any]) -> None:
        message = {"role": item.get("role"), "content": item.get("content")}
        if isinstance(message["content"], list):
            message["content"] = _joined(message["content"], number, _TEXTS)
        self.messages.append(self._with_thought(message))

    def _call(self, number: int, item: dict[str, Any]) -> None:
        """A call is part of the answer that the items before it are of."""
        function = {"name": _text(item, "name", number), "arguments": _text(item, "arguments", number)}
        call = {"id": _text(item, "call_id", number), "type": "function", "function": function}
        if not self.messages or self.messages[-1].get("role") != "assistant" or self._thought is not None:
            self.messages.append(self._with_thought({"role": "assistant", "content": ""}))
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _with_thought(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._thought is not None and message["role"] == "assistant":
            message["reasoning_content"], self._thought = self._thought, None
        return message


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
        texts.append(fields["text"])
    return "\n".join(texts)
