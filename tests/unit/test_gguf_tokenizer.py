"""Tokenizers made from a GGUF's keys, against those that transformers makes, and against the rules themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regex

from tests.unit.gguf_files import TOKENS, tiny_config, tokenizer_keys, write_gguf
from tpctl.checkpoint.gguf import GgufModel
from tpctl.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from tpctl.checkpoint.gguf.tokenizer import build_tokenizer, derived_merges, write_tokenizer
from tpctl.client.tokenizer import Tokenizer

TEXTS = [
    "Hello  World's 12345 cafe\u0301, I'LL naïve\r\n\n  x=1; /path/to\t中文字 1a2b3",
    " DON'T   McDonald HTTPServer 3.14159 Ⅷ ½ \n",
]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "<|user|>", "<|end|>"]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": PIECES + WORDS,
    "tokenizer.ggml.scores": [0.0] * len(PIECES) + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -5.5, -7.0, -8.0, 0.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9 + [3, 3],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def byte_level(pre: str) -> dict[str, Any]:
    """A vocabulary of all bytes, in which what a rule splits is seen by what merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pairs = [
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "1"),
        ("H", "T"),
        ("'", "s"),
        ("Ġ", "Ġ"),
        ("Ċ", "Ċ"),
        ("l", "o"),
        ("ĠM", "c"),
    ]
    pairs = [("Ġ", "M"), *pairs]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, *("".join(pair) for pair in pairs), "World"]
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }


def read(path: Path, keys: dict[str, Any], family: str = "llama") -> GgufModel:
    count = len(keys.get("tokenizer.ggml.tokens", TOKENS))
    write_gguf(path, tiny_config(family, vocab_size=count), keys=keys)
    return GgufModel.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("pre", [name for name, rule in PRE_TOKENIZERS.items() if not rule.digits])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer

    keys = {**tokenizer_keys(), **byte_level(pre)}
    vocabulary = read(tmp_path / "x.gguf", byte_level(pre)).vocabulary
    # What transformers leaves out is put aside here, and is tested below.
    mine = build_tokenizer(vocabulary)
    mine.normalizer = None
    mine.model.ignore_merges = False
    mine.post_processor = None
    names = {"ggml.model": "tokenizer_type", "ggml.pre": "pre_tokenizer_type", "ggml.tokens": "tokens"}
    names |= {"ggml.merges": "merges", "ggml.token_type": "token_type"}
    known = {name: keys[f"tokenizer.{key}"] for key, name in names.items()}
    theirs, _ = convert_gguf_tokenizer("llama", known)
    for text in TEXTS:
        assert mine.encode(text).tokens == theirs.encode(text, add_special_tokens=False).tokens
        assert mine.decode(mine.encode(text).ids) == text


@pytest.mark.slow
def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = read(tmp_path / "x.gguf", SENTENCEPIECE).vocabulary
    tokens, scores = list(vocabulary.tokens), list(vocabulary.scores)
    places = {token: place for place, token in enumerate(tokens)}
    assert derived_merges(vocabulary) == generate_merges(places, dict(zip(tokens, scores, strict=True)))
    known = {"tokenizer_type": "llama", "tokens": tokens, "scores": scores, "token_type": list(vocabulary.types)}
    for architecture in ("llama", "phi3"):
        theirs, _ = convert_gguf_tokenizer(architecture, known)
        mine = build_tokenizer(read(tmp_path / "x.gguf", SENTENCEPIECE, architecture).vocabulary)
        for text in ("abc ab  cab", " abc", "é\n", "<|user|>abc"):
            assert mine.encode(text).ids[1:] == theirs.encode(text, add_special_tokens=False).ids
            assert mine.encode(text).ids[0] == 1
            assert mine.decode(mine.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def pieces(tmp_path: Path, keys: dict[str, Any], text: str, family: str = "llama") -> list[str]:
    vocabulary = read(tmp_path / "x.gguf", keys, family).vocabulary
    return [vocabulary.tokens[place] for place in build_tokenizer(vocabulary).encode(text).ids]


# As llama.cpp and the models' own tokenizer.json write them; several split one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES: dict[str, tuple[list[str], str]] = {
    "gpt-2": ([GPT2], ""),
    "phi-2": ([GPT2], ""),
    "smollm": ([r"\p{N}", GPT2], ""),
    "starcoder": ([r"\p{N}", GPT2], ""),
    "refact": ([r"\p{N}", GPT2], ""),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), ([LLAMA3], "words bos")),
    "dbrx": ([LLAMA3], ""),
    "smaug-bpe": ([LLAMA3], ""),
    "tekken": ([TEKKEN], "words bos"),
    "gpt-4o": ([GPT4O], ""),
    "qwen2": ([QWEN2], "composed"),
    "deepseek-r1-qwen": ([QWEN2], ""),
    "kormo": ([QWEN2], ""),
    "megrez": ([QWEN2], ""),
}
SPLIT = [
    *TEXTS,
    "I'm it'S WE'RE they've you'LL he'd 'tis rock'n'roll it'Sun L'Reine 'more",
    "camelCase HTTPServer ABCdef abcDEF iPhone's USA's ǅungla",
    "1 12 123 1234 12345678 a1b22c333 1,234.5 v2.0 ٣٤ ²",
    "a/b//c.d,\n\n\t x  \r\n  y   !?\n/ z ",
]


def isolated(pattern: str, texts: list[str]) -> list[str]:
    """Every text taken apart into what matches and what lies between."""
    found = []
    for text in texts:
        end = 0
        for match in regex.finditer(pattern, text):
            found += [text[end : match.start()], match[0]]
            end = match.end()
        found.append(text[end:])
    return [piece for piece in found if piece]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_rule_splits_by_its_written_pattern(tmp_path: Path, pre: str) -> None:
    patterns, flags = RULES[pre]
    tokenizer = build_tokenizer(read(tmp_path / "x.gguf", byte_level(pre)).vocabulary)
    for text in SPLIT:
        wanted = [text]
        for pattern in patterns:
            wanted = isolated(pattern, wanted)
        found = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert found == wanted
    assert (tokenizer.normalizer is not None) is ("composed" in flags)
    assert tokenizer.model.ignore_merges is ("words" in flags)
    assert (tokenizer.encode("b").tokens[0] == "<|im_start|>") is ("bos" in flags)


def test_what_a_rule_says_beside_its_pattern(tmp_path: Path) -> None:
    assert pieces(tmp_path, byte_level("smollm"), " 123") == ["Ġ", "1", "2", "3"]
    assert pieces(tmp_path, byte_level("gpt-2"), " 123") == ["Ġ", "123"]
    assert pieces(tmp_path, byte_level("qwen2"), "123") == ["1", "2", "3"]
    # Llama 3 and Tekken: a word that is a token is one, and a BOS comes first where the file does not say.
    for pre in ("llama-bpe", "tekken"):
        assert pieces(tmp_path, byte_level(pre), "World") == ["<|im_start|>", "World"]
        assert pieces(tmp_path, {**byte_level(pre), "tokenizer.ggml.add_bos_token": False}, "World") == ["World"]
    assert pieces(tmp_path, byte_level("dbrx"), "World") == list("World")
    # Qwen2's tokenizer composes what was typed as two characters.
    assert pieces(tmp_path, byte_level("qwen2"), "e\u0301") == ["Ã", "©"]
    assert pieces(tmp_path, byte_level("deepseek-r1-qwen"), "e\u0301") == ["e", "Ì", "ģ"]


def test_control_tokens_outside_the_byte_alphabet_stay_whole(tmp_path: Path) -> None:
    keys = byte_level("deepseek-r1-qwen")
    added = ["<｜User｜>", "<think>"]
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + added
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [3, 4]
    assert pieces(tmp_path, keys, "<｜User｜>1<think>") == ["<｜User｜>", "1", "<think>"]


def test_spaces_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    assert pieces(tmp_path, SENTENCEPIECE, "ab ab") == ["<s>", "▁ab", "▁ab"]
    plain = {**SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    assert pieces(tmp_path, plain, "ab ab") == ["ab", "▁ab"]
    ended = {**SENTENCEPIECE, "tokenizer.ggml.add_eos_token": True}
    assert pieces(tmp_path, ended, "ab") == ["<s>", "▁ab", "</s>"]
    # Phi-3's control tokens take the line end behind them, and text behind them has a space of its own.
    text = "<|user|>\nab<|end|>\n"
    assert pieces(tmp_path, SENTENCEPIECE, text, "phi3") == ["<s>", "<|user|>", "▁ab", "<|end|>"]


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    model = read(tmp_path / "x.gguf", SENTENCEPIECE, "phi3")
    end = (PIECES + WORDS).index("<|end|>")
    assert model.vocabulary.ends == (2, end) and model.generation["eos_token_id"] == [2, end]
    unnamed = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.token_type": None}
    with pytest.raises(Exception, match="names no token that ends a text"):
        read(tmp_path / "x.gguf", unnamed)


def test_merges_that_do_not_fit(tmp_path: Path) -> None:
    vocabulary = read(tmp_path / "x.gguf", {"tokenizer.ggml.merges": ["a zz"]}).vocabulary
    with pytest.raises(Exception, match=r"its tokenizer's merges do not fit its tokens \(.*zz"):
        build_tokenizer(vocabulary)


def test_the_files_are_read_by_tpctl(tmp_path: Path) -> None:
    model = read(tmp_path / "x.gguf", SENTENCEPIECE)
    write_tokenizer(model.vocabulary, 64, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.encode("ab") == [1, (PIECES + WORDS).index("▁ab")]
    assert tokenizer.special_ids >= {0, 1, 2, (PIECES + WORDS).index("<|user|>")}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64
