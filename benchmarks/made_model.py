"""A model that needs no download, as two servers take it: random weights, and a tokenizer of the right size.

Every token has a text, so that each makes a chunk of a stream, as a real model's nearly all do: bytes, the words that
``tpctl bench serve`` asks with, and made ones. Each longer token is another one and a letter, so its merges are real.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

from tokenizers.pre_tokenizers import ByteLevel

from tpctl.bench.prompts import WORDS
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.sharding.proving.verified import remember_verified

SPECIAL = ("<pad>", "<s>", "</s>")  # the shapes' bos_token_id is 1, their eos_token_id 2
SPACE = "Ġ"  # as byte-level BPE writes it
BYTES = len(SPECIAL) + 256
"""Tokens of a tokenizer that has one for each byte."""
TEMPLATE = "{% for one in messages %}{{ one.role + ': ' + one.content + '\\n' }}{% endfor %}{{ 'assistant:' }}"


def made_model(shape: str, tp_size: int) -> tuple[Path, Path]:
    """A shard folder of ``shape`` with a tokenizer, and a folder with no weights for who makes its own."""
    size = shape_config(shape).vocab_size
    folder = with_tokenizer(shape, tp_size, size, "text")
    bare = folder.with_name(f"{folder.name.removesuffix('text')}bare")
    shutil.rmtree(bare, ignore_errors=True)
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    write_tokenizer(bare, size)
    return folder, bare


def with_tokenizer(shape: str, tp_size: int, size: int, name: str, template: str = TEMPLATE) -> Path:
    """A shard folder of ``shape`` beside those without, of this ``name``, with a tokenizer of ``size`` tokens."""
    shards = synthetic_shards(shape, tp_size).folder
    folder = shards.with_name(f"{shards.name}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in shards.rglob("*"):
        place = folder / file.relative_to(shards)
        place.mkdir() if file.is_dir() else os.link(file, place)
    write_tokenizer(folder, size, template)
    remember_verified(folder)
    return folder


def write_tokenizer(folder: Path, size: int, template: str = TEMPLATE) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` of ``size`` tokens, ``BYTES`` at least."""
    vocab = {token: id for id, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    merges = []
    for base, letter in _steps():
        if len(vocab) >= size:
            break
        if (token := base + letter) not in vocab:
            vocab[token] = len(vocab)
            merges.append([base, letter])
    kind = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    found = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": token, **plain} for id, token in enumerate(SPECIAL)],
        "pre_tokenizer": kind,
        "decoder": kind,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "model_max_length": 1 << 20}
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **names}), encoding="utf-8")


def _steps() -> Iterator[tuple[str, str]]:
    """Tokens and the letter behind them: first the words, with a space and without, then whatever is next."""
    for word in WORDS:
        for text in (SPACE + word, word):
            for end in range(1, len(text)):
                yield text[:end], text[end]
    last = [SPACE]
    while True:
        last = [base + letter for base in last for letter in ascii_lowercase]
        yield from ((token[:-1], token[-1]) for token in last)
