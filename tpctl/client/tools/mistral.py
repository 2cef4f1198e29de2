"""Mistral: a list of objects behind a mark, or, since the eleventh version of its tokenizer, a name and its arguments.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]a1B2c3D4e[ARGS]{"zone": "CET"}

Source: Mistral's chat templates and the instruct tokenizers of mistral-common.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.client.tools.json_call import json_head, read_arguments, read_call
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Malformed, Reader, Reading

_NAMED = ("[CALL_ID]", "[ARGS]", "{")


@dataclass(frozen=True)
class Mistral:
    """Either of the two, as it comes."""

    named: bool = False
    """Whether the template writes names and arguments, which is what grammars go by."""

    name = "mistral"
    marks = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    opens = ("[TOOL_CALLS]",)
    bare = ""
    short_ids = True

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        yield from reader.space()
        if (yield from reader.at("[CALL_ID]", "[ARGS]")) is not None:
            raise Malformed
        if reader.text.startswith("["):
            yield from self._list(reader)
        elif reader.text.startswith("{"):
            yield from read_call(reader)
            reader.end()
        else:
            yield from self._named(reader)

    def grammar(self, lark: Lark, *, single: bool) -> str:
        opened, between = lark.mark(self.marks[0]), lark.mark(self.marks[2])
        if self.named:
            bodies = (f"{lark.text(name)} {between} {rule}" for name, rule in lark.arguments())
            return lark.listed(f"{opened} {lark.one_of(bodies)}", "", single=single)
        bodies = (f"{lark.text(json_head(name))} {rule} {lark.text('}')}" for name, rule in lark.arguments())
        several = lark.listed(lark.one_of(bodies), lark.text(", "), single=single)
        return f'{opened} " [" {several} "]"'

    def _list(self, reader: Reader) -> Reading[None]:
        yield from reader.take("[")
        while True:
            yield from read_call(reader)
            reader.end()
            if (yield from reader.passed(",", "]")) != ",":
                return

    def _named(self, reader: Reader) -> Reading[None]:
        name = ""
        while (found := (yield from reader.at(*_NAMED))) is None:
            if reader.ended or reader.text[:1].isspace():
                raise Malformed
            name += reader.drop(1)
        id = None
        if found == "[CALL_ID]":
            yield from reader.take(found)
            id = yield from reader.name("[ARGS]")
        elif found == "[ARGS]":
            yield from reader.take(found)
        reader.begin(name, id)
        yield from read_arguments(reader)
        reader.end()
