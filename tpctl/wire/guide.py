"""What form an answer must have: what a request may ask for, checked, as the one grammar that it comes to.

{"type": "json_object"}                                        response_format, as OpenAI's interface has it
{"type": "json_schema", "json_schema": {"name": …, "schema": {…}, "strict": true}}
"[0-9]{4}-[0-9]{2}"                                            regex
["yes", "no"]                                                  choice
"start: NUMBER (\\",\\" NUMBER)*\\nNUMBER: /[0-9]+/"              grammar, in Lark's language
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tpctl.errors import RequestError, shown

MOST_CHARACTERS = 1 << 18
"""Of a schema, a regular expression, a grammar, or all choices. How deep rules can name each other follows from it."""

NAMES = ("response_format", "regex", "choice", "grammar")
"""Fields of ``SamplingParams``, of which one at most may be set."""


BESIDE_TOOLS, TOOL_CHOICE, STRICT = " beside tools", "tool_choice", "tools with strict"
"""What messages call a form that tools ask for: what stands behind the field of one beside them; calls that must be
made; calls whose arguments have a schema."""


_SCHEMA_FIELDS = frozenset({"name", "description", "schema", "strict"})


class TwoForms(RequestError):
    """Two fields each ask for a form.

    Attributes:
        names: theirs.
    """

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other} are both set; an answer can have one form")
        self.names = (one, other)


class Guide(NamedTuple):
    """A grammar: ``kind`` is "json", "regex", "choice" (a JSON list) or "lark"; ``lenient``: of a JSON schema, ignore
    what cannot be enforced. ``name`` is the field that it comes from, or what else messages call it."""

    kind: str
    text: str
    name: str
    lenient: bool = False

    @property
    def field(self) -> str:
        """That of a request which is at fault where the form cannot be had."""
        return "tools" if self.name.endswith(BESIDE_TOOLS) or self.name == STRICT else self.name


BUSY = "other requests' grammars take all threads that there are for slow ones; try again later"
"""What an engine says that had no time for a new grammar."""


def cannot_be_had(message: str, guide: Guide | None) -> bool:
    """Whether an engine could not answer since the model has no text of the form ``guide`` that was asked for: its
    message then begins with the form's name."""
    return guide is not None and message.startswith(f"{guide.name}: ")


def response_format(value: Any) -> dict[str, Any] | None:
    """A ``response_format`` that asks for a form, else ``None``.

    Raises:
        RequestError: it is none.
    """
    what = "response_format"
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} is {shown(value)}, but must be a JSON object")
    value = _given(value)
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f'{what}: type is {shown(kind)}, but must be "text", "json_object" or "json_schema"')
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if unknown := sorted(map(str, value.keys() - known)):
        raise RequestError(f"{what}: unknown field {shown(unknown[0])} beside type {shown(kind)}")
    if kind == "json_schema":
        _check_schema(value.get("json_schema"), f"{what}: json_schema")
    return None if kind == "text" else dict(value)


def of_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The ``response_format`` that asks for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


def guide_of(values: Mapping[str, Any], called: str | None = None) -> Guide | None:
    """The grammar of a request, of whose checked fields ``values`` has those in ``NAMES``; messages name its field, or
    what it is ``called``.

    Raises:
        RequestError: more than one is set, or it is too long.
    """
    given = [name for name in NAMES if values[name] is not None]
    if not given:
        return None
    if len(given) > 1:
        raise TwoForms(given[0], given[1])
    field, value, name = given[0], values[given[0]], called or given[0]
    if field == "response_format":
        asked = value.get("json_schema", {})
        guide = Guide("json", _json(asked.get("schema", {"type": "object"}), name), name, asked.get("strict") is False)
    elif field == "choice":
        guide = Guide("choice", _json(list(value), name), name)
    else:
        guide = Guide("regex" if field == "regex" else "lark", value, name)
    if len(guide.text) > MOST_CHARACTERS:
        raise RequestError(f"{name} has {len(guide.text)} characters, but at most {MOST_CHARACTERS} are taken")
    try:
        guide.text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not valid Unicode: it holds half of a surrogate pair; use UTF-8") from None
    return guide


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is not given."""
    return {name: one for name, one in value.items() if one is not None}


def _check_schema(asked: Any, what: str) -> None:
    if not isinstance(asked, Mapping):
        raise RequestError(f"{what} is {shown(asked)}, but must be a JSON object with a schema")
    if unknown := sorted(map(str, _given(asked).keys() - _SCHEMA_FIELDS)):
        raise RequestError(f"{what}: unknown field {shown(unknown[0])}; known: {', '.join(sorted(_SCHEMA_FIELDS))}")
    if not isinstance(asked.get("schema"), Mapping):
        raise RequestError(f"{what}: schema is {shown(asked.get('schema'))}, but must be a JSON object")
    if not isinstance(asked.get("strict"), bool | None):
        raise RequestError(f"{what}: strict is {shown(asked['strict'])}, but must be true or false")
    for name in ("name", "description"):
        if not isinstance(asked.get(name), str | None):
            raise RequestError(f"{what}: {name} is {shown(asked[name])}, but must be a string")


def _json(value: Any, name: str) -> str:
    """Properties keep their order: answers have it, too.

    Raises:
        RequestError: there is no such text, or it would be too long by far: to make it would hold up all threads.
    """
    left, least = [value], 0
    while left:
        one = left.pop()
        least += len(one) if isinstance(one, str | Mapping | list | tuple) else 1
        if least > MOST_CHARACTERS:
            raise RequestError(f"{name} has at least {least} characters, but at most {MOST_CHARACTERS} are taken")
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(f"{name} is nested too deeply, or holds what JSON has no form for") from None
