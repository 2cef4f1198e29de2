"""The tokenizer that a GGUF's keys describe, checked before anything is converted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tpctl.checkpoint.gguf.header import GgufError
from tpctl.checkpoint.gguf.metadata import OTHER, Metadata
from tpctl.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from tpctl.errors import shorten

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type``."""

TURN_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    }
)
"""Control tokens that end a turn. Files of Phi-3 and others name only the token that ends a text, and rely on llama.cpp
knowing these by their text."""

_TEMPLATE_NAME = re.compile(r"[\w-]{1,64}")


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer's files are made of.

    Attributes:
        pre_tokenizer: of a byte-level vocabulary; a sentencepiece one has ``scores`` instead.
        merges: as the file has them, or ``None``: they follow from the scores.
        types: of each token; empty where the file has none.
        special: ``bos``, ``eos``, ``unk`` and ``pad``, as far as they are named, and their ids.
        ends: ids that end an answer, the one that ends a text first.
        strips: control tokens take the white space behind them.
        templates: chat templates by name; the one for plain chat is ``default``.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    pre_tokenizer: PreTokenizer | None
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...] | None
    special: Mapping[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    strips: bool
    templates: Mapping[str, str]

    @classmethod
    def read(cls, metadata: Metadata) -> Vocabulary:
        """The vocabulary of a file.

        Raises:
            GgufError: it has none, or one that would be read wrongly.
        """
        model = metadata.text("tokenizer.ggml.model", "none")
        if model not in ("gpt2", "llama"):
            raise GgufError(f"its tokenizer is of the kind {model!r}, tpctl converts gpt2 and llama; {OTHER}")
        sentencepiece = model == "llama"
        tokens = _tokens(metadata)
        types = tuple(int(kind) for kind in _per_token(metadata, "tokenizer.ggml.token_type", len(tokens)))
        scores = _per_token(metadata, "tokenizer.ggml.scores", len(tokens))
        pre = None if sentencepiece else _pre_tokenizer(metadata)
        merges = _merges(metadata) if metadata.has("tokenizer.ggml.merges") else None
        if sentencepiece and not scores:
            raise GgufError("it has no tokenizer.ggml.scores, which a llama tokenizer needs; download it again")
        if not sentencepiece and merges is None:
            raise GgufError("it has no tokenizer.ggml.merges, which a gpt2 tokenizer needs; download it again")
        for key in ("add_sep_token", "remove_extra_whitespaces"):
            metadata.only(f"tokenizer.ggml.{key}", 0)
        if not sentencepiece:
            metadata.only("tokenizer.ggml.add_space_prefix", 0)
        # Where the file names none, a sentencepiece vocabulary begins with these.
        usual = {"unk": 0, "bos": 1, "eos": 2} if sentencepiece else {}
        special = {
            name: place
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (place := _token_id(metadata, key, len(tokens), usual.get(name))) is not None
        }
        add_bos = metadata.flag("tokenizer.ggml.add_bos_token", sentencepiece or (pre is not None and pre.add_bos))
        add_eos = metadata.flag("tokenizer.ggml.add_eos_token", False)
        for name, added in (("bos", add_bos), ("eos", add_eos)):
            if added and name not in special:
                raise GgufError(f"it says to add a token to every text, but names no tokenizer.ggml.{name}_token_id")
        _ignore(metadata)
        return cls(
            tokens=tokens,
            types=types,
            pre_tokenizer=pre,
            scores=scores,
            merges=merges,
            special=special,
            ends=_ends(metadata, tokens, types, special),
            add_bos=add_bos,
            add_eos=add_eos,
            space_prefix=sentencepiece and metadata.flag("tokenizer.ggml.add_space_prefix", True),
            # The flag itself is lost in a GGUF; llama.cpp too sets it again for these models.
            strips=sentencepiece and metadata.architecture == "phi3",
            templates=_templates(metadata),
        )


def _ignore(metadata: Metadata) -> None:
    """Tokens for other uses than a continued text, and the description that the other keys were made from."""
    names = ("seperator", "cls", "mask", "prefix", "suffix", "middle")
    infill = ("pre", "suf", "mid", "pad", "rep", "sep")
    metadata.ignore(*(f"tokenizer.ggml.{name}_token_id" for name in names))
    metadata.ignore(*(f"tokenizer.ggml.fim_{name}_token_id" for name in infill))
    metadata.ignore("tokenizer.ggml.token_type_count", "tokenizer.huggingface.json", "tokenizer.ggml.pre")


def _tokens(metadata: Metadata) -> tuple[str, ...]:
    tokens = tuple(token or f"[EMPTY_{place}]" for place, token in enumerate(metadata.texts("tokenizer.ggml.tokens")))
    if not tokens:
        raise GgufError("its tokenizer has no tokens; download it again")
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            raise GgufError(f"its tokenizer has the token {shorten(token)!r} twice; download it again")
        seen.add(token)
    return tokens


def _per_token(metadata: Metadata, key: str, count: int) -> tuple[float, ...]:
    if not metadata.has(key):
        return ()
    values = metadata.numbers(key)
    if len(values) != count:
        raise GgufError(f"{key} has {len(values)} entries for {count} tokens; download it again")
    return tuple(values)


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text("tokenizer.ggml.pre", "")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    if name in ("", "default"):
        raise GgufError(
            "it does not say how its tokenizer splits text (tokenizer.ggml.pre), as files of before May 2024 do not; "
            "use a newer file of the model"
        )
    raise GgufError(f"its tokenizer splits text by the rule {shorten(name)!r}, which cannot be converted; {OTHER}")


def _merges(metadata: Metadata) -> tuple[tuple[str, str], ...]:
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise GgufError(f"its tokenizer has the merge {shorten(merge)!r}, which is no pair; download it again")
        merges.append((left, right))
    return tuple(merges)


def _token_id(metadata: Metadata, name: str, count: int, usual: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not metadata.has(key):
        return usual if usual is not None and usual < count else None
    value = metadata.integer(key)
    if value >= count:
        raise GgufError(f"{key} is {value}, but its tokenizer has {count} tokens; download it again")
    return value


def _ends(
    metadata: Metadata, tokens: tuple[str, ...], types: tuple[int, ...], special: Mapping[str, int]
) -> tuple[int, ...]:
    named = [special.get("eos")]
    named += [_token_id(metadata, name, len(tokens)) for name in ("eot", "eom")]
    known = [
        place for place, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED) and tokens[place] in TURN_ENDS
    ]
    ends = tuple(dict.fromkeys([place for place in named if place is not None] + known))
    if not ends:
        raise GgufError(f"it names no token that ends a text (tokenizer.ggml.eos_token_id); {OTHER}")
    return ends


def _templates(metadata: Metadata) -> Mapping[str, str]:
    templates = {}
    if metadata.has("tokenizer.chat_template"):
        templates["default"] = metadata.text("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    for key in metadata.named(prefix):
        name = key.removeprefix(prefix)
        if not _TEMPLATE_NAME.fullmatch(name):
            raise GgufError(f"its chat template {shorten(name)!r} has a name that no file can have; {OTHER}")
        templates.setdefault(name, metadata.text(key))
    metadata.ignore("tokenizer.chat_templates")  # their names once more
    return templates
