"""Tokens that stand in other files than tokenizer.json: the same ids and texts as transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tests.unit.made_tokenizers import make
from tpctl.client.added_tokens import CONFIG, SPECIAL_MAP
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError

FIRST = 260  # the first id behind those of ``make``
BOS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TEXT = "a <tool> b<x>c <y> <pad><s>d <end>"

FILES: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"added_tokens.json": {"<tool>": 260, "<x>": 261}},
    "added_tokens.json, one of them special": {
        "tokenizer_config.json": {**BOS, "pad_token": "<x>"},
        "added_tokens.json": {"<tool>": 260, "<x>": 261},
    },
    "added_tokens.json, out of order": {"added_tokens.json": {"<x>": 261, "<tool>": 260, "</s>": 257}},
    "special_tokens_map.json": {"special_tokens_map.json": {**BOS, "pad_token": "<pad>"}},
    "special_tokens_map.json over the config": {
        "tokenizer_config.json": {**BOS, "pad_token": "<x>"},
        "special_tokens_map.json": {"pad_token": {**TOOL, "content": "<pad>", "lstrip": True}},
    },
    "additional_special_tokens of the map": {
        "special_tokens_map.json": {**BOS, "additional_special_tokens": ["<tool>", "<x>"]}
    },
    "additional_special_tokens of the config": {
        "tokenizer_config.json": {**BOS, "additional_special_tokens": ["<x>", "<tool>"]}
    },
    "extra_special_tokens": {"tokenizer_config.json": {**BOS, "extra_special_tokens": ["<x>", "<s>", "<tool>"]}},
    "extra_special_tokens by name": {
        "tokenizer_config.json": {**BOS, "extra_special_tokens": {"tool_token": "<tool>", "y_token": "<y>"}}
    },
    "extra_special_tokens in both": {
        "tokenizer_config.json": {**BOS, "extra_special_tokens": ["<x>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<tool>", "<x>"]},
    },
    "a token of its own name": {"tokenizer_config.json": {**BOS, "image_token": "<tool>"}},
    "all": {
        "tokenizer_config.json": {**BOS, "extra_special_tokens": ["<y>"]},
        "added_tokens.json": {"<tool>": 260, "<x>": 261, "<y>": 262},
        "special_tokens_map.json": {"pad_token": "<pad>"},
    },
    "a list, beside which the others do not count": {
        "tokenizer_config.json": {**BOS, "added_tokens_decoder": {"260": {**TOOL, "special": True}}},
        "added_tokens.json": {"<x>": 260},
        "special_tokens_map.json": {"pad_token": "<pad>"},
    },
    "a list with other flags than tokenizer.json": {
        "tokenizer_config.json": {
            **BOS,
            "added_tokens_decoder": {
                "259": {**TOOL, "content": "<|im_end|>", "lstrip": True, "rstrip": True, "special": False},
                "260": {**TOOL, "lstrip": True, "rstrip": True, "special": False},
            },
        }
    },
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    make(folder, files.get("tokenizer_config.json", BOS), adds_bos=True)
    for name, value in files.items():
        if name != "tokenizer_config.json":
            (folder / name).write_text(json.dumps(value))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()  # of which transformers has a say of its own
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("what", FILES)
def test_they_are_what_transformers_makes_of_them(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path, FILES[what])
    reference, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in (TEXT, "<tool>", " <|im_end|> x <x> "):
        ids = reference.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)
    named = {name: text for name, text in reference.special_tokens_map.items() if isinstance(text, str)}
    assert ours.special_tokens == named
    assert any(id >= FIRST for id in ours.encode(TEXT)) or what.startswith("special_tokens_map")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"<tool>": 300}}, r'mine/added_tokens\.json gives "<tool>" the id 300, .* get 260'),
        ({"added_tokens.json": {"<tool>": "a"}}, r"mine/added_tokens\.json lists tokens that cannot be added"),
        ({"added_tokens.json": [1]}, r"mine/added_tokens\.json holds a list, but a JSON object is needed"),
        ({"special_tokens_map.json": 5}, r"mine/special_tokens_map\.json holds a number, but a JSON object is needed"),
        (
            {"tokenizer_config.json": {"bos_token": 5}},
            r"mine/tokenizer_config\.json: bos_token is 5, but must be a text",
        ),
        (
            {"tokenizer_config.json": {"eos_token": {"content": 5}}},
            r'mine/tokenizer_config\.json: eos_token is {"content": 5}, but must be a text, or an object whose "con',
        ),
        ({"special_tokens_map.json": {"pad_token": [1]}}, r"mine/special_tokens_map\.json: pad_token is \[1\], but"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}},
            r'mine/tokenizer_config\.json: added_tokens_decoder has "x" in an id\'s place',
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": {}}}},
            "has {} for the id 7, but needs an object",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
            r"added_tokens_decoder is \[1\], but must be an object",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "a", "special": "x"}}}},
            'says special "x" of the id 7, but it must be true or false',
        ),
        ({"tokenizer_config.json": {"extra_special_tokens": [5]}}, "a token of extra_special_tokens is 5, but must be"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template is 5, but must be a text"),
        ({"tokenizer_config.json": {"extra_special_tokens": 5}}, "extra_special_tokens is 5, but must be a list"),
        ({"tokenizer_config.json": {"split_special_tokens": "yes"}}, 'split_special_tokens is "yes", but must be true'),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"261": TOOL}}},
            r'mine/tokenizer_config\.json gives "<tool>" the id 261, .* get 260',
        ),
    ],
)
def test_what_cannot_be_added_is_one_line(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(folder, shown="mine")


@pytest.mark.parametrize(("file", "split"), [(CONFIG, False), (CONFIG, True), (SPECIAL_MAP, True)])
def test_special_tokens_are_split_where_a_file_says_so(tmp_path: Path, file: str, split: bool) -> None:
    added = {"bos_token": "<s>", "extra_special_tokens": ["<tool>"]}
    folder = write(tmp_path, {CONFIG: added, file: {**added, "split_special_tokens": split}})
    reference, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert ours.encode("a <tool> b</s>") == reference.encode("a <tool> b</s>")
    assert (FIRST in ours.encode("a <tool> b")) is not split
    rendered = reference.encode("<s>a<|im_end|>", add_special_tokens=False)
    assert ours.encode_rendered("<s>a<|im_end|>") == rendered and (len(rendered) > 3) is split


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    folder = make(tmp_path, BOS)
    (folder / "special_tokens_map.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json is nested more than 64 levels deep"):
        Tokenizer(folder)
