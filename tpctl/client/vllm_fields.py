"""Names that vLLM's server has for what tpctl's own fields ask for, as far as they mean one thing.

{"guided_json": {…}}                        a schema, or the text of one: response_format
{"guided_regex": "[0-9]+"}                  regex
{"guided_choice": ["yes", "no"]}            choice
{"structured_outputs": {"json": {…}}}       the same: "json", "regex", "choice", or "json_object": true
{"top_k": -1}                               all tokens

A grammar is written in another language for each of the libraries that vLLM may have: such fields are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tpctl.client.fields import FieldError
from tpctl.errors import shown
from tpctl.wire.guide import of_schema

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_OF_OUTPUTS = ("json", "regex", "choice", "json_object", "grammar")
_HOW: Mapping[str, tuple[bool, ...]] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (False, True),
}
"""What ``structured_outputs`` may say of how a form is kept, which programs send as it is by default."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields for what tpctl has not, with the values that ask for nothing."""


_SCHEMA: Mapping[str, Any] = {"type": ["object", "string"]}
_WORDS: Mapping[str, Any] = {"type": "string", "minLength": 1}
_CHOICE: Mapping[str, Any] = {"type": "array", "items": _WORDS, "minItems": 1}
_ONE = {"json": _SCHEMA, "regex": _WORDS, "choice": _CHOICE, "json_object": {"const": True}}

SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "guided_json": _SCHEMA,
    "guided_regex": _WORDS,
    "guided_choice": _CHOICE,
    "structured_outputs": {
        "type": "object",
        "properties": {
            **{name: {"anyOf": [schema, {"type": "null"}]} for name, schema in _ONE.items()},
            **{name: {"enum": [*values, None]} for name, values in _HOW.items()},
        },
        "additionalProperties": {"type": "null"},
    },
}
"""What of the fields that ask for a form is taken."""


def taken(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Take fields out of a body; what they ask for, as tpctl's own fields, and what the body calls those.

    Raises:
        FieldError: one cannot be had as it is, or two ask for a form.
    """
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    asked = [(name, kind, body.pop(name)) for name, kind in _GUIDED.items() if name in body]
    if "structured_outputs" in body:
        asked += _outputs(body.pop("structured_outputs"))
    if len(asked) > 1:
        (one, *_), (other, *_) = asked[:2]
        raise FieldError(f"{one} and {other} are both set; an answer can have one form", _field(other))
    for name, kind, value in asked:
        own, made = _form(name, kind, value)
        if own in body:
            raise FieldError(f"{name} and {own} are both set; an answer can have one form", _field(name))
        found[own], names[own] = made, name
    if type(body.get("top_k")) is int and body["top_k"] == -1:
        body["top_k"] = 0
    return found, names


def _outputs(value: Any) -> list[tuple[str, str, Any]]:
    """What is set of ``structured_outputs``."""
    name = "structured_outputs"
    if not isinstance(value, dict):
        raise FieldError(f"{name} is {shown(value)}, but must be a JSON object", name)
    given = {kind: one for kind, one in value.items() if one is not None}
    for kind, values in _HOW.items():
        if kind in given and not any(given[kind] is one for one in values):
            said = f"but must be {' or '.join(map(shown, values))}"
            raise FieldError(f"{name}.{kind} is {shown(given[kind])}, {said}; leave it out", name)
        given.pop(kind, None)
    if unknown := given.keys() - set(_OF_OUTPUTS):
        raise FieldError(f"unknown field {shown(min(unknown))} in {name}; known: {', '.join(_OF_OUTPUTS[:4])}", name)
    if not given:
        raise FieldError(f"{name} asks for no form; give one of {', '.join(_OF_OUTPUTS[:4])}", name)
    return [(f"{name}.{kind}", kind, one) for kind, one in given.items()]


def _form(name: str, kind: str, value: Any) -> tuple[str, Any]:
    """The field of tpctl's that asks for it, and its value."""
    if kind == "grammar":
        said = "whose language depends on vLLM's library; write grammar, in llguidance's dialect of Lark"
        raise FieldError(f"{name} is {shown(value)}, {said}", _field(name))
    if kind in ("regex", "choice"):
        return kind, value
    if kind == "json_object":
        if value is not True:
            raise FieldError(f"{name} is {shown(value)}, but must be true", _field(name))
        return "response_format", {"type": "json_object"}
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict):
        raise FieldError(
            f"{name} is {shown(value)}, but must be a JSON schema, an object or the text of one", _field(name)
        )
    return "response_format", of_schema(schema)


def _field(name: str) -> str:
    return name.partition(".")[0]
