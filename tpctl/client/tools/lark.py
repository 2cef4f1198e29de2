"""Pieces of a grammar for calls, in llguidance's dialect of Lark's language.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tpctl.errors import RequestError


def refuse(form: str) -> str:
    """What says that there is no grammar for a form. Raises ``RequestError``."""
    raise RequestError(f"the arguments in calls of this model are no JSON ({form}), and tpctl cannot enforce that yet")


class Lark:
    """Writes rules.

    Attributes:
        rules: by name, those that ``start`` is made of.
    """

    def __init__(self, added: Mapping[str, int], whitespace: str) -> None:
        """Begin.

        Args:
            added: ids of the tokens that the tokenizer adds, by their text.
            whitespace: an expression for what may stand between the parts of JSON.
        """
        self._added = added
        self._whitespace = whitespace
        self.rules: dict[str, str] = {}

    def mark(self, mark: str) -> str:
        """A mark: the token, if it is one, else its text."""
        return f"<[{self._added[mark]}]>" if mark in self._added else self.text(mark)

    def text(self, text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    def one_of(self, each: Iterable[str]) -> str:
        return "(" + " | ".join(each) + ")"

    def listed(self, one: str, between: str, *, single: bool) -> str:
        """One thing, or unless it is ``single`` several with something between them."""
        return one if single else f"{one} ({between} {one})*".replace("  ", " ")

    def json(self, schema: Mapping[str, Any], *, strict: bool = True) -> str:
        """A rule for JSON of a schema; unless it is ``strict`` what cannot be enforced is left out of account."""
        options = {"whitespace_pattern": self._whitespace, **({} if strict else {"lenient": True})}
        return self._rule("json", f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}")

    def without(self, *marks: str) -> str:
        """A rule for text, none too, in which none of the marks stands."""
        each = "|".join(re.escape(mark).replace("/", r"\/") for mark in marks)
        name = f"TEXT{len(self.rules)}"
        self.rules[name] = rf"/(?s:.*)/ & ~/(?s:.*)({each})(?s:.*)/"
        return name

    def anything(self) -> str:
        """A rule for any text."""
        return self._rule("ANY", "/(?s:.*)/")

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in self.rules.items())])

    def _rule(self, name: str, body: str) -> str:
        found = next((known for known, known_body in self.rules.items() if known_body == body), None)
        if found is None:
            found = f"{name}{len(self.rules)}"
            self.rules[found] = body
        return found
