"""Llama 3.1 and later: an answer that is a JSON object, which may stand behind <|python_tag|>; several with ; between.

{"name": "get_weather", "parameters": {"city": "Paris"}}

Source: the chat templates of Llama 3.1 and 3.2, and Meta's pages on their prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.client.tools.json_call import json_head, read_call
from tpctl.client.tools.lark import Lark, named
from tpctl.client.tools.reader import Reader, Reading
from tpctl.errors import RequestError

_DEFINED = ("$defs", "definitions")
_TO_WHOLE = re.compile(r'"\$ref": "#(?!/(\$defs|definitions)/)')


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

    def objects(self, lark: Lark) -> str:
        """A call as JSON of a schema, which may stand beside other JSON in a grammar. Raises ``RequestError``."""
        each = []
        for name, schema in lark.schemas.items():
            strict = name in lark.strict
            each.append(lark.json(_object(name, schema if strict else named(schema)), strict=strict))
        return lark.one_of(each)

    def grammar(self, lark: Lark, *, single: bool) -> str:
        bodies = (
            f"{lark.text(json_head(name, 'parameters'))} {rule} {lark.text('}')}" for name, rule in lark.arguments()
        )
        return lark.listed(lark.one_of(bodies), '"; "', single=single)


def _object(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call."""
    if _TO_WHOLE.search(json.dumps(schema)):
        raise RequestError(f"{name}: its schema refers to itself, and calls of this model are told from JSON alone")
    defined = {word: schema[word] for word in _DEFINED if word in schema}
    arguments = {word: value for word, value in schema.items() if word not in _DEFINED}
    members = {"name": {"const": name}, "parameters": arguments}
    return {**defined, "type": "object", "properties": members, "required": [*members], "additionalProperties": False}
