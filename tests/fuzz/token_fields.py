"""Entries of the files about tokens, as in ``fields``."""

from __future__ import annotations

from typing import Any

from tests.fuzz.fields import Fields

_PATTERNS: list[Any] = [
    {"Regex": "(a+)+$"},
    {"Regex": "(a|a)*b$"},
    {"Regex": "(?:a*a*a*a*a*)*c"},
    {"Regex": "("},
    {"Regex": ""},
    {"Regex": "\\p{Nope}"},
    {"Regex": "(?<=a*)b"},
    {"String": ""},
    {"String": " "},
    {"Regex": "a{1000000000}"},
]
_SPLITS = [
    {"type": "Split", "pattern": pattern, "behavior": behaviour, "invert": False}
    for pattern in _PATTERNS
    for behaviour in ("Isolated", "Removed")
]
_REPLACES = [
    {"type": "Replace", "pattern": pattern, "content": content}
    for pattern in _PATTERNS
    for content in ("", "x", "a" * 1000)
]
_A_HUNDRED = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


def _token(id: Any, content: Any, **more: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags, **more}


TOKENIZER: Fields = {
    "pre_tokenizer": [
        None,
        *_SPLITS,
        {"type": "ByteLevel"},
        {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "ab"},
        {"type": "Punctuation", "behavior": "x"},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}] * 40},
        {"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "replacement": "▁"}, _SPLITS[0]] * 20},
    ],
    "normalizer": [
        None,
        *_REPLACES,
        {"type": "NFKC"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": None},
        {"type": "Prepend", "prepend": "a" * 100_000},
        {"type": "Lowercase"},
        {"type": "Sequence", "normalizers": [_A_HUNDRED] * 4},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [_A_HUNDRED] * 2}] * 2},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1_000_000},
        {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "x" * 9000},
        {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}] * 5},
        {"type": "Nothing"},
    ],
    "post_processor": [
        None,
        {"type": "ByteLevel", "trim_offsets": True},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {
            "type": "Sequence",
            "processors": [
                {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
                    "pair": [],
                    "special_tokens": {},
                }
            ]
            * 30,
        },
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
    ],
    "decoder": [
        None,
        {"type": "ByteLevel"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC"},
        {"type": "Strip", "content": "ab", "start": 10**9, "stop": 10**9},
        {"type": "Strip", "content": " ", "start": 2**64, "stop": 0},
        {"type": "Sequence", "decoders": []},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Sequence", "decoders": [_A_HUNDRED] * 5},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1_000_000},
    ],
    "added_tokens": [
        [],
        None,
        [_token(0, "<unk>")],
        [_token(263, "<end>")],
        [_token(10**9, "<far>")],
        [_token(2**32, "<far>")],
        [_token(-1, "<x>")],
        [_token(0, "")],
        [_token(1, "a"), _token(1, "b")],
        [_token(256, " ", lstrip=True)],
        [_token(5, "a" * 100_000)],
        [{"id": 0}],
    ],
    "truncation": [
        {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Left", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
    ],
    "padding": [
        {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }
    ],
    "version": ["1.0", "2.0", 1],
    "model": [
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": 10**9}, "merges": []},
        {"type": "BPE", "vocab": {"a": 2**32 - 1, "b": 1}, "merges": ["a b c"]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<no>"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.9},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 2.0},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 0,
        },
        {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0, "byte_fallback": False},
        {"type": "Unigram", "vocab": [], "unk_id": None},
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5},
        {"type": "Nothing"},
    ],
}
TOKENIZER_CONFIG: Fields = {
    "bos_token": [
        None,
        "<s>",
        "",
        "a",
        "<new>",
        {"content": "<s>"},
        {"content": None},
        {},
        ["<s>"],
        1,
        "a" * 100_000,
        "\x1b[31m",
    ],
    "eos_token": [None, "</s>", "", "<new>", {"content": "</s>", "special": False}],
    "unk_token": [None, "<unk>", "<none>"],
    "pad_token": [None, "<pad>", "<s>"],
    "x_token": ["<x>"],
    "add_bos_token": [True, False, None],
    "add_eos_token": [True, False],
    "add_prefix_space": [True, False],
    "added_tokens_decoder": [
        None,
        {},
        [],
        {"263": {"content": "<end>"}},
        {"x": {"content": "a"}},
        {"-1": {"content": "a"}},
        {"300": {"content": "<gap>"}},
        {"1": {"content": "a"}},
        {"1": None},
        {"1": "a"},
        {"263": {"content": ""}},
        {"9" * 5000: {"content": "a"}},
    ],
    "additional_special_tokens": [None, [], ["<x>"], ["<s>"], [""], [None], "<x>", {"a": "<x>"}],
    "extra_special_tokens": [None, {}, {"image_token": "<image>"}, ["<x>"]],
    "chat_template": [None, "", "{{ messages[0].content }}", [], [{"name": "default", "template": "x"}], {"a": 1}, 5],
    "model_max_length": [0, 1, 1e30, -1, None],
    "clean_up_tokenization_spaces": [True],
    "tokenizer_class": ["LlamaTokenizer", "PreTrainedTokenizerFast", "Nope", None, 5],
    "legacy": [True, False],
    "split_special_tokens": [True],
    "padding_side": ["left", "x"],
}
SPECIAL_TOKENS: Fields = {
    name: TOKENIZER_CONFIG[name]
    for name in TOKENIZER_CONFIG
    if name.endswith("_tokens") or name in ("bos_token", "eos_token", "unk_token", "pad_token", "x_token")
}
ADDED_TOKENS: Fields = {
    "<tool>": [263, 0, -1, 10**9, 2**32, None, "263", 263.0],
    "<more>": [264, 263, 300],
    "": [263],
    "a": [5],
}
