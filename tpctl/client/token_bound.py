"""How many tokens a text has at least, without making them: some megabytes take 30 s, and gigabytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_COMPOSED = 4
"""Characters of which NFC makes one at most: a letter and three marks."""


def most_characters(backend: Tokenizer) -> int | None:
    """Characters of a text that a token stands for at most; ``None`` where some may be dropped or it is not known."""
    from tokenizers import models, pre_tokenizers

    model, added = backend.model, backend.get_added_tokens_decoder().values()
    normalizer, pre_tokenizer = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    if not isinstance(model, models.BPE) or any(token.lstrip or token.rstrip for token in added):
        return None
    if not all(map(_keeps, normalizer)) or not all(map(_keeps, pre_tokenizer)):
        return None
    vocabulary = backend.get_vocab()
    if any(step["type"] == "ByteLevel" for step in normalizer + pre_tokenizer):
        whole = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    elif model.byte_fallback:
        whole = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    else:
        whole = model.unk_token is not None and not model.fuse_unk
    if not whole:
        return None
    # An added token is found in what the normalizer made of the text, as what it makes of the token.
    prepended = sum(len(step["prepend"]) for step in normalizer if step["type"] == "Prepend")
    composed = _COMPOSED if any(step["type"] == "NFC" for step in normalizer) else 1
    return composed * (prepended + max(map(len, vocabulary)))


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """What a normalizer or a pre-tokenizer consists of, as it stands in ``tokenizer.json``."""
    left = [] if part is None else [json.loads(part.__getstate__())]
    while left:
        step = left.pop()
        if step["type"] == "Sequence":
            left += step.get("normalizers", []) + step.get("pretokenizers", [])
        else:
            yield step


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a step leaves a text at least as long as it was, but for NFC."""
    match step["type"]:
        case "NFC" | "ByteLevel" | "Prepend" | "Metaspace" | "Digits":
            return True
        case "Replace":
            pattern = step["pattern"].get("String", "")
            return bool(pattern) and len(step["content"]) == len(pattern)
        case "Split" | "Punctuation":
            return bool(step["behavior"] != "Removed")
    return False
