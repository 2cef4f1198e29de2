"""Which words of a JSON schema no grammar here holds an answer to: they are refused, and not left out of account.

llguidance refuses what the schema's own draft knows and it does not. It says nothing of words that another draft knows,
of ``prefixItems`` where it takes a schema for one of an older draft, of other spellings, and of numbers that a double
does not hold. The drafts: https://json-schema.org/specification-links
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from tpctl.errors import shown


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENFORCED = _words("""
    $ref additionalItems additionalProperties allOf anyOf const enum exclusiveMaximum exclusiveMinimum format items
    maxItems maxLength maxProperties maximum minItems minLength minProperties minimum multipleOf oneOf pattern
    patternProperties prefixItems properties required type
""")
"""Words that ask something of an answer, and that grammars are made of."""

REFUSED = _words("""
    $dynamicAnchor $dynamicRef $recursiveAnchor $recursiveRef contains dependencies dependentRequired dependentSchemas
    disallow divisibleBy else extends if maxContains minContains not propertyNames then unevaluatedItems
    unevaluatedProperties uniqueItems x-guidance
""")
"""Words of any draft that ask something of an answer, and of which no grammar is made; and llguidance's own, by which a
schema would change what is promised of its answers."""

_LISTS, _MAPS = ("allOf", "anyOf", "oneOf", "prefixItems"), ("properties", "patternProperties")
_ONE = ("additionalItems", "additionalProperties", "items")
_OLDER = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")
_EXACT = 1 << 53


LENIENT = 'say "strict": false beside the schema'
"""What a message advises; not every field that a schema comes from can have that."""


def unenforced(schema: Mapping[str, Any]) -> str | None:
    """What of a schema would not be held to, as one line that names the keyword and where it is; ``None``: nothing.

    Of definitions only those that are referred to count.
    """
    if isinstance(schema.get("schema"), Mapping) and not ENFORCED & schema.keys():
        return "the schema stands within another object, beside its name; give what is under schema alone"
    left: list[tuple[Any, str, str]] = [(schema, "#", "")]
    seen: set[int] = set()
    while left:
        one, place, draft = left.pop()
        if not isinstance(one, Mapping) or id(one) in seen:
            continue
        seen.add(id(one))
        draft = str(one.get("$schema", draft))
        if (problem := _problem(one, draft)) is not None:
            return f"{problem} (at {shown(place)})"
        left += [(value, f"{place}/{name}", draft) for name, value in _parts(one)]
        if isinstance(reference := one.get("$ref"), str):
            left += [(value, at, draft) for at, value in _meant(schema, reference)]
        if one is not schema and ("$id" in one or "id" in one):
            left += [(value, f"{place}/{name}", draft) for name, value in _definitions(one)]
    return None


def named(message: str) -> str:
    """What llguidance says of a schema, with the keyword that it is about."""
    if "oneOf constraints are not supported" in message:
        return "oneOf cannot be enforced where it is not plain that one of its schemas holds at most; say anyOf"
    for beginning, word in (
        ("regex parse error", "pattern"),
        ("lookarounds not supported", "pattern"),
        ("patternProperty regexes", "patternProperties"),
        ("min/maxProperties", "maxProperties"),
        ("Resource ", "$ref or $schema"),
        ("Anchor ", "$ref"),
        ("Pointer ", "$ref"),
    ):
        if message.startswith(beginning):
            return f"{word}: {message}"
    return message


def _problem(schema: Mapping[str, Any], draft: str) -> str | None:
    """What would be left out of account of one schema, without those in it."""
    if refused := sorted(REFUSED & schema.keys()):
        return f"{', '.join(refused)} cannot be enforced; leave out, or {LENIENT}"
    for word in schema.keys() - ENFORCED:
        if (meant := _SPELLED.get(_letters(word))) is not None:
            return f"{shown(word)} is no keyword and would ask for nothing; is {meant} meant?"
    if isinstance(required := schema.get("required"), bool):
        return f"required is {shown(required)}, but must be a list of names, beside properties"
    if "prefixItems" in schema:
        beside = "additionalItems" if "additionalItems" in schema else "a list of items"
        if "additionalItems" in schema or isinstance(schema.get("items"), list):
            return f"prefixItems cannot be enforced beside {beside}; say items for what comes behind those"
        if any(one in draft for one in _OLDER):
            return f"prefixItems is no keyword of {shown(draft)}; leave $schema out"
    least, given = schema.get("minProperties"), required if isinstance(required, list) else []
    if isinstance(least, int) and least - len({name for name in given if isinstance(name, str)}) > 1:
        return (
            f"minProperties is {least} and required has {len(given)} names, but only one more can be demanded, since "
            "other names may come twice; name them in required"
        )
    for word in ("const", "enum"):
        if (number := _inexact(schema.get(word))) is not None:
            return f"{word} has {number}, but whole numbers are exact up to 2^53 = {_EXACT} only; say a pattern"
    return None


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that stand in one, by where."""
    for word in _ONE:
        if isinstance(found := schema.get(word), list):
            yield from ((f"{word}/{at}", one) for at, one in enumerate(found))
        else:
            yield word, found
    for word in _LISTS:
        if isinstance(found := schema.get(word), list):
            yield from ((f"{word}/{at}", one) for at, one in enumerate(found))
    for word in _MAPS:
        if isinstance(found := schema.get(word), Mapping):
            yield from ((f"{word}/{name}", one) for name, one in found.items())


def _definitions(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for word in ("$defs", "definitions"):
        if isinstance(found := schema.get(word), Mapping):
            yield from ((f"{word}/{name}", one) for name, one in found.items())


def _meant(root: Mapping[str, Any], reference: str) -> list[tuple[str, Any]]:
    """What a reference may be to: the place that it names, or by an id or an anchor any definition."""
    if not reference.startswith("#/"):
        return [(f"#/{name}", one) for name, one in _definitions(root)]
    found: Any = root
    for part in reference[2:].split("/"):
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return []
    return [(reference, found)]


def _inexact(value: Any) -> int | None:
    """A whole number within a value that a double does not hold for certain."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, int) and abs(one) > _EXACT:
            return one
    return None


def _letters(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


_SPELLED = {_letters(word): word for word in ENFORCED | REFUSED if word.isalpha()}
