"""Schemas of what people ask models for."""

from __future__ import annotations

from tests.schemas_parts import SHORT, SMALL, Schema, closed, either, listed

MONEY: Schema = {"type": "number", "minimum": 0, "maximum": 10000}
DAY: Schema = {"type": "string", "format": "date"}
FLAG: Schema = {"type": "boolean"}
MAYBE: Schema = {"anyOf": [SHORT, {"type": "null"}]}


def tasks() -> dict[str, Schema]:
    address = closed({"street": SHORT, "city": SHORT, "zip": {"type": "string", "pattern": r"^\d{5}$"}})
    position = {"type": "array", "prefixItems": [{"type": "number", "minimum": -180, "maximum": 180}] * 2}
    place = {**position, "items": False, "minItems": 2}
    comparison = closed({"field": SHORT, "is": {"enum": ["=", "<", ">"]}, "value": either(SMALL, SHORT)})
    term = either(SMALL, {"$ref": "#/$defs/sum"})
    search, opens = (
        closed({"tool": {"const": name}, "with": schema}) for name, schema in (("find", SHORT), ("n", SMALL))
    )
    return {
        "person": closed(
            {"name": SHORT, "age": SMALL, "mail": {"type": "string", "pattern": "^[a-z]+@[a-z]+$"}}, ["name"]
        ),
        "sentiment": closed({"label": {"enum": ["good", "bad", "none"]}, "score": {**MONEY, "maximum": 1}}),
        "labels": closed({"labels": listed({"enum": ["news", "sport", "art"]}, 1, 3), "sure": FLAG}),
        "customer": closed({"name": SHORT, "address": address}),
        "order": closed({"items": listed(closed({"sku": SHORT, "count": SMALL, "price": MONEY}), 1, 2), "paid": FLAG}),
        "event": closed({"title": SHORT, "date": DAY, "guests": listed(SHORT)}),
        "recipe": closed(
            {"title": SHORT, "steps": listed(SHORT, 1, 4), "minutes": {"type": "integer", "multipleOf": 5}}
        ),
        "review": closed(
            {"stars": {"type": "integer", "minimum": 1, "maximum": 5}, "pros": listed(SHORT, 1), "text": MAYBE}
        ),
        "call": closed({"name": {"enum": ["search", "open"]}, "arguments": closed({"query": SHORT})}),
        "calls": listed(either(search, opens), 1, 2),
        "steps to an answer": closed(
            {"steps": listed(closed({"explanation": SHORT, "output": SHORT}), 1, 2), "final_answer": SHORT}
        ),
        "entities": closed(
            {"found": listed(closed({"text": SHORT, "kind": {"enum": ["person", "place"]}, "at": SMALL}))}
        ),
        "quiz": closed({"question": SHORT, "options": listed(SHORT, 4, 4), "answer": {"enum": [0, 1, 2, 3]}}),
        "place on a map": closed(
            {"type": {"const": "Feature"}, "geometry": closed({"type": {"const": "Point"}, "coordinates": place})}
        ),
        "line on a map": closed({"type": {"const": "LineString"}, "coordinates": {**listed(place, 2, 2)}}),
        "colour": either(
            closed({name: {"type": "integer", "minimum": 0, "maximum": 255} for name in "rgb"}),
            {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
        ),
        "settings": closed({"theme": {"enum": ["dark", "light"]}, "volume": SMALL, "keys": listed(SHORT)}, ["theme"]),
        "verdict": closed({"reasoning": {"type": "string", "minLength": 1, "maxLength": 80}, "verdict": FLAG}),
        "page": closed(
            {"page": SMALL, "next": either(SMALL, {"type": "null"}), "rows": listed(listed(SHORT, 2, 2), 0, 2)}
        ),
        "version": closed(
            {"version": {"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}(\.\d{1,2})?$"}, "stable": FLAG}
        ),
        "invoice": closed(
            {
                "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
                "due": DAY,
                "lines": listed(
                    closed({"text": SHORT, "net": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 99}}),
                    1,
                    1,
                ),
                "paid": {"anyOf": [DAY, {"type": "null"}]},
            }
        ),
        "reply of a server": {
            "oneOf": [
                closed({"status": {"const": "ok"}, "data": closed({"id": SMALL})}),
                closed({"status": {"const": "error"}, "code": SMALL, "message": SHORT}, ["status", "code"]),
            ]
        },
        "remote call": closed(
            {
                "jsonrpc": {"const": "2.0"},
                "method": SHORT,
                "params": either(listed(SMALL, 1, 2), closed({"n": SMALL})),
                "id": {"type": ["string", "integer", "null"], "maxLength": 5, "minimum": 0, "maximum": 99},
            },
            ["jsonrpc", "method"],
        ),
        "changes": listed(
            either(
                closed({"op": {"enum": ["add", "replace"]}, "path": SHORT, "value": SMALL}),
                closed({"op": {"const": "remove"}, "path": SHORT}),
                closed({"op": {"const": "move"}, "path": SHORT, "from": SHORT}),
            ),
            1,
            2,
        ),
        "filter": {
            "$ref": "#/$defs/filter",
            "$defs": {"filter": either(comparison, closed({"and": listed({"$ref": "#/$defs/filter"}, 1, 2)}))},
        },
        "sum of terms": {
            "$ref": "#/$defs/sum",
            "$defs": {"sum": closed({"op": {"enum": ["+", "-"]}, "left": term, "right": term})},
        },
        "timetable": {
            "type": "object",
            "patternProperties": {
                "^(mon|tue|wed)$": listed({"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5]0$"}, 1, 2)
            },
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 2,
        },
        "translations": {
            "type": "object",
            "properties": {"en": SHORT},
            "required": ["en"],
            "patternProperties": {"^[a-z]{2}-[A-Z]{2}$": SHORT},
            "additionalProperties": False,
            "maxProperties": 3,
        },
        "package": closed(
            {
                "name": {"type": "string", "pattern": "^[a-z][a-z-]{0,8}$"},
                "private": FLAG,
                "dependencies": {
                    "type": "object",
                    "additionalProperties": {"type": "string", "pattern": r"^[\^~]?\d{1,2}\.\d{1,2}$"},
                    "maxProperties": 1,
                },
            },
            ["name", "dependencies"],
        ),
        "container": closed(
            {
                "kind": {"const": "Pod"},
                "metadata": closed(
                    {"name": SHORT, "labels": {"type": "object", "additionalProperties": SHORT, "maxProperties": 1}}
                ),
                "spec": closed({"containers": listed(closed({"image": SHORT, "ports": listed(SMALL, 0, 2)}), 1, 1)}),
            }
        ),
        "account": closed(
            {
                "iban": {"type": "string", "pattern": "^DE[0-9]{20}$"},
                "owner": {"type": "string", "minLength": 2, "maxLength": 12},
                "limit": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
            }
        ),
        "device": closed(
            {
                "mac": {"type": "string", "pattern": "^([0-9a-f]{2}:){5}[0-9a-f]{2}$"},
                "address": {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
                "seen": {"type": "string", "format": "date-time", "maxLength": 25},
            },
            ["mac", "address"],
        ),
        "graph": closed(
            {
                "nodes": listed({"type": "string", "pattern": "^[A-D]$"}, 1, 3),
                "edges": listed(
                    {
                        "type": "array",
                        "prefixItems": [{"enum": ["A", "B"]}, {"enum": ["C", "D"]}, SMALL],
                        "items": False,
                        "minItems": 2,
                    },
                    1,
                    2,
                ),
            }
        ),
        "survey": closed(
            {f"q{at}": {"type": "integer", "enum": [1, 2, 3, 4, 5]} for at in range(4)} | {"note": MAYBE}, ["q0", "q1"]
        ),
        "medicine": closed(
            {
                "name": SHORT,
                "dose": closed(
                    {
                        "amount": {"type": "number", "exclusiveMinimum": 0, "maximum": 500},
                        "unit": {"enum": ["mg", "ml"]},
                    }
                ),
            }
        ),
        "journey": closed(
            {
                "legs": listed(
                    {
                        "oneOf": [
                            closed(
                                {"by": {"const": "train"}, "seat": {"type": "string", "pattern": "^[0-9]{1,2}[A-F]$"}}
                            ),
                            closed({"by": {"const": "bus"}}),
                            closed({"by": {"const": "foot"}, "km": {"type": "number", "minimum": 0, "maximum": 9.5}}),
                        ]
                    },
                    1,
                    2,
                )
            }
        ),
        "as pydantic writes it": {
            **closed(
                {
                    "id": {"title": "Id", **SMALL},
                    "owner": {"$ref": "#/$defs/Owner"},
                    "tags": {"default": [], **listed(SHORT)},
                }
            ),
            "title": "Item",
            "$defs": {
                "Owner": {
                    "title": "Owner",
                    **closed({"name": {"title": "Name", **SHORT}, "mail": {**MAYBE, "default": None}}),
                }
            },
        },
        "as zod writes it": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **closed({"n": SMALL, "s": {"enum": ["on", "off"]}}),
        },
    }
