"""What kinds of schemas there are: by their keywords, and what is refused by name.

python -m tests.schemas_kinds          # the table of docs/structured-output.md
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from tests.schemas import all_schemas
from tests.schemas_parts import DRAFTS, NULL, SHORT, SMALL, Schema, closed
from tpctl.client.schema_words import ENFORCED
from tpctl.client.schema_words import REFUSED as refused_words

LIST: Schema = {"type": "array", "items": SMALL}
REFUSED: list[tuple[str, Schema]] = [
    ("uniqueItems", {**LIST, "uniqueItems": True}),
    ("contains", {**LIST, "contains": {"const": 1}}),
    ("minContains", {**LIST, "minContains": 2}),
    ("maxContains", {**LIST, "maxContains": 2}),
    ("unevaluatedItems", {**LIST, "unevaluatedItems": False}),
    ("not", {"type": "string", "not": {"const": "a"}}),
    ("if", {"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
    ("then", {"type": "object", "then": {"required": ["b"]}}),
    ("else", {"type": "object", "else": {"required": ["b"]}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("dependencies", {"type": "object", "dependencies": {"a": ["b"]}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 3}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    ("$dynamicRef", {"type": "array", "items": {"$dynamicRef": "#"}}),
    ("$recursiveRef", {"$schema": DRAFTS[2019], "type": "array", "items": {"$recursiveRef": "#"}}),
    ("x-guidance", {**LIST, "x-guidance": {"lenient": True}}),
    # of another draft than the schema's
    ("disallow", {"disallow": "string"}),
    ("divisibleBy", {"type": "integer", "divisibleBy": 2}),
    ("extends", {"type": "integer", "extends": {"maximum": 3}}),
    ("required", {"type": "object", "properties": {"a": {"type": "string", "required": True}}}),
    ("if", {"$schema": DRAFTS[4], "type": "string", "if": {"minLength": 1}}),
    ("contains", {"$schema": DRAFTS[4], **LIST, "contains": {"const": 1}}),
    ("propertyNames", {"$schema": DRAFTS[4], "type": "object", "propertyNames": {"maxLength": 3}}),
    ("dependentRequired", {"$schema": DRAFTS[7], "type": "object", "dependentRequired": {"a": ["b"]}}),
    ("unevaluatedProperties", {"$schema": DRAFTS[7], "type": "object", "unevaluatedProperties": False}),
    ("minContains", {"$schema": DRAFTS[7], **LIST, "minContains": 1}),
    ("$dynamicRef", {"$schema": DRAFTS[2019], "type": "array", "items": {"$dynamicRef": "#"}}),
    ("$recursiveRef", {"$schema": DRAFTS[7], "type": "array", "items": {"$recursiveRef": "#"}}),
    ("prefixItems", {"$schema": DRAFTS[7], "type": "array", "prefixItems": [SMALL, SHORT]}),
    ("if", closed({"a": {"$schema": DRAFTS[4], "type": "string", "if": {"minLength": 1}}})),
    # what llguidance takes for something else
    ("prefixItems", {"type": "array", "prefixItems": [SMALL, SHORT], "additionalItems": False}),
    ("prefixItems", {"type": "array", "prefixItems": [SHORT], "items": [SMALL]}),
    ("minProperties", {"type": "object", "minProperties": 2, "additionalProperties": SMALL}),
    ("const", {"const": (1 << 53) + 1}),
    ("enum", {"enum": [1, {"id": [1 << 60]}]}),
    ('"maxlength" is no keyword', {"type": "string", "maxlength": 3}),
    ('"additional_properties" is no keyword', {"type": "object", "additional_properties": False}),
    # anywhere
    ("uniqueItems", {"anyOf": [SMALL, {**LIST, "uniqueItems": True}]}),
    ("not", {"type": "object", "patternProperties": {"^a": {"not": NULL}}}),
    ("not", {"type": "object", "additionalProperties": {"not": NULL}}),
    ("not", {"type": "array", "prefixItems": [{"not": NULL}]}),
    ("disallow", {"type": "array", "items": [{"disallow": "null"}]}),
    ("disallow", {"type": "array", "items": [SMALL], "additionalItems": {"disallow": "null"}}),
    ("disallow", {"oneOf": [SMALL, {"disallow": "integer"}]}),
    ("disallow", {"allOf": [{"disallow": "integer"}]}),
    ("disallow", {"$ref": "#/$defs/it", "$defs": {"it": {"disallow": "integer"}}}),
    ("disallow", {"$ref": "#/parts/0/it", "parts": [{"it": {"disallow": "integer"}}]}),
    ("disallow", {"$ref": "#it", "definitions": {"it": {"$anchor": "it", "disallow": "integer"}}}),
    ("disallow", {"$ref": "it", "$id": "http://x.org/a", "$defs": {"it": {"$id": "it", "disallow": "integer"}}}),
    # by what they say
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    ("oneOf", {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
    ("format", {"type": "string", "format": "json-pointer"}),
    ("pattern", {"type": "string", "pattern": "^(?=a)b"}),
    ("pattern", {"type": "string", "pattern": r"\bword\b"}),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": SMALL, "b$": SHORT}}),
    ("maxProperties", {"type": "object", "properties": {"a": SMALL, "b": SMALL}, "maxProperties": 1}),
    ("$ref", {"$ref": "https://example.org/x.json"}),
    ("$ref", {"$ref": "#/$defs/none"}),
    ("$ref", {"$ref": "#none"}),
    ("type", {"type": "objekt"}),
]
"""What the one line of a refusal names, and the schema."""


def problem_of(schema: Schema, text: str) -> str | None:
    """Why an answer is not valid by its schema's draft; ``None``: it is. A day that only some years have and a second
    that only some days have are taken for others: grammars let them through (docs/structured-output.md)."""
    if "format" in set(keywords(schema)):
        text = text.replace("-02-29", "-02-28").replace(":60", ":59")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except Exception as error:
        return f"{error!r:.200}"
    return None


def kind_of(schema: Any) -> object:
    """What a schema is besides its names, texts and numbers: two that differ in those alone are of one kind."""
    if not isinstance(schema, Mapping):
        return schema
    return frozenset((word, None if word in _FOR_PEOPLE else _kind(word, value)) for word, value in schema.items())


def keywords(schema: Any) -> Iterator[str]:
    """Those of a schema and of the schemas in it."""
    if not isinstance(schema, Mapping):
        return
    for word, value in schema.items():
        yield word
        if word in _MAPS:
            for one in value.values():
                yield from keywords(one)
        elif word not in ("enum", "const", "default", "examples", "components"):
            for one in value if isinstance(value, list) else [value]:
                yield from keywords(one)


def table() -> list[str]:
    """The lines of the page's: keywords, by in how many schemas each is."""
    found: Counter[str] = Counter()
    for _, schema in all_schemas():
        found.update(set(keywords(schema)))
    counted = {word: f"`{word}` {found[word]}" for word in sorted(found, key=lambda word: (-found[word], word))}
    some = sorted({word.split()[0] for word, _ in REFUSED if word.isalpha()} - refused_words)
    rows = {
        "hold for answers": [said for word, said in counted.items() if word in ENFORCED],
        "ask for nothing": [said for word, said in counted.items() if word in _FOR_PEOPLE | _ABOUT],
        "are refused": [f"`{word}`" for word in sorted(refused_words)],
        "are refused in some schemas": [f"`{word}`" for word in some],
    }
    return ["| keywords that | and how many schemas have each |", "|---|---|"] + [
        f"| {name} | {', '.join(said)} |" for name, said in rows.items()
    ]


_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_FOR_PEOPLE = {"title", "description", "$comment", "default", "examples", "readOnly", "writeOnly"}
_ABOUT = {"$schema", "$id", "id", "$anchor", "$defs", "definitions", "contentEncoding", "contentMediaType"}


def _kind(word: str, value: Any) -> object:
    if word in _MAPS:
        return tuple(sorted(repr(kind_of(one)) for one in value.values())[:4])
    if word in ("anyOf", "oneOf", "allOf"):
        return frozenset(map(kind_of, value))
    if word in ("prefixItems", "items") and isinstance(value, list):
        return tuple(map(kind_of, value))
    if word == "required":
        return min(len(value), 2)
    if word in ("enum", "const"):
        return repr(sorted({_value(one) for one in (value if word == "enum" else [value])}))
    if word == "pattern":
        return re.sub(r"[^\x00-\x7f]", "~", re.sub(r"[a-zA-Z0-9_!-]", "a", value.replace("\\u", "~")))
    if word == "$ref":
        return re.sub(r"\w+$", "", value)
    if word in ("type", "format", "$schema"):
        return repr(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return (type(value).__name__, (value > 0) - (value < 0))
    return kind_of(value)


def _value(one: Any) -> str:
    if isinstance(one, list):
        return f"[{sorted({_value(part) for part in one})}]"
    if isinstance(one, Mapping):
        return f"{{{sorted({_value(part) for part in one.values()})}}}"
    return type(one).__name__ if not isinstance(one, str) or one.isalnum() else "marks"


if __name__ == "__main__":
    print("\n".join(table()))
