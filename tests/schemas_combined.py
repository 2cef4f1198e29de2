"""Schemas of schemas: alternatives, those that hold together, references, and older drafts."""

from __future__ import annotations

from tests.schemas_parts import DRAFTS, FLAG, INTEGER, NULL, SHORT, SMALL, TAG, Schema, closed, either, listed, opened


def combined() -> dict[str, Schema]:
    circle, square = (closed({"kind": {"const": kind}, "size": SMALL}) for kind in ("circle", "square"))
    text = closed({"kind": {"const": "text"}, "content": SHORT, "bold": FLAG}, ["kind", "content"])
    return {
        "any of types": closed({"value": either(SMALL, SHORT)}),
        "any, or null": closed({"value": either(circle, NULL)}),
        "any of objects": either(circle, square, text),
        "any, in a list": closed({"shapes": listed(either(circle, text), 1, 2)}),
        "any of lists": closed({"value": either(listed(SMALL, 1, 2), listed(SHORT, 1, 2))}),
        "any of one": closed({"value": either(SMALL)}),
        "any within any": closed({"value": either(either(SMALL, NULL), either(SHORT, FLAG))}),
        "any beside fields": {**opened({"id": SMALL}, ["id"]), "maxProperties": 2}
        | either(opened({"a": SHORT}, ["a"]), opened({"b": FLAG}, ["b"])),
        "any says what is needed": closed({"a": SMALL, "b": SHORT}, [])
        | either({"required": ["a"]}, {"required": ["b"]}),
        "any of bounds": closed({"value": {"type": "integer", "anyOf": [{"maximum": -1, "minimum": -9}, SMALL]}}),
        "any of enums": closed({"value": either({"enum": [1, 2]}, {"enum": ["a", "b"]}, {"const": None})}),
        "any with what cannot be": closed({"value": either(SMALL, False)}),
        "any of patterns": closed({"text": {"type": "string", "anyOf": [{"pattern": TAG}, {"pattern": "^[0-9]{2}$"}]}}),
        "one of types": closed({"value": {"oneOf": [SMALL, SHORT, NULL]}}),
        "one of tagged": {"oneOf": [circle, square, text]},
        "one of tagged, in a field": closed({"shape": {"oneOf": [circle, square]}}),
        "one of tagged, in a list": closed({"shapes": listed({"oneOf": [circle, text]}, 1, 2)}),
        "one of consts": closed({"value": {"oneOf": [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}]}}),
        "one within one": closed({"value": {"oneOf": [{"oneOf": [SMALL, SHORT]}, FLAG]}}),
        "one of object, list and text": closed({"value": {"oneOf": [closed({"a": SMALL}), listed(SMALL), SHORT]}}),
        "one, in any": closed({"value": either({"oneOf": [SMALL, NULL]}, listed(FLAG, 1, 2))}),
        "all of bounds": closed({"value": {"allOf": [{"type": "integer"}, {"minimum": 5}, {"maximum": 7}]}}),
        "all of one": closed({"value": {"allOf": [SMALL]}}),
        "all of objects": {"allOf": [opened({"a": SMALL}, ["a"]), opened({"b": SHORT}, ["b"])], "maxProperties": 2},
        "all, one of them closed": {"allOf": [closed({"a": SMALL, "b": FLAG}, ["a"]), opened({"b": {"const": True}})]},
        "all of patterns": closed(
            {"text": {"type": "string", "allOf": [{"pattern": "^a[a-z]*$"}, {"pattern": "b$"}, {"maxLength": 5}]}}
        ),
        "all of lists": closed({"items": {"allOf": [listed(SMALL, 1), {"maxItems": 2, "items": {"minimum": 50}}]}}),
        "all of enums": closed({"value": {"allOf": [{"enum": ["a", "b", "c"]}, {"enum": ["b", "c", "d"]}]}}),
        "all of any": closed({"value": {"allOf": [either(SMALL, SHORT), either(SHORT, NULL)]}}),
        "all of multiples": closed({"value": {"allOf": [SMALL, {"multipleOf": 4}, {"multipleOf": 6}]}}),
        "all beside fields": {**opened({"a": SMALL}, ["a"]), "maxProperties": 2, "allOf": [opened({"b": FLAG}, ["b"])]},
        "all of types": closed({"value": {"allOf": [{"type": ["string", "null"]}, {"type": ["null", "integer"]}]}}),
        "all, any and one": closed(
            {"value": {"allOf": [SMALL], "anyOf": [{"maximum": 20}, {"minimum": 90}], "oneOf": [INTEGER, NULL]}}
        ),
    }


def referred() -> dict[str, Schema]:
    point = closed({"x": SMALL, "y": SMALL})
    tree = closed({"value": SMALL, "left": either({"$ref": "#/$defs/tree"}, NULL)})
    node = closed({"name": SHORT, "children": listed({"$ref": "#/$defs/node"}, 0, 2)})
    ping = closed({"pong": either({"$ref": "#/$defs/pong"}, NULL)})
    pong = closed({"ping": either({"$ref": "#/$defs/ping"}, NULL), "n": SMALL})

    def to(definition: Schema, value: Schema | None = None, place: str = "$defs") -> Schema:
        return {**closed({"value": value or {"$ref": f"#/{place}/it"}}), place: {"it": definition}}

    return {
        "a definition": to(SMALL),
        "an older definition": to(point, place="definitions"),
        "twice": {**closed({name: {"$ref": "#/$defs/p"} for name in ("from", "to")}), "$defs": {"p": point}},
        "several": {
            **closed({"p": {"$ref": "#/$defs/p"}, "t": {"$ref": "#/$defs/t"}}),
            "$defs": {"p": point, "t": SHORT},
        },
        "at the top": {"$ref": "#/$defs/it", "$defs": {"it": point}},
        "in a list": to(SHORT, listed({"$ref": "#/$defs/it"}, 1, 2)),
        "in a tuple": to(
            FLAG, {"type": "array", "prefixItems": [{"$ref": "#/$defs/it"}, SMALL], "items": False, "minItems": 2}
        ),
        "in a map": to(SMALL, {"type": "object", "additionalProperties": {"$ref": "#/$defs/it"}, "maxProperties": 2}),
        "in keys by pattern": to(
            NULL,
            {
                "type": "object",
                "patternProperties": {TAG: {"$ref": "#/$defs/it"}},
                "additionalProperties": False,
                "maxProperties": 1,
            },
        ),
        "or null": to(point, either({"$ref": "#/$defs/it"}, NULL)),
        "in all": to(point, {"allOf": [{"$ref": "#/$defs/it"}]}),
        "beside bounds": to(INTEGER, {"$ref": "#/$defs/it", "minimum": 1, "maximum": 3}),
        "beside fields": {
            **opened({"b": SMALL}, ["b"]),
            "maxProperties": 2,
            "$ref": "#/$defs/it",
            "$defs": {"it": opened({"a": SMALL}, ["a"])},
        },
        "beside words for people": to(SMALL, {"$ref": "#/$defs/it", "description": "A number", "title": "N"}),
        "one behind another": {
            **closed({"v": {"$ref": "#/$defs/a"}}),
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": FLAG},
        },
        "by an anchor": to({"$anchor": "here", **SMALL}, {"$ref": "#here"}),
        "by an id": {
            **closed({"v": {"$ref": "item.json"}}),
            "$id": "https://example.org/all.json",
            "$defs": {"it": {"$id": "item.json", **SHORT}},
        },
        "to a field": closed({"a": SMALL, "b": {"$ref": "#/properties/a"}}),
        "to a place with marks": {**closed({"v": {"$ref": "#/$defs/a~1b%20c"}}), "$defs": {"a/b c": FLAG}},
        "to any place": {
            **closed({"v": {"$ref": "#/components/schemas/it"}}),
            "components": {"schemas": {"it": SMALL}},
        },
        "to itself": closed({"n": SMALL, "next": either({"$ref": "#"}, NULL)}),
        "to itself, may be missing": closed({"n": SMALL, "next": {"$ref": "#"}}, ["n"]),
        "a tree of two": {"$ref": "#/$defs/tree", "$defs": {"tree": tree}},
        "a tree of lists": {"$ref": "#/$defs/node", "$defs": {"node": node}},
        "each to the other": {"$ref": "#/$defs/ping", "$defs": {"ping": ping, "pong": pong}},
        "lists within lists": {
            "$ref": "#/$defs/l",
            "$defs": {"l": {"type": "array", "items": either(SMALL, {"$ref": "#/$defs/l"}), "maxItems": 2}},
        },
        "one of tagged definitions": {
            **closed({"shape": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}}),
            "$defs": {"a": closed({"kind": {"const": "a"}}), "b": closed({"kind": {"const": "b"}, "n": SMALL})},
        },
        "not needed": {**closed({"v": SMALL}), "$defs": {"unused": {"not": {}}}},
    }


def drafts() -> dict[str, Schema]:
    return {
        "4: bounds by booleans": {
            "$schema": DRAFTS[4],
            "id": "https://example.org/x",
            **closed({"n": {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 4}}),
        },
        "4: the upper bound, too": {
            "$schema": DRAFTS[4],
            **closed({"n": {"type": "integer", "minimum": 1, "maximum": 4, "exclusiveMaximum": True}}),
        },
        "6: const": {"$schema": DRAFTS[6], **closed({"n": {"const": "six"}}), "$id": "https://example.org/six"},
        "7: definitions": {
            "$schema": DRAFTS[7],
            **closed({"n": {"$ref": "#/definitions/n"}}),
            "definitions": {"n": {**SMALL, "writeOnly": True}},
        },
        "2019-09: definitions": {
            "$schema": DRAFTS[2019],
            **closed({"n": {"$ref": "#/$defs/n", "maximum": 5}}),
            "$defs": {"n": SMALL},
        },
        "2020-12: tuple": {
            "$schema": DRAFTS[2020],
            **closed({"n": {"type": "array", "prefixItems": [SMALL], "items": False, "minItems": 1}}),
        },
    }
