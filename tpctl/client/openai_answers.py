"""Answers in OpenAI's form, as its client's types describe it: of lines in a batch, and of requests to a server.

A choice is what ``client.batch`` makes of an answer: ``text``, ``finish_reason`` and, where there are any,
``reasoning``, ``tool_calls``, ``logprobs`` and ``prompt_logprobs``; beside ``logprobs`` there may be ``text_offset``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KINDS = {408: "timeout_error", 429: "rate_limit_error"}
"""Types of errors that are not the request's own fault, by status."""


def completion(
    id: str,
    created: int,
    model: str,
    choices: Sequence[Mapping[str, Any]],
    usage: Mapping[str, Any],
    *,
    chat: bool,
) -> dict[str, Any]:
    """The answers to one request; ``created`` in seconds since 1970."""
    make = message if chat else completed
    found: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [make(at, choice) for at, choice in enumerate(choices)],
        "usage": usage,
    }
    if chat and "prompt_logprobs" in choices[0]:  # of a text, each choice has its prompt's own
        found["prompt_logprobs"] = prompt_logprobs(choices[0]["prompt_logprobs"])
    return found


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What is said where there is no answer."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def message(at: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """One answer of a chat."""
    calls = choice.get("tool_calls")
    said = {"role": "assistant", "content": choice["text"] or (None if calls else ""), "refusal": None}
    if calls:
        said["tool_calls"] = calls
    if "reasoning" in choice:
        said["reasoning_content"] = choice["reasoning"]
    logprobs = chat_logprobs(choice["logprobs"]) if "logprobs" in choice else None
    return {"index": at, "message": said, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}


def completed(at: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """One answer to a text."""
    logprobs = None
    if "logprobs" in choice:
        offsets = choice.get("text_offset")
        found = choice["logprobs"]
        logprobs = text_logprobs(found, _places(found, choice["text"]) if offsets is None else offsets)
    said = {"index": at, "text": choice["text"], "logprobs": logprobs, "finish_reason": choice["finish_reason"]}
    if "prompt_logprobs" in choice:
        said["prompt_logprobs"] = prompt_logprobs(choice["prompt_logprobs"])
    return said


def chat_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a chat's tokens, as ``client.batch.logprob_rows`` has them."""
    content = [{**_token(one), "top_logprobs": [_token(top) for top in one["top"]]} for one in tokens]
    return {"content": content, "refusal": None}


def response_logprobs(tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of a response's, where a token of which none are known has no bytes."""
    each: list[dict[str, Any]] = chat_logprobs(tokens)["content"]
    for one in each:
        for token in (one, *one["top_logprobs"]):
            token["bytes"] = token["bytes"] or []
    return each


def text_logprobs(tokens: Sequence[Mapping[str, Any]], offsets: Sequence[int]) -> dict[str, Any]:
    """Of a text's tokens; ``offsets``: at which character of the text each begins."""
    return {
        "tokens": [one["token"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [_by_text(one) for one in tokens],
        "text_offset": list(offsets),
    }


def _places(tokens: Sequence[Mapping[str, Any]], text: str) -> list[int]:
    """Where the tokens of a text begin in it. One that the text leaves out, a control token, takes no room there; those
    that a stop text ended it before begin where they would."""
    found, place = [], 0
    for one in tokens:
        token: str = one["token"]
        found.append(place)
        if text.startswith(token, place) or (len(text) - place < len(token) and token.startswith(text[place:])):
            place += len(token)
    return found


def _by_text(one: Mapping[str, Any]) -> dict[str, float] | None:
    """The likeliest tokens in a token's place and that one, by their texts.

    Tokens that are parts of characters have none, and others may have the same: such are called by their ids, as vLLM's
    server does it, but for the token that stands there.
    """
    if one["logprob"] is None:  # the first of a prompt
        return None
    found: dict[str, float] = {}
    for token in (*one["top"], one):
        name, own = token["token"], token["id"] == one["id"]
        if not own and (not name or name == one["token"] or name in found):
            name = f"token_id:{token['id']}"
        found[name] = token["logprob"]
    return found


def prompt_logprobs(tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """Of a prompt's tokens, as vLLM's server has them: by id, the prompt's own first, then the likeliest.

    ``rank`` is a token's place among the likeliest; ``None`` where it is none of those that were asked for.
    """
    return [None if one["logprob"] is None else _ranked(one) for one in tokens]


def _ranked(one: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {top["id"]: rank for rank, top in enumerate(one["top"], start=1)}
    return {
        str(token["id"]): {
            "logprob": token["logprob"],
            "rank": ranks.get(token["id"]),
            "decoded_token": token["token"],
        }
        for token in (one, *one["top"])
    }


def _token(one: Mapping[str, Any]) -> dict[str, Any]:
    """With its own bytes: a token of which a character's other bytes are elsewhere has no text, but has those."""
    text = one["token"]
    own = one["bytes"] if "bytes" in one else list(text.encode("utf-8", "replace")) if text else None
    return {"token": text, "logprob": one["logprob"], "bytes": own}
