"""JSON schemas of some two hundred and fifty kinds: no two have the same keywords at the same places."""

from __future__ import annotations

from typing import Any

from tests.schemas_combined import combined, drafts, referred
from tests.schemas_of_tasks import tasks
from tests.schemas_parts import (
    DRAFTS,
    FLAG,
    INTEGER,
    NULL,
    SHORT,
    SMALL,
    TAG,
    WORDS,
    Schema,
    closed,
    either,
    listed,
    opened,
)


def whole() -> dict[str, Schema]:
    """What stands alone, and no object around it."""
    return {
        "boolean": FLAG,
        "null": NULL,
        "text": SHORT,
        "number": {"type": "number", "minimum": 0, "maximum": 1},
        "enum": {"enum": WORDS},
        "object": {"type": "object", "maxProperties": 0},
        "list": listed(SMALL),
        "either of three types": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
        "const list": {"const": [1, [2, "three"], {"four": 5}]},
    }


def numbers() -> dict[str, Schema]:
    def number(**more: Any) -> Schema:
        return closed({"value": {"type": "number", **more}})

    def integer(**more: Any) -> Schema:
        return closed({"value": {"type": "integer", **more}})

    return {
        "integer": integer(),
        "integer from": integer(minimum=1),
        "integer up to": integer(maximum=-1),
        "integer within": integer(minimum=18, maximum=120),
        "integer around zero": integer(minimum=-5, maximum=5),
        "integer from zero": integer(minimum=0, maximum=65535),
        "integer below zero": integer(minimum=-1000, maximum=-10),
        "integer, one that is left": integer(exclusiveMinimum=6, exclusiveMaximum=8),
        "integer above": integer(exclusiveMinimum=0, maximum=99),
        "integer below": integer(minimum=10, exclusiveMaximum=20),
        "integer, bounds of both sorts": integer(minimum=3, exclusiveMinimum=5, maximum=9, exclusiveMaximum=20),
        "integer, bounds that are no integers": integer(minimum=0.5, maximum=9.5),
        "integer, a multiple": integer(multipleOf=5, minimum=0, maximum=50),
        "integer, a multiple from": integer(multipleOf=7, minimum=100),
        "number within": number(minimum=1, maximum=100),
        "number around zero": number(minimum=-273.15, maximum=1000),
        "number between": number(exclusiveMinimum=0, exclusiveMaximum=1),
        "number from": number(minimum=0.5, maximum=10**6),
        "number, a multiple of a part": number(multipleOf=0.25, minimum=0, maximum=2),
        "number, a multiple of a whole": number(multipleOf=10, minimum=-50, maximum=50),
        "number or null": closed({"value": {"type": ["number", "null"], "minimum": 0, "maximum": 9}}),
        "number or text": closed({"value": {"type": ["number", "string"], "maximum": 5, "minimum": 0, "maxLength": 3}}),
        "bounds without a type": closed({"value": {"minimum": 0, "maximum": 9, "enum": [1, 5, 20, "a"]}}),
    }


def texts() -> dict[str, Schema]:
    def text(**more: Any) -> Schema:
        return closed({"text": {"type": "string", **more}})

    patterns = {
        "letters": "^[a-z]{3,8}$",
        "a name": "^[A-Z][a-z]{2,10}$",
        "digits by class": r"^\d{5}$",
        "digits and hyphens": r"^\d{3}-\d{2}-\d{4}$",
        "one of words": "^(yes|no|maybe)$",
        "one of words without a group's number": "^(?:north|south)-(?:east|west)$",
        "negated class": r"^[^\"\\]{1,12}$",
        "optional sign": r"^\+?[0-9]{7,12}$",
        "one or more": "^[ab]+c$",
        "none or more": "^x[yz]*$",
        "lazy": "^<.{1,9}?>$",
        "beyond ASCII": "^[äöü]{1,4}$",
        "by code points": "^[\\u0391-\\u03a9]{2,3}$",
        "no ASCII": r"^[^\x00-\x7f]{1,3}$",
        "words and spaces": r"^\w{1,6}(\s\w{1,6}){0,2}$",
        "escaped marks": r"^\(\d\)\.\*\$$",
        "a slash": r"^\/[a-z]{1,4}\/$",
        "a control": r"^a\tb$",
        "begins with": "^ab[a-z]?",
        "ends with": "[a-z]{2}!$",
        "has in it": "ok",
        "any case": "^(?i:[abc]{3})$",
        "one end each": "^aa|bb$",
        "nested groups": "^(a(b(c|d)){1,2})$",
    }
    endless = ("begins with", "ends with", "has in it", "one end each", "one or more", "none or more")
    formats = {"email": 20, "hostname": 12, "uri": 25, "duration": 12, "time": 15, "date-time": 25}
    short = ("date", "ipv4", "ipv6", "uuid")
    return {
        **{
            f"pattern, {name}": text(pattern=pattern, **({"maxLength": 8} if name in endless else {}))
            for name, pattern in patterns.items()
        },
        **{f"format {form}": text(format=form, maxLength=most) for form, most in formats.items()},
        **{f"format {form}": text(format=form) for form in short},
        "up to": text(maxLength=20),
        "from and up to": text(minLength=3, maxLength=40),
        "none": text(maxLength=0),
        "pattern and length": text(pattern="^[ab]*$", minLength=3, maxLength=6),
        "pattern and format": text(pattern="^2[0-9]", format="date"),
        "format in a list": closed({"texts": listed({"type": "string", "format": "ipv4"}, 1, 2)}),
        "length and enum": text(enum=["a", "bb", "ccc", 4], minLength=2),
        "pattern and enum": text(enum=["apple", "bear", "ant"], pattern="^a"),
        "said to be packed": text(contentEncoding="base64", contentMediaType="image/png", maxLength=8),
    }


def chosen() -> dict[str, Schema]:
    """``enum`` and ``const``."""

    def value(schema: Schema) -> Schema:
        return closed({"value": schema})

    return {
        "enum of texts": value({"type": "string", "enum": WORDS[:4]}),
        "enum of texts with marks": value({"enum": ['quo"ted', "back\\slash", "line\nbreak", "tab\t"]}),
        "enum of integers": value({"enum": [0, 1, 42, -7]}),
        "enum of fractions": value({"enum": [0.5, 1.25, -3.75]}),
        "enum of booleans": value({"enum": [True]}),
        "enum with null": value({"enum": ["a", None]}),
        "enum of lists": value({"enum": [[1], [1, 2], []], "minItems": 1}),
        "enum of objects": value({"enum": [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}], "required": ["a"]}),
        "enum of everything": value({"enum": [1, "one", None, [1], {"one": 1}, 1.5, False]}),
        "enum by type": value({"enum": [1, "one", None, 2.5], "type": ["integer", "null"]}),
        "enum by bounds": value({"enum": [1, 2, 3, 4, 12], "minimum": 2, "exclusiveMaximum": 12}),
        "enum by multiples": value({"enum": [1, 2, 3, 4], "multipleOf": 2}),
        "const text": value({"const": "exactly this"}),
        "const number": value({"const": 17}),
        "const fraction": value({"const": 2.5}),
        "const false": value({"const": False}),
        "const null": value({"const": None}),
        "const object": value({"const": {"a": [1, None, True], "b": {"c": "d"}}}),
        "const and its type": value({"type": "string", "const": ""}),
        "list of an enum": value(listed({"enum": WORDS[:3]}, 1, 4)),
    }


def arrays() -> dict[str, Schema]:
    def items(**more: Any) -> Schema:
        return closed({"items": {"type": "array", **more}})

    pair = [SMALL, SHORT]
    return {
        "none": items(maxItems=0),
        "of anything, none": items(items=False),
        "one or none": items(items=SMALL, maxItems=1),
        "so many": items(items=SMALL, minItems=5, maxItems=5),
        "from": items(items=FLAG, minItems=2),
        "texts": items(items=SHORT, minItems=1, maxItems=3),
        "of either": items(items={"anyOf": [SMALL, SHORT, NULL]}, minItems=1, maxItems=4),
        "of types": items(items={"type": ["integer", "boolean"], "minimum": 0, "maximum": 5}, maxItems=4),
        "lists of lists": items(items=listed(SMALL, 2, 2), minItems=2, maxItems=2),
        "three deep": items(items=listed(listed(FLAG, 1, 2), 1, 2), minItems=1, maxItems=2),
        "objects": items(items=closed({"name": SHORT, "age": SMALL}), minItems=1, maxItems=2),
        "maps": items(items={"type": "object", "additionalProperties": SMALL, "maxProperties": 1}, maxItems=2),
        "tuple": items(prefixItems=pair, items=False, minItems=2),
        "tuple, its end may be missing": items(prefixItems=[*pair, FLAG], items=False, minItems=1),
        "tuple and more of one kind": items(prefixItems=[SHORT], items=SMALL, minItems=3, maxItems=4),
        "tuple, cut short": items(prefixItems=[SMALL, SMALL, SMALL], maxItems=2),
        "tuple of tuples": items(prefixItems=[closed({"a": SMALL}), listed(SMALL)], items=False, minItems=2),
        "tuple of one": items(prefixItems=[{"const": "only"}], items=False, minItems=1),
        "older tuple": items(items=pair, additionalItems=False, minItems=2) | {"$schema": DRAFTS[7]},
        "older tuple and more": items(items=[SHORT], additionalItems=SMALL, minItems=2, maxItems=3)
        | {"$schema": DRAFTS[6]},
        "newer, as the older tuple": items(items=[FLAG, SMALL], minItems=2, maxItems=2) | {"$schema": DRAFTS[2019]},
        "list or one": closed({"tags": either(SHORT, listed(SHORT, 1, 3))}),
        "list, without its type": closed({"items": {"items": SMALL, "maxItems": 2, "minItems": 1, "type": ["array"]}}),
    }


def objects() -> dict[str, Schema]:
    several = {"a": SMALL, "b": SHORT, "c": FLAG}
    return {
        "no fields": closed({}),
        "all needed": closed(several),
        "some needed": closed(several, ["b"]),
        "none needed": closed(several, []),
        "twelve": closed({f"field_{at}": [SMALL, SHORT, FLAG, NULL, {"enum": WORDS[:3]}][at % 5] for at in range(12)}),
        "five deep": closed({"a": closed({"b": closed({"c": closed({"d": closed({"leaf": SMALL})})})})}),
        "deep and may be missing": closed({"a": closed({"b": closed({"leaf": SMALL}, [])}, [])}, []),
        "side by side": closed({"left": closed({"x": SMALL}), "right": closed({"y": SHORT})}),
        "open": {**opened({"id": SMALL}, ["id"]), "maxProperties": 1},
        "open, said so": {**opened({"id": SMALL}, ["id"]), "additionalProperties": True, "maxProperties": 1},
        "map": {"type": "object", "additionalProperties": SMALL, "maxProperties": 3},
        "map, not empty": {"type": "object", "additionalProperties": FLAG, "minProperties": 1, "maxProperties": 2},
        "map of lists": {"type": "object", "additionalProperties": listed(SMALL), "maxProperties": 2},
        "map of maps": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": FLAG, "maxProperties": 1},
            "maxProperties": 1,
        },
        "map of objects": {"type": "object", "additionalProperties": closed({"n": SMALL}), "maxProperties": 1},
        "map beside fields": {**opened({"id": SMALL}, ["id"]), "additionalProperties": FLAG, "maxProperties": 3},
        "map with a key": {"type": "object", "additionalProperties": SMALL, "required": ["a"], "maxProperties": 2},
        "keys by pattern": {
            "type": "object",
            "patternProperties": {"^x[0-9]$": SMALL},
            "additionalProperties": False,
            "maxProperties": 2,
        },
        "keys by pattern, one of them needed": {
            "type": "object",
            "patternProperties": {"^x[0-9]$": SMALL},
            "required": ["x1"],
            "additionalProperties": False,
            "maxProperties": 2,
        },
        "keys by two patterns": {
            "type": "object",
            "patternProperties": {"^n_[a-z]{1,3}$": SMALL, "^t_[a-z]{1,3}$": SHORT},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 2,
        },
        "keys by pattern, and others": {
            "type": "object",
            "patternProperties": {TAG: FLAG},
            "additionalProperties": NULL,
            "maxProperties": 2,
        },
        "fields that a pattern is about": {
            **opened({"n_a": INTEGER}, ["n_a"]),
            "patternProperties": {"^n_": {"minimum": 0, "maximum": 9}},
            "additionalProperties": False,
            "maxProperties": 1,
        },
        "keys by pattern, none": {
            **opened({"a": SMALL}, ["a"]),
            "patternProperties": {"^x": False},
            "additionalProperties": NULL,
            "maxProperties": 2,
        },
        "a field that may not be": closed({"a": SMALL, "b": False}, ["a"]),
        "needed and not described": {
            **opened({}),
            "additionalProperties": SMALL,
            "required": ["x", "y"],
            "maxProperties": 2,
        },
        "names with marks": closed({'quo"te': NULL, "back\\slash": NULL, "": NULL, "with space": NULL, "日本": SMALL}),
        "names of keywords": closed({"$ref": SMALL, "type": SHORT, "not": FLAG, "properties": NULL}),
        "its type in a list": {**closed({"a": SMALL}), "type": ["object"]},
        "object or null": closed({"value": {**closed({"x": SMALL}), "type": ["object", "null"]}}),
        "described": closed({"name": SHORT}, title="Person", description="Somebody", **{"$comment": "none"}),
        "defaults and examples": closed({"size": {**SMALL, "default": 4, "examples": [1], "readOnly": True}}),
    }


GROUPS = (whole, numbers, texts, chosen, arrays, objects, combined, referred, drafts, tasks)


def all_schemas() -> list[tuple[str, Schema]]:
    """By name."""
    return [(f"{group.__name__}: {name}", schema) for group in GROUPS for name, schema in group().items()]
