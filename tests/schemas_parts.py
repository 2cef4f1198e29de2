"""Parts that schemas of the tests are made of."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

SHORT: Schema = {"type": "string", "maxLength": 12}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}
INTEGER: Schema = {"type": "integer"}
WORDS = ["red", "green", "blue", "dark grey", 'quo"ted', "back\\slash", "naïve", "日本", "a/b", "😀"]
TAG = "^[a-z]{1,6}$"
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
DRAFTS = {
    4: "http://json-schema.org/draft-04/schema#",
    6: "http://json-schema.org/draft-06/schema#",
    7: "http://json-schema.org/draft-07/schema#",
    2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}


def closed(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> Schema:
    """An object of these properties and no others; all of them needed, if nothing else is said."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


def opened(properties: dict[str, Any], required: list[str] | None = None) -> Schema:
    """An object of these properties and any others."""
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def listed(items: Any, least: int = 0, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


def either(*schemas: Any) -> Schema:
    return {"anyOf": list(schemas)}
