"""JSON schemas of many kinds, some two hundred: what models are asked for, each keyword, and how they nest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

WORDS = ["red", "green", "blue", "dark grey", 'quo"ted', "back\\slash", "naïve", "日本", "a/b", "😀"]
SHORT: Schema = {"type": "string", "maxLength": 12}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}


def closed(properties: dict[str, Schema], required: list[str] | None = None, **more: Any) -> Schema:
    """An object of these properties and no others; all of them needed, if nothing else is said."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


def listed(items: Schema, least: int = 0, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


def scalars() -> Iterator[tuple[str, Schema]]:
    """Each inside an object, as interfaces want it."""
    for name, schema in {
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "number or null": {"type": ["number", "null"]},
        "string or integer": {"anyOf": [SHORT, SMALL]},
        "const text": {"const": "exactly this"},
        "const number": {"const": 17},
        "const object": {"const": {"a": [1, None, True]}},
        "mixed enum": {"enum": [1, "one", None, [1], {"one": 1}]},
    }.items():
        yield name, closed({"value": schema})
    for low, high in [(0, 9), (-5, 5), (1, 100), (18, 120), (-1000, -10), (1990, 2030), (0, 65535), (7, 7)]:
        yield f"integer {low}..{high}", closed({"value": {"type": "integer", "minimum": low, "maximum": high}})
        yield (
            f"integer above {low}, up to {high + 2}",
            closed({"value": {"type": "integer", "exclusiveMinimum": low, "maximum": high + 2}}),
        )
    for low, high in [(0, 1), (-1, 1), (0.5, 99.5), (-273.15, 1000)]:
        yield f"number {low}..{high}", closed({"value": {"type": "number", "minimum": low, "maximum": high}})
    for step in (2, 5, 10):
        yield (
            f"multiple of {step}",
            closed({"value": {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 50}}),
        )


def texts() -> Iterator[tuple[str, Schema]]:
    for least, most in [(0, 5), (1, 1), (3, 8), (10, 20), (0, 40), (5, 5)]:
        yield f"text of {least}..{most}", closed({"text": {"type": "string", "minLength": least, "maxLength": most}})
    for pattern in [
        r"^[a-z]{3,8}$",
        r"^[A-Z][a-z]{2,10}$",
        r"^\d{5}$",
        r"^\d{3}-\d{2}-\d{4}$",
        r"^#[0-9a-f]{6}$",
        r"^(yes|no|maybe)$",
        r"^[a-z]+@[a-z]{2,8}\.(com|org)$",
        r"^v\d{1,2}\.\d{1,2}\.\d{1,2}$",
        r"^[^\"\\]{1,12}$",
        r"^(?:[01]\d|2[0-3]):[0-5]\d$",
        r"^[äöü]{1,4}$",
        r"^\+?[0-9]{7,12}$",
    ]:
        yield f"pattern {pattern}", closed({"text": {"type": "string", "pattern": pattern}})
    for form in ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname"):
        yield f"format {form}", closed({"text": {"type": "string", "format": form}})
    for count in range(1, len(WORDS) + 1):
        yield f"enum of {count}", closed({"text": {"enum": WORDS[:count]}})


def arrays() -> Iterator[tuple[str, Schema]]:
    for least, most in [(0, 0), (0, 1), (1, 1), (2, 4), (5, 5), (0, 8)]:
        yield f"{least}..{most} integers", closed({"items": listed(SMALL, least, most)})
        yield f"{least}..{most} texts", closed({"items": listed(SHORT, least, most)})
    yield "matrix", closed({"rows": listed(listed(SMALL, 2, 2), 2, 2)})
    yield "objects", closed({"people": listed(closed({"name": SHORT, "age": SMALL}), 1, 2)})
    yield "enums", closed({"colours": listed({"enum": WORDS[:4]}, 1, 4)})
    yield "booleans", closed({"flags": listed({"type": "boolean"}, 3, 3)})
    yield "mixed items", closed({"items": listed({"anyOf": [SMALL, SHORT, {"type": "null"}]}, 1, 4)})
    for count in (1, 2, 3, 4):
        parts = [SMALL, SHORT, {"type": "boolean"}, {"enum": WORDS[:3]}][:count]
        tuples = {"type": "array", "prefixItems": parts, "items": False, "minItems": count}
        yield f"tuple of {count}", closed({"tuple": tuples})
    yield "array at the top", listed(closed({"id": SMALL}), 1, 3)
    yield "text at the top", {"type": "string", "maxLength": 20}
    yield "number at the top", SMALL
    yield "enum at the top", {"enum": WORDS}


def objects() -> Iterator[tuple[str, Schema]]:
    kinds = [SMALL, SHORT, {"type": "boolean"}, {"enum": WORDS[:3]}, {"type": "null"}]
    for count in range(1, 13):
        properties = {f"field_{number}": kinds[number % len(kinds)] for number in range(count)}
        yield f"{count} fields", closed(properties)
        yield f"{count} fields, half needed", closed(properties, list(properties)[::2])
    for depth in range(1, 8):
        schema: Schema = closed({"leaf": SMALL})
        for level in range(depth):
            schema = closed({f"level_{level}": schema})
        yield f"depth {depth}", schema
    for names in [["with space", "with-dash"], ["ünï", "日本"], ['quo"te', "back\\slash"], ["", "x"], ["$ref", "type"]]:
        yield f"names {names}", closed(dict.fromkeys(names, SMALL))
    yield "map of integers", {"type": "object", "additionalProperties": SMALL, "maxProperties": 3, "properties": {}}
    yield (
        "map beside a field",
        {"type": "object", "properties": {"id": SMALL}, "required": ["id"]}
        | {"additionalProperties": {"type": "boolean"}},
    )
    yield "no fields", closed({})
    yield "described", closed({"name": SHORT}, title="Person", description="Somebody", **{"$comment": "none"})
    yield "defaults and examples", closed({"size": {**SMALL, "default": 4, "examples": [1, 2]}})


def nested() -> Iterator[tuple[str, Schema]]:
    """Each of some values at each of some places."""
    values: dict[str, Schema] = {
        "integer": SMALL,
        "negative": {"type": "integer", "minimum": -99, "maximum": -1},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1},
        "text": SHORT,
        "code": {"type": "string", "pattern": r"^[A-Z]{2}\d{2}$"},
        "day": {"type": "string", "format": "date"},
        "enum": {"enum": WORDS[:5]},
        "flag": {"type": "boolean"},
        "pair": closed({"x": SMALL, "y": SMALL}),
        "list": listed({"type": "boolean"}, 1, 3),
    }
    for name, value in values.items():
        yield f"list of {name}", closed({"values": listed(value, 1, 3)})
        yield f"{name} that may be left out", closed({"id": SMALL, "value": value}, ["id"])
        yield f"{name} or null", closed({"value": {"anyOf": [value, {"type": "null"}]}})
        yield f"map of {name}", {"type": "object", "additionalProperties": value, "required": ["a"]}
        yield f"{name} by name", {**closed({"value": {"$ref": "#/$defs/it"}}), "$defs": {"it": value}}


def combined() -> Iterator[tuple[str, Schema]]:
    circle, square = (closed({"kind": {"const": kind}, "size": SMALL}) for kind in ("circle", "square"))
    named = closed({"kind": {"const": "text"}, "content": SHORT})
    for count, options in enumerate(([circle], [circle, square], [circle, square, named]), start=1):
        yield f"anyOf {count}", {"anyOf": options}
        yield f"anyOf {count} in a list", closed({"shapes": listed({"anyOf": options}, 1, 2)})
        yield f"oneOf {count}", {"oneOf": options}
    yield (
        "allOf",
        {"allOf": [{"type": "object", "properties": {"a": SMALL}, "required": ["a"]}, {"properties": {"b": SHORT}}]},
    )
    yield "allOf of one", closed({"value": {"allOf": [SMALL]}})
    tree = closed({"value": SMALL, "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}})
    yield "recursive list", {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    node = closed({"name": SHORT, "children": listed({"$ref": "#/$defs/node"}, 0, 2)})
    yield "recursive tree", {"$ref": "#/$defs/node", "$defs": {"node": node}}
    for count in (1, 2, 3):
        definitions = {f"part_{number}": closed({"n": SMALL}) for number in range(count)}
        yield (
            f"{count} definitions",
            {**closed({name: {"$ref": f"#/$defs/{name}"} for name in definitions}), "$defs": definitions},
        )
    yield (
        "optional or null",
        closed({"a": {"type": ["integer", "null"], "maximum": 9, "minimum": 0}, "b": SHORT}, ["b"]),
    )


def tasks() -> Iterator[tuple[str, Schema]]:
    """What people ask models for."""
    money = {"type": "number", "minimum": 0, "maximum": 10000}
    address = closed({"street": SHORT, "city": SHORT, "zip": {"type": "string", "pattern": r"^\d{5}$"}})
    yield from {
        "person": closed(
            {"name": SHORT, "age": SMALL, "email": {"type": "string", "format": "email"}}, ["name", "age"]
        ),
        "sentiment": closed({"label": {"enum": ["positive", "negative", "neutral"]}, "score": {**money, "maximum": 1}}),
        "address": address,
        "customer": closed({"name": SHORT, "address": address}),
        "order": closed(
            {"items": listed(closed({"sku": SHORT, "count": SMALL, "price": money}), 1, 2), "paid": {"type": "boolean"}}
        ),
        "event": closed({"title": SHORT, "date": {"type": "string", "format": "date"}, "guests": listed(SHORT, 0, 3)}),
        "recipe": closed({"title": SHORT, "steps": listed(SHORT, 1, 4), "minutes": SMALL}),
        "review": closed(
            {"stars": {"type": "integer", "minimum": 1, "maximum": 5}, "pros": listed(SHORT), "cons": listed(SHORT)}
        ),
        "tool call": closed({"name": {"enum": ["search", "open"]}, "arguments": closed({"query": SHORT})}),
        "calls": listed({"anyOf": [closed({"search": SHORT}), closed({"open": SMALL})]}, 1, 3),
        "steps": closed(
            {"steps": listed(closed({"explanation": SHORT, "output": SHORT}), 1, 3), "final_answer": SHORT}
        ),
        "entities": closed(
            {"entities": listed(closed({"text": SHORT, "kind": {"enum": ["person", "place", "date"]}}), 0, 3)}
        ),
        "translation": closed({"source": {"enum": ["en", "de", "fr"]}, "text": SHORT}),
        "quiz": closed({"question": SHORT, "options": listed(SHORT, 4, 4), "answer": {"enum": [0, 1, 2, 3]}}),
        "coordinates": closed(
            {
                "lat": {"type": "number", "minimum": -90, "maximum": 90},
                "lon": {"type": "number", "minimum": -180, "maximum": 180},
            }
        ),
        "colour": closed({name: {"type": "integer", "minimum": 0, "maximum": 255} for name in ("r", "g", "b")}),
        "settings": closed(
            {"theme": {"enum": ["dark", "light"]}, "volume": SMALL, "shortcuts": listed(SHORT)}, ["theme"]
        ),
        "verdict": closed({"reasoning": {"type": "string", "maxLength": 80}, "verdict": {"type": "boolean"}}),
        "page": closed(
            {"page": SMALL, "next": {"anyOf": [SMALL, {"type": "null"}]}, "rows": listed(listed(SHORT, 2, 2), 0, 2)}
        ),
        "version": closed(
            {"version": {"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}$"}, "stable": {"type": "boolean"}}
        ),
    }.items()


def all_schemas() -> list[tuple[str, Schema]]:
    """By name."""
    kinds = (scalars, texts, arrays, objects, nested, combined, tasks)
    return [(f"{kind.__name__}: {name}", schema) for kind in kinds for name, schema in kind()]
