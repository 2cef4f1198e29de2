"""/tokenize and /detokenize: no engine's work, and none that answers wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpctl.client.fields import FieldError, flag
from tpctl.client.token_ids import check_ids
from tpctl.errors import shorten, shown
from tpctl.serve.answered import Encoded, encode
from tpctl.serve.asked import Reader

MOST_CHARACTERS = 1 << 20
"""Of a text: what takes about a second. A context of a million tokens is reached by longer ones, see ``most_of``."""

MOST_TOKENS = 1 << 18
"""To be made a text: what such a text has, and as much again."""

_EACH = 8  # characters, of a context's tokens: more than those of English have on average


def most_of(max_model_len: int) -> int:
    """Characters of a text that may be tokenised for a model of such a context."""
    return max(MOST_CHARACTERS, _EACH * max_model_len)


async def tokenized(body: dict[str, Any], reader: Reader, max_model_len: int) -> Encoded:
    """What /tokenize answers: the tokens of a text, or of a conversation as the chat template has it.

    Args:
        body: without its model; it is used up.

    Raises:
        ApiError, FieldError: it cannot be had.
    """
    texts = flag(body.pop("return_token_strs", False), "return_token_strs")
    tokenizer, most = reader.tokenizer, most_of(max_model_len)
    if "messages" in body and "prompt" in body:
        raise FieldError("the body has both a prompt and messages; give one of them", "prompt")

    def answer(ids: list[int]) -> bytes:
        found: dict[str, Any] = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
        if texts:
            found["token_strs"] = [tokenizer.backend.id_to_token(id) for id in ids]
        return encode(found)

    if "messages" in body:
        messages, variables = body.pop("messages"), body.pop("chat_template_kwargs", None)
        refuse_rest(body, "/tokenize")

        def of_messages() -> bytes:
            text = reader.rendered(messages, variables)
            check_length(text, "the conversation", most, "messages")
            return answer(tokenizer.encode_rendered(text))

        return Encoded(await reader.threads.aside(of_messages))
    if "prompt" not in body:
        raise FieldError("the body has neither a prompt nor messages; give one of them", "prompt")
    prompt, special = body.pop("prompt"), flag(body.pop("add_special_tokens", True), "add_special_tokens")
    refuse_rest(body, "/tokenize")
    if not isinstance(prompt, str):
        raise FieldError(f"prompt is {shown(prompt)}, but must be a text", "prompt")
    check_length(prompt, "the prompt", most, "prompt")
    made = tokenizer.encode if special else tokenizer.encode_rendered
    return Encoded(await reader.threads.aside(lambda: answer(made(prompt))))


async def detokenized(body: dict[str, Any], reader: Reader, max_model_len: int) -> Encoded:
    """What /detokenize answers: the text of tokens; as ``tokenized``."""
    if "tokens" not in body:
        raise FieldError("the body has no tokens", "tokens")
    ids = body.pop("tokens")
    refuse_rest(body, "/detokenize")
    most = max(MOST_TOKENS, 2 * max_model_len)
    if isinstance(ids, list) and len(ids) > most:
        raise FieldError(f"tokens has {len(ids)} tokens, but at most {most} are taken; send them in pieces", "tokens")
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise FieldError(f"tokens is {shown(ids)}, but must be a list of token ids", "tokens")
    check_known(ids, reader, "tokens")
    decode = reader.tokenizer.decode
    return Encoded(await reader.threads.aside(lambda: encode({"prompt": decode(ids, skip_special=False)})))


def check_known(ids: Sequence[int], reader: Reader, what: str) -> None:
    """Raise ``FieldError`` for a token that the tokenizer does not know."""
    check_ids(ids, max(reader.tokenizer.backend.get_vocab_size(), 1), what)


def check_length(text: str, named: str, most: int, what: str) -> None:
    """Raise ``FieldError`` if a text has more than ``most`` characters."""
    if len(text) > most:
        raise FieldError(
            f"{named} has {len(text)} characters, but at most {most} are tokenised at once; send it in pieces",
            what,
        )


def refuse_rest(body: Mapping[str, Any], path: str) -> None:
    if body:
        raise FieldError(f"unknown field {shorten(repr(min(body)))} in the body of a request to {path}", min(body))
