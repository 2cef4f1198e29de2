"""How a byte-level vocabulary splits text before it merges: ``tokenizer.ggml.pre``.

A GGUF holds a name alone; what it stands for is written in llama.cpp, and before that in the ``tokenizer.json`` of the
models themselves, which these rules follow. A name that is not here is refused: another rule gives other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = _ENDINGS + "|" + _LEAD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _ENDINGS + "|" + _LEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES


def _cased(ending: str, digits: str) -> str:
    """Words as runs of capitals and of small letters."""
    words = f"{_LEAD}[{_UPPER}]*[{_LOWER}]+{ending}|{_LEAD}[{_UPPER}]+[{_LOWER}]*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """A rule.

    Attributes:
        pattern: what to split by; without one, GPT-2's own.
        digits: each digit stands alone, whatever else holds.
        composed: text is brought into Unicode's composed form (NFC) first.
        whole_words: a word that is a token needs no merges.
        add_bos: a text begins with a BOS where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    composed: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3_BOS = PreTokenizer(_LLAMA3, whole_words=True, add_bos=True)

PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3_BOS,
    "llama-v3": _LLAMA3_BOS,
    "llama-bpe": _LLAMA3_BOS,
    "falcon3": _LLAMA3_BOS,
    "pixtral": _LLAMA3_BOS,
    "midm-2.0": _LLAMA3_BOS,
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "tekken": PreTokenizer(_cased("", r"\p{N}"), whole_words=True, add_bos=True),
    "gpt-4o": PreTokenizer(_cased(f"{_ENDINGS}?", r"\p{N}{1,3}")),
    "qwen2": PreTokenizer(_QWEN2, composed=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "kormo": PreTokenizer(_QWEN2),
    "megrez": PreTokenizer(_QWEN2),
}
