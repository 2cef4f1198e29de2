"""Gemma 4: JSON without quotes around its keys, and with a token in the place of those around its texts.

<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>

Source: Gemma 4's chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tpctl.client.tools.json_value import encoded
from tpctl.client.tools.lark import Lark, refuse
from tpctl.client.tools.reader import Malformed, Reader, Reading, finite_json

_QUOTE = '<|"|>'
_DEEPEST = 64
_SCALARS = {"true": "true", "false": "false", "null": "null", "None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Gemma:
    """One call between two marks."""

    name = "gemma"
    marks = ("<|tool_call>", "<tool_call|>", _QUOTE)
    opens = ("<|tool_call>",)
    bare = ""
    short_ids = False

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        yield from reader.take("call:")
        reader.begin((yield from reader.name("{")))
        yield from _members(reader, 0)
        yield from reader.take(self.marks[1])
        reader.end()

    def grammar(self, lark: Lark, *, single: bool) -> str:
        return refuse(self.name)


def _members(reader: Reader, depth: int) -> Reading[None]:
    """An object behind its bracket."""
    if depth > _DEEPEST:
        raise Malformed
    reader.argue("{")
    if (yield from reader.passed("}")) is None:
        while True:
            if (yield from reader.passed(_QUOTE)) is not None:
                key = yield from reader.all_until(_QUOTE)
                yield from reader.take(":")
            else:
                key = (yield from reader.all_until(":")).strip()
            reader.argue(encoded(key) + ": ")
            yield from _value(reader, depth)
            if (yield from reader.take(",", "}")) == "}":
                break
            reader.argue(", ")
    reader.argue("}")


def _items(reader: Reader, depth: int) -> Reading[None]:
    """A list behind its bracket."""
    if depth > _DEEPEST:
        raise Malformed
    reader.argue("[")
    if (yield from reader.passed("]")) is None:
        while True:
            yield from _value(reader, depth)
            if (yield from reader.take(",", "]")) == "]":
                break
            reader.argue(", ")
    reader.argue("]")


def _value(reader: Reader, depth: int) -> Reading[None]:
    found = yield from reader.passed(_QUOTE, "{", "[")
    if found == "{":
        yield from _members(reader, depth + 1)
    elif found == "[":
        yield from _items(reader, depth + 1)
    elif found == _QUOTE:
        reader.argue('"')
        yield from reader.until(_QUOTE, lambda text: reader.argue(json.dumps(text, ensure_ascii=False)[1:-1]))
        reader.argue('"')
    else:
        word = ""
        while (yield from reader.at(",", "}", "]")) is None:
            if reader.ended or not reader.text[:1].isprintable() or len(word) > 400:
                raise Malformed
            word += reader.drop(1)
        reader.argue(_scalar(word.strip()))


def _scalar(word: str) -> str:
    if word in _SCALARS:
        return _SCALARS[word]
    try:
        value = finite_json(word)
    except (ValueError, RecursionError):
        raise Malformed from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed
    return word
