"""Pieces of a grammar for calls, in llguidance's dialect of Lark's language.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tpctl.client.schema_words import unenforced
from tpctl.errors import RequestError
from tpctl.wire.guide import Guide


class NoGrammar(RequestError):
    """Calls of a form cannot be enforced, whatever the tools are."""


def refuse(form: str) -> str:
    """What says that there is no grammar for a form. Raises ``NoGrammar``."""
    raise NoGrammar(f"the arguments in calls of this model are no JSON ({form}), and tpctl cannot enforce that yet")


class Lark:
    """Writes rules.

    Attributes:
        rules: by name, those that ``start`` is made of.
        schemas, strict: as given.
    """

    def __init__(
        self,
        added: Mapping[str, int],
        whitespace: str,
        schemas: Mapping[str, Mapping[str, Any]],
        strict: frozenset[str],
    ) -> None:
        """Begin.

        Args:
            schemas: of the functions' arguments, by name; ``strict``: functions of which a schema must hold whole.
            added: ids of the tokens that the tokenizer adds, by their text.
            whitespace: an expression for what may stand between the parts of JSON.
        """
        self._added = added
        self._whitespace = whitespace
        self.schemas = schemas
        self.strict = strict
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

    def arguments(self) -> list[tuple[str, str]]:
        """The functions, each with a rule for its arguments as JSON.

        What has no strict schema is held to what of it can be enforced, and to the members that it names.
        """
        each = ((name, schema, name in self.strict) for name, schema in self.schemas.items())
        return [(name, self.json(schema if strict else named(schema), strict=strict)) for name, schema, strict in each]

    def up_to(self, before: str, mark: str) -> str:
        """Text up to and with a mark, before which stands ``before`` unless the mark is a token."""
        if mark in self._added:
            return f"{self.without(mark)} {self.mark(mark)}"
        return self._rule("upto", rf"/(?s:.*){_escaped(before + mark)}/", "[lazy]")

    def json(self, schema: Mapping[str, Any], *, strict: bool = True) -> str:
        """A rule for JSON of a schema; unless it is ``strict`` what cannot be enforced is left out of account.

        Raises:
            RequestError: it is strict and has what cannot be.
        """
        if strict and (problem := unenforced(schema)) is not None:
            raise RequestError(problem)
        options = {"whitespace_pattern": self._whitespace, **({} if strict else {"lenient": True})}
        return self._rule("json", f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}")

    def form(self, guide: Guide) -> str:
        """What an answer must be. Raises ``RequestError``."""
        match guide.kind:
            case "json":
                return self.json(json.loads(guide.text), strict=not guide.lenient)
            case "choice":
                return self.one_of(map(self.text, json.loads(guide.text)))
            case "regex":
                return self._rule("FORM", f"/{digits(guide.text)}/")
        return self._rule("form", f"%lark {{\n{guide.text}\n}}")

    def without(self, *marks: str, begins: str = "") -> str:
        """A rule for text, none too, in which none of the marks stands, and that does not begin with ``begins``."""
        each = "|".join(map(_escaped, marks))
        other = rf" & ~/\s*{_escaped(begins)}(?s:.*)/" if begins else ""
        return self._rule("TEXT", rf"/(?s:.*)/ & ~/(?s:.*)({each})(?s:.*)/{other}")

    def ending(self, text: str, mark: str) -> str:
        """A rule for what another one says and the first mark behind it, which is no token."""
        return self._rule("upto", f"{text} {self.text(mark)}", "[lazy]")

    def single(self, mark: str) -> bool:
        """Whether a mark is a token."""
        return mark in self._added

    def anything(self) -> str:
        """A rule for any text."""
        return self._rule("ANY", "/(?s:.*)/")

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in self.rules.items())])

    def _rule(self, name: str, body: str, how: str = "") -> str:
        found = next((known for known, known_body in self.rules.items() if known_body == body), None)
        if found is None:
            found = f"{name}{len(self.rules)}{how}"
            self.rules[found] = body
        return found.removesuffix(how)


_OTHERS = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
    | {"allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas"}
)
"""Words of an object's schema by which it may have members that ``properties`` does not name."""


def named(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of arguments that allows no members but those that it names, if it names some and says no more of
    others: functions are mostly called with what comes, by name."""
    members = schema.get("properties")
    if not isinstance(members, Mapping) or not members or _OTHERS & schema.keys():
        return schema
    needed = schema.get("required")
    if isinstance(needed, list) and not all(isinstance(one, str) and one in members for one in needed):
        return schema
    return {**schema, "additionalProperties": False}


def digits(expression: str) -> str:
    """An expression for a grammar, in which ``\\d`` is 0 to 9, and not the digits of other scripts, too."""
    from llguidance import regex_to_lark

    return regex_to_lark(expression, "d")


def _escaped(text: str) -> str:
    """Text within an expression."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")
