"""Arguments that are written as text, as values of the types that a tool's JSON schema gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.client.tools.json_value import encoded
from tpctl.client.tools.reader import finite_json

_MOST_DEEP = 8  # of schemas within anyOf


def types_of(schema: Any, depth: int = 0) -> set[str]:
    """The types that a schema allows, as far as it names them; empty: it names none."""
    if not isinstance(schema, Mapping) or depth > _MOST_DEEP:
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {one for one in kind if isinstance(one, str)}
    found: set[str] = set()
    for name in ("anyOf", "oneOf"):
        for one in schema.get(name) or ():
            found |= types_of(one, depth + 1)
    for value in [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]:
        found.add(type_of(value))
    return found


def type_of(value: Any) -> str:
    """JSON schema's name of a value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "array" if isinstance(value, list | tuple) else "object"


def as_json(text: str, types: set[str]) -> str:
    """What was written for an argument, as JSON.

    It is a value of one of ``types`` that is no string, where it reads as one; else a string, as it stands, also where
    none is allowed: whoever gets the call will say what is wrong with it. Where no type is known, what JSON can read
    is taken as that.
    """
    bare = text.strip()
    if types != {"string"}:
        lower = bare.lower()
        plain = lower if lower in ("true", "false", "null", "none") else bare
        try:
            value = finite_json("null" if plain == "none" else plain)
        except (ValueError, RecursionError):
            return encoded(text)
        kind = type_of(value)
        if kind == "number" and "integer" in types and "number" not in types and float(value).is_integer():
            return encoded(int(value))
        fits = kind in types or (kind == "integer" and "number" in types) or not types
        if fits and kind != "string":
            return encoded(value)
    return encoded(text)
