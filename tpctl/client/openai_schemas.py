"""Which fields bodies in OpenAI's form may have, and what of them is taken, as JSON Schema.

A field that is not in its path's table is refused (``openai_fields``), so the tables are the rule; the server's
description of itself is made of them. Each field may be null, which is as if it were not there. What depends on other
fields or on the model, a schema does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.client import vllm_fields
from tpctl.client.forms import MOST_STOP_CHARACTERS, MOST_STOPS
from tpctl.client.tools.asked import MOST_TOOLS, NAME
from tpctl.wire.guide import MOST_CHARACTERS
from tpctl.wire.ranges import BIAS, RANGES
from tpctl.wire.sampling import MOST_BIASES, MOST_STOP_IDS

Schema = Mapping[str, Any]

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"

MOST_CHOICES = 128
MOST_PROMPTS = 2048
MOST_MESSAGES = 2048
"""Of a request to a server, where a chat template's processes are shared: the longest take it a tenth of a second."""
MOST_ITEMS = 4 * MOST_MESSAGES
"""Of ``RESPONSES``: messages, and the thoughts and calls that are parts of one."""

ANYTHING: Schema = {}
FLAG: Schema = {"type": "boolean"}
STRING: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
WORDS: Schema = {"type": "string", "minLength": 1}
IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}

MEANINGLESS: Mapping[str, Schema] = dict.fromkeys(
    (
        "user",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    ),
    ANYTHING,
)
"""Fields that change no answer, and are not looked at."""

MOST_PAIRS, MOST_PAIR_NAME, MOST_PAIR_TEXT = 16, 64, 512
METADATA: Schema = {
    "type": "object",
    "maxProperties": MOST_PAIRS,
    "propertyNames": {"maxLength": MOST_PAIR_NAME},
    "additionalProperties": {"type": "string", "maxLength": MOST_PAIR_TEXT},
}
"""Changes no answer either, but ``RESPONSES`` repeats it: with OpenAI's limits, of pairs and of their characters."""

NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "web_search_options": (),
    **vllm_fields.HARMLESS,
}
"""Fields for what tpctl has not, with the values that do not ask for it."""

OF_CHATS_ALONE: Mapping[str, Schema] = {"prediction": ANYTHING}
"""Fields of ``CHAT`` that change no answer: what is expected of it makes it faster elsewhere."""

VERBOSITY: Mapping[str, tuple[Any, ...]] = {"verbosity": ("medium",)}
"""What is asked of an answer's length, by a chat and in ``text`` of ``RESPONSES``; with what asks for nothing."""

NOT_IN_RESPONSES: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "context_management": (),
    "stream_options": ({}, {"include_obfuscation": False}),
}
"""The same of ``RESPONSES``, beside those of a chat."""


LOGPROBS = "message.output_text.logprobs"
INCLUDED = ("reasoning.encrypted_content", LOGPROBS)
"""What answers of ``RESPONSES`` may be asked to have besides. Thoughts are told as they are, so whoever wants them
encrypted, to hand them back, has them too."""


def harmless(names: Mapping[str, tuple[Any, ...]]) -> dict[str, Schema]:
    """Fields of ``names`` that have a value which asks for nothing."""
    return {name: {"enum": list(values)} for name, values in names.items() if values}


def closed(properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object of these properties and no others."""
    found = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def asked(properties: Mapping[str, Schema], *required: str) -> Schema:
    """The same of a body or of what is in one: what is null is not there, whatever its name."""
    return {**closed(properties, *required), "additionalProperties": {"type": "null"}}


def nullable(schema: Schema) -> Schema:
    return schema if schema == ANYTHING else {"anyOf": [schema, {"type": "null"}]}


def _nullable(properties: Mapping[str, Schema]) -> dict[str, Schema]:
    return {name: nullable(schema) for name, schema in properties.items()}


_JSON_SCHEMA = asked(
    {"name": nullable(STRING), "description": nullable(STRING), "schema": OBJECT, "strict": nullable(FLAG)}, "schema"
)
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        asked({"type": {"enum": ["text", "json_object"]}}, "type"),
        asked({"type": {"const": "json_schema"}, "json_schema": _JSON_SCHEMA}, "type", "json_schema"),
    ]
}
FORMS: Mapping[str, Schema] = {
    "response_format": RESPONSE_FORMAT,
    "regex": {**WORDS, "maxLength": MOST_CHARACTERS},
    "choice": {"type": "array", "items": WORDS, "minItems": 1},
    "grammar": {**WORDS, "maxLength": MOST_CHARACTERS},
}
NOT_IN_STREAMS: Mapping[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
"""The same of ``stream_options``: chunks are as long as their texts make them."""

STREAM_OPTIONS = asked(_nullable({"include_usage": FLAG, "continuous_usage_stats": FLAG, **harmless(NOT_IN_STREAMS)}))
_FUNCTION = asked(
    {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "description": nullable(STRING),
        "parameters": nullable(OBJECT),
        "strict": nullable(FLAG),
    },
    "name",
)
TOOLS: Schema = {
    "type": "array",
    "maxItems": MOST_TOOLS,
    "items": asked({"type": {"const": "function"}, "function": _FUNCTION}, "type", "function"),
}
_CALLED = closed({"name": STRING}, "name")
_NAMED = closed({"type": {"const": "function"}, "function": _CALLED}, "type", "function")
TOOL_CHOICE: Schema = {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}
_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": STRING},
    "required": ["type", "text"],
}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "maxItems": MOST_MESSAGES,
    "items": {
        "type": "object",
        "properties": {
            "role": STRING,
            "content": {"anyOf": [STRING, {"type": "array", "items": _PART}, {"type": "null"}]},
        },
        "required": ["role"],
    },
}
_PROMPTS: Schema = {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": {"anyOf": [WORDS, IDS]}}
PROMPT: Schema = {"anyOf": [WORDS, {**IDS, "minItems": 1}, _PROMPTS]}
_BIASES: Schema = {
    "type": "object",
    "maxProperties": MOST_BIASES,
    "propertyNames": {"pattern": "^[0-9]+$"},
    "additionalProperties": BIAS.schema(),
}

_STOP: Schema = {**WORDS, "maxLength": MOST_STOP_CHARACTERS}

_SAMPLING: Mapping[str, Schema] = {
    **{
        name: values.schema()
        for name, values in RANGES.items()
        if name not in ("seed", "logprobs", "prompt_logprobs", "guide_after", "top_k", "max_tokens")
    },
    "top_k": RANGES["top_k"]._replace(least=-1).schema(),
    "seed": RANGES["seed"]._replace(least=-(2**63)).schema(),
    "ignore_eos": FLAG,
    "stop_token_ids": {**IDS, "maxItems": MOST_STOP_IDS},
    "logit_bias": _BIASES,
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}]},
    "regex": FORMS["regex"],
    "choice": FORMS["choice"],
    "grammar": FORMS["grammar"],
    **vllm_fields.SCHEMAS,
}
"""Of all paths."""

_LENGTHS = {name: RANGES["max_tokens"].schema() for name in ("max_tokens", "max_completion_tokens")}
_CHOICES: Schema = {"type": "integer", "minimum": 1, "maximum": MOST_CHOICES}
_OF_BOTH: Mapping[str, Schema] = {
    "model": STRING,
    "stream": FLAG,
    "stream_options": STREAM_OPTIONS,
    "n": _CHOICES,
    "best_of": _CHOICES,
    "response_format": RESPONSE_FORMAT,
    "prompt_logprobs": RANGES["prompt_logprobs"].schema(),
    **_LENGTHS,
    **_SAMPLING,
    "metadata": METADATA,
    **MEANINGLESS,
    **harmless(NOT_DONE),
}
_OF_CHATS: Mapping[str, Schema] = {
    "chat_template_kwargs": OBJECT,
    "reasoning_effort": STRING,
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICE,
    "parallel_tool_calls": FLAG,
}
_FORMAT: Schema = {
    "anyOf": [
        asked({"type": {"enum": ["text", "json_object"]}}, "type"),
        asked({"type": {"const": "json_schema"}, **_JSON_SCHEMA["properties"]}, "type", "schema"),
    ]
}
_FLAT_TOOLS: Schema = {
    **TOOLS,
    "items": {
        "anyOf": [TOOLS["items"], asked({"type": {"const": "function"}, **_FUNCTION["properties"]}, "type", "name")]
    },
}
_FLAT_CHOICE: Schema = {"anyOf": [TOOL_CHOICE, closed({"type": {"const": "function"}, "name": STRING}, "type", "name")]}

FIELDS: Mapping[str, Mapping[str, Schema]] = {
    CHAT: {
        "messages": MESSAGES,
        "logprobs": FLAG,
        "top_logprobs": RANGES["logprobs"].schema(),
        **_OF_BOTH,
        **_OF_CHATS,
        **OF_CHATS_ALONE,
        **harmless(VERBOSITY),
    },
    TEXT: {
        "prompt": {
            "anyOf": [WORDS, {"type": "array", "minItems": 1, "items": {"anyOf": [WORDS, IDS, {"type": "integer"}]}}]
        },
        "echo": FLAG,
        "logprobs": RANGES["logprobs"].schema(),
        **_OF_BOTH,
        **{name: RANGES["max_tokens"]._replace(least=0).schema() for name in _LENGTHS},
    },
    RESPONSES: {
        "model": STRING,
        "input": {"anyOf": [STRING, {"type": "array", "minItems": 1, "maxItems": MOST_ITEMS, "items": OBJECT}]},
        "instructions": STRING,
        "stream": FLAG,
        "max_output_tokens": RANGES["max_tokens"].schema(),
        "include": {"type": "array", "items": {"enum": list(INCLUDED)}},
        "top_logprobs": RANGES["logprobs"].schema(),
        "text": asked(_nullable({"format": _FORMAT, **harmless(VERBOSITY)})),
        "reasoning": asked(_nullable({"effort": STRING, "summary": ANYTHING, "generate_summary": ANYTHING})),
        **_SAMPLING,
        **_OF_CHATS,
        "tools": _FLAT_TOOLS,
        "tool_choice": _FLAT_CHOICE,
        "metadata": METADATA,
        **MEANINGLESS,
        **harmless({**NOT_DONE, **NOT_IN_RESPONSES}),
    },
}
"""By path and name."""

NEEDED: Mapping[str, str] = {CHAT: "messages", TEXT: "prompt", RESPONSES: "input"}


def body(path: str) -> Schema:
    """What the body of a request to a path may be."""
    return body_of(FIELDS[path], NEEDED[path])


def body_of(fields: Mapping[str, Schema], *needed: str) -> Schema:
    """A body of these fields."""
    given = {name: schema if name in needed else nullable(schema) for name, schema in fields.items()}
    return asked(given, *needed)
