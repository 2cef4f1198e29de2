"""Hermes, Qwen2.5, Qwen3 and many others: JSON between two tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>

Source: the chat templates of NousResearch's Hermes 2 Pro and of Qwen2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.client.tools.json_call import json_head, read_call
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Reader, Reading


@dataclass(frozen=True)
class Hermes:
    """One call between two tags. Where the closing one is missing, an object that is whole counts."""

    name = "hermes"
    marks = ("<tool_call>", "</tool_call>")
    opens = ("<tool_call>",)
    bare = ""
    short_ids = False

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        yield from read_call(reader)
        reader.end()
        yield from reader.passed(self.marks[1])

    def grammar(self, lark: Lark, *, single: bool) -> str:
        bodies = (f"{lark.text(json_head(name))} {rule} {lark.text('}')}" for name, rule in lark.arguments())
        opened, closed = (lark.mark(mark) for mark in self.marks)
        one = f'{opened} "\\n" {lark.one_of(bodies)} "\\n" {closed}'
        return lark.listed(one, '"\\n"', single=single)
