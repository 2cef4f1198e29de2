"""What the server says of itself at /openapi.json, as OpenAPI 3.1 has it.

Requests are described by the tables that they are checked by (``client.openai_schemas``); answers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpctl.client.openai_schemas import (
    CHAT,
    FLAG,
    IDS,
    MESSAGES,
    OBJECT,
    RESPONSES,
    STRING,
    TEXT,
    Schema,
    body,
    body_of,
    closed,
    nullable,
)
from tpctl.version import __version__

_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_NUMBERS: Schema = {"type": "array", "items": nullable(_NUMBER)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _open(properties: Mapping[str, Schema], *optional: str) -> Schema:
    """An object that has these properties, ``optional`` ones perhaps, and may have others later."""
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": needed}


_FAULT = closed({"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)}, "message")
_ERROR = closed({"error": _FAULT}, "error")
_USAGE = _open(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT, "prompt_tokens_details": OBJECT}
)
_TOKEN = _open({"token": STRING, "logprob": _NUMBER, "bytes": nullable(_list(_COUNT))})
_TOLD = _open({"content": _list({**_TOKEN, "properties": {**_TOKEN["properties"], "top_logprobs": _list(_TOKEN)}})})
_PROMPT_LOGPROBS = _list(nullable({"type": "object", "additionalProperties": _open({"logprob": _NUMBER})}))
_CALL = _open({"id": STRING, "type": {"const": "function"}, "function": _open({"name": STRING, "arguments": STRING})})
_MESSAGE = _open(
    {
        "role": {"const": "assistant"},
        "content": nullable(STRING),
        "reasoning_content": STRING,
        "tool_calls": _list(_CALL),
    },
    "reasoning_content",
    "tool_calls",
)
_REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}
_ANSWERS: Mapping[str, Schema] = {
    CHAT: _open(
        {
            "id": STRING,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": STRING,
            "choices": _list(
                _open({"index": _COUNT, "message": _MESSAGE, "logprobs": nullable(_TOLD), "finish_reason": _REASON})
            ),
            "usage": _USAGE,
            "prompt_logprobs": _PROMPT_LOGPROBS,
        },
        "prompt_logprobs",
    ),
    TEXT: _open(
        {
            "id": STRING,
            "object": {"const": "text_completion"},
            "created": _COUNT,
            "model": STRING,
            "choices": _list(
                _open(
                    {
                        "index": _COUNT,
                        "text": STRING,
                        "logprobs": nullable(
                            _open(
                                {
                                    "tokens": _list(STRING),
                                    "token_logprobs": _NUMBERS,
                                    "top_logprobs": _list(
                                        nullable({"type": "object", "additionalProperties": _NUMBER})
                                    ),
                                    "text_offset": _list(_COUNT),
                                }
                            )
                        ),
                        "finish_reason": _REASON,
                        "prompt_logprobs": _PROMPT_LOGPROBS,
                    },
                    "prompt_logprobs",
                )
            ),
            "usage": _USAGE,
        }
    ),
    RESPONSES: _open(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["completed", "incomplete"]},
            "model": STRING,
            "output": _list(_open({"id": STRING, "type": {"enum": ["reasoning", "message", "function_call"]}})),
            "usage": _open({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
}
_MODEL = _open(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": STRING,
        "root": STRING,
        "max_model_len": _COUNT,
    }
)
_TOKENS = _open(
    {"count": _COUNT, "max_model_len": _COUNT, "tokens": IDS, "token_strs": _list(nullable(STRING))}, "token_strs"
)
_TOKENIZE: Schema = {
    "anyOf": [
        body_of({"model": STRING, "return_token_strs": FLAG, **more}, needed)
        for needed, more in (
            ("prompt", {"prompt": STRING, "add_special_tokens": FLAG}),
            ("messages", {"messages": MESSAGES, "chat_template_kwargs": OBJECT}),
        )
    ]
}
_DETOKENIZE = body_of({"model": STRING, "tokens": IDS}, "tokens")
_HEALTH = closed({"status": {"enum": ["ready", "loading", "ending", "failed", "stalled"]}}, "status")

_REFUSALS = {
    "400": "The body is no JSON, or cannot be had as it is.",
    "403": "A web page asks that is not allowed to.",
    "404": "There is no such model.",
    "408": "The body took too long.",
    "413": "The body is too long.",
    "415": "The body is packed.",
    "429": "Too many requests wait.",
    "500": "The engine failed at this request, or has ended.",
    "503": "The model is being loaded, or the server is ending.",
}
_KEYED = {"401": "There is a key, and this is none or another."}


def description(*, keyed: bool) -> dict[str, Any]:
    """All of it; ``keyed``: the server was started with a key."""
    paths: dict[str, Any] = {
        path: {"post": _operation(path, what, _ANSWERS[path], body(path), keyed, stream=True)}
        for path, what in (
            (CHAT, "The next message of a conversation."),
            (TEXT, "What follows texts."),
            (RESPONSES, "An answer as items; nothing is stored."),
        )
    }
    name = {"name": "name", "in": "path", "required": True, "schema": STRING}
    one = _operation("/v1/models/{name}", "One name.", _MODEL, None, keyed)
    paths |= {
        "/tokenize": {"post": _operation("/tokenize", "A text's tokens.", _TOKENS, _TOKENIZE, keyed)},
        "/detokenize": {
            "post": _operation("/detokenize", "Tokens' text.", closed({"prompt": STRING}, "prompt"), _DETOKENIZE, keyed)
        },
        "/tokenizer_info": {
            "get": _operation("/tokenizer_info", "Special tokens and chat template.", OBJECT, None, keyed)
        },
        "/v1/models": {
            "get": _operation(
                "/v1/models",
                "Names that the model has.",
                _open({"object": {"const": "list"}, "data": _list(_MODEL)}),
                None,
                keyed,
            )
        },
        "/v1/models/{name}": {"get": {**one, "parameters": [name]}},
        "/metrics": {"get": {**_plain("/metrics", "Counters, for Prometheus.", "text/plain", False), "security": []}},
        "/health": {"get": {**_plain("/health", "Whether requests are taken.", "", False), "security": []}},
    }
    health = {"application/json": {"schema": _HEALTH}}
    paths["/health"]["get"]["responses"] = {
        "200": {"description": "They are.", "content": health},
        "503": {"description": "They are not.", "content": health},
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tpctl serve", "version": __version__},
        "paths": paths,
    }
    if keyed:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
    return found


def _operation(
    path: str, what: str, answer: Schema, asked: Schema | None, keyed: bool, *, stream: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if stream:
        content["text/event-stream"] = {}
    found = {**_plain(path, what, "", keyed)}
    found["responses"] = {"200": {"description": what, "content": content}, **_refusals(keyed)}
    if asked is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": asked}}}
    return found


def _plain(path: str, what: str, kind: str, keyed: bool) -> dict[str, Any]:
    """An operation whose answer is of some other kind."""
    name = "".join(part.strip("{}").title() for part in path.replace("_", "/").split("/"))
    answer = {"description": what, "content": {kind: {"schema": STRING}}}
    return {"operationId": name, "summary": what, "responses": {"200": answer, **_refusals(keyed)}}


def _refusals(keyed: bool) -> dict[str, Any]:
    said = {**_REFUSALS, **(_KEYED if keyed else {})}
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": what, "content": content} for status, what in said.items()}
