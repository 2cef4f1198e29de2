"""Llama 3.1 and later: an answer that is a JSON object, which may stand behind <|python_tag|>; several with ; between.

{"name": "get_weather", "parameters": {"city": "Paris"}}

Source: the chat templates of Llama 3.1 and 3.2, and Meta's pages on their prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.client.tools.json_call import json_head, read_call
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Reader, Reading


@dataclass(frozen=True)
class Llama:
    """Calls at the beginning of an answer, or behind a mark."""

    name = "llama"
    marks = ("<|python_tag|>",)
    opens = ("<|python_tag|>",)
    bare = "{"
    short_ids = False

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        while True:
            yield from read_call(reader)
            reader.end()
            yield from reader.passed(";")
            yield from reader.passed(*self.marks)
            if (yield from reader.at("{")) is None:
                return

    def grammar(self, lark: Lark, *, single: bool) -> str:
        bodies = (
            f"{lark.text(json_head(name, 'parameters'))} {rule} {lark.text('}')}" for name, rule in lark.arguments()
        )
        return lark.listed(lark.one_of(bodies), '"; "', single=single)
