"""Tokenizers that multiply a text, and texts that are too long, are refused before either is tried."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tests.unit.made_tokenizers import NAMED, make
from tpctl.client.text_growth import check_steps, read_steps
from tpctl.client.token_bound import most_characters
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, RequestError

HUNDRED = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
MILLION = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1_000_000}
TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [],
    "special_tokens": {},
}


def several(name: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


def charsmap(longest: int) -> str:
    return base64.b64encode((8).to_bytes(4, "little") + bytes(8) + b"y" * longest + b"\0").decode()


def changed(folder: Path, **changes: Any) -> Path:
    make(folder, NAMED, template="{{ messages[0].content }}")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": several("normalizers", *[HUNDRED] * 4)}, "its normalizer can lengthen a text 100,000,000-fold"),
        ({"normalizer": MILLION}, "its normalizer can lengthen a text 1,000,001-fold, but at most 10000-fold is read"),
        (
            {"normalizer": several("normalizers", several("normalizers", HUNDRED, HUNDRED), HUNDRED)},
            "its normalizer can lengthen a text 1,000,000-fold",
        ),
        (
            {"normalizer": {**HUNDRED, "pattern": {"Regex": "b*"}, "content": "x" * 10_000}},
            "its normalizer can lengthen a text 10,001-fold",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "ab" * 50}}, "puts 100 bytes before a text, but at most 16"),
        ({"normalizer": several("normalizers", *[{"type": "ByteLevel"}] * 14)}, "lengthen a text 16,384-fold"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(20_000)}},
            "lengthen a text 20,000-fold",
        ),
        (
            {"pre_tokenizer": several("pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": True}] * 7)},
            "its pre_tokenizer can lengthen a text 16,384-fold",
        ),
        (
            {
                "normalizer": HUNDRED,
                "pre_tokenizer": several("pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": True}] * 4),
            },
            "its normalizer and its pre_tokenizer together can lengthen a text 25,600-fold",
        ),
        ({"post_processor": TWICE}, "its post_processor writes a text 2 times, but a prompt has it once"),
        (
            {
                "post_processor": {
                    **TWICE,
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
                    "special_tokens": {"x": {"id": "x", "ids": [1] * 2000, "tokens": ["a"] * 2000}},
                }
            },
            "its post_processor puts 2,000 tokens around a text, but at most 1,000 are read",
        ),
        ({"decoder": several("decoders", HUNDRED)}, "its decoder can lengthen a token's text 100-fold, but at most 64"),
        ({"normalizer": {"pattern": {"String": "a"}, "content": "b"}}, "cannot tell what it makes of a text"),
        (
            {
                "normalizer": {**HUNDRED, "content": "a" * 5000},
                "added_tokens": [
                    {"id": 256, "content": "a" * 4000, "single_word": False, "lstrip": False, "rstrip": False}
                    | {"normalized": True, "special": False}
                ],
            },
            "adds a token of 4,000 bytes, but at most 1,677 are read",
        ),
    ],
)
def test_steps_that_multiply_are_refused_at_load(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        Tokenizer(changed(tmp_path, **changes), shown="org/name")
    assert str(raised.value).startswith("org/name/tokenizer.json") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("hidden", ["behind", "escaped", "escaped behind a backslash", "beside", "first"])
def test_steps_are_found_wherever_they_stand(tmp_path: Path, hidden: str) -> None:
    steps = json.dumps(several("normalizers", *[HUNDRED] * 4))
    folder = changed(tmp_path)
    whole = json.loads((folder / "tokenizer.json").read_text())
    del whole["normalizer"]
    model = json.dumps(whole.pop("model"))
    head = json.dumps(whole)[1:-1]
    text = {
        "behind": f'{{{head}, "normalizer": null, "model": {model}, "normalizer" : {steps}}}',
        "escaped": f'{{{head}, "normalizer": null, "model": {model}, "n\\u006frmalizer": {steps}}}',
        "escaped behind a backslash": (
            f'{{{head}, "normalizer": null, "model": {model}, "x": "\\\\\\u0041", "normalizer": {steps}}}'
        ),
        "beside": f'{{"x": {{"a": 1, "model": 1}}, {head}, "normalizer": {steps}, "model": {model}}}',
        "first": f'{{"model": {model}, {head}, "normalizer": {steps}}}',
    }[hidden]
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="can lengthen a text 100,000,000-fold"):
        Tokenizer(folder)


def test_the_model_of_an_ordinary_file_is_not_read_twice() -> None:
    found = read_steps(b'{"version": "1.0", "normalizer": null, "model": {"vocab": {"decoder": 5, "\\\\u006": 6', "f")
    assert found == {"version": "1.0", "normalizer": None}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "growth"),
    [
        (None, pre_tokenizers.ByteLevel(add_prefix_space=False), 2),  # Llama 3
        (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False), 32),  # Qwen
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, 12),  # Llama 2
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), 3),  # Gemma
        (
            normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), "▁")]
            ),
            pre_tokenizers.Metaspace(),
            384,
        ),
    ],
)
def test_what_real_models_have_is_read(normalizer: Any, pre_tokenizer: Any, growth: float) -> None:
    backend = Backend(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert check_steps(read_steps(backend.to_str().encode(), "f"), "f") == growth


STEPS = [
    normalizers.NFKC(),
    normalizers.NFD(),
    normalizers.Lowercase(),
    normalizers.ByteLevel(),
    normalizers.Prepend("▁"),
    normalizers.Replace(" ", "▁"),
    normalizers.Replace("", "xy"),
    normalizers.Replace(Regex("b*"), "ﷺ"),
    normalizers.BertNormalizer(),
]
SPLITS = [
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    pre_tokenizers.Metaspace(),
    pre_tokenizers.Split(Regex("."), "isolated"),
    pre_tokenizers.Punctuation(),
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(STEPS), max_size=3),
    st.lists(st.sampled_from(SPLITS), max_size=4),
    st.text("ab ﷺİΐé.가", min_size=1, max_size=20),
)
def test_no_text_grows_by_more(steps: list[Any], splits: list[Any], text: str) -> None:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    try:
        growth = check_steps(json.loads(backend.to_str()), "f")
    except CheckpointError:
        return
    try:
        pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    except BaseException as error:
        assert type(error).__name__ == "PanicException"  # the library cannot replace what matches nothing and go on
        return
    # What stands before a text, or between its last character and its end, comes once more.
    assert sum(len(piece.encode()) for piece, _ in pieces) <= growth * (len(text.encode()) + 1)


def test_a_text_that_grows_much_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    tokenizer = Tokenizer(changed(tmp_path, normalizer={**HUNDRED, "content": "a" * 5000}))
    assert len(tokenizer.encode("ab" * 10)) == 50_010
    assert len(tokenizer.encode("b" * 10_000)) == 10_000
    with pytest.raises(RequestError, match=r"makes more than 1,056,576 bytes of a text of 2,000; shorten"):
        tokenizer.encode("a" * 2000)


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(tmp_path: Path, chat: bool) -> None:
    tokenizer = Tokenizer(changed(tmp_path))
    assert tokenizer._most_characters == len("<|im_start|>")

    def encode(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return tokenizer.encode_chat(messages, most=99) if chat else tokenizer.encode(text, most=99)

    assert len(encode("a" * 1000)) == 1000  # the caller's to refuse, who knows how many there are
    with pytest.raises(RequestError, match="has 120,000 characters and so at least 10,000 tokens, but at most 99"):
        encode("a" * 120_000)


def test_an_added_token_that_grows_much_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, normalizer={**HUNDRED, "content": "a" * 5000})
    (folder / "added_tokens.json").write_text(json.dumps({"a" * 2000: 260}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json adds a token of 2,000 bytes, but at most 1,677 are"):
        Tokenizer(folder)


LOSSLESS = [
    (normalizers.NFC(), pre_tokenizers.ByteLevel(), {}, 4 * 12),
    (None, pre_tokenizers.ByteLevel(), {}, 12),
    (normalizers.Replace(" ", "▁"), None, {"unk_token": "a"}, 12),
    (normalizers.Prepend("▁▁"), None, {"unk_token": "a"}, 14),
    (normalizers.Replace("  ", "▁"), pre_tokenizers.ByteLevel(), {}, None),
    (normalizers.Strip(), pre_tokenizers.ByteLevel(), {}, None),
    (normalizers.Replace(Regex(" "), "▁"), pre_tokenizers.ByteLevel(), {}, None),
    (None, pre_tokenizers.Whitespace(), {"unk_token": "a"}, None),
    (None, pre_tokenizers.Split(" ", "removed"), {"unk_token": "a"}, None),
    (None, pre_tokenizers.Split(" ", "isolated"), {"unk_token": "a"}, 12),
    (None, None, {}, None),
    (None, None, {"unk_token": "a", "fuse_unk": True}, None),
    (None, None, {"byte_fallback": True}, None),
]


@pytest.mark.parametrize(("normalizer", "pre_tokenizer", "options", "most"), LOSSLESS)
def test_characters_of_a_token(normalizer: Any, pre_tokenizer: Any, options: dict[str, Any], most: int | None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: id for id, token in enumerate(alphabet)}, [], **options))
    backend.add_special_tokens(["<|im_start|>"])
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    assert most_characters(backend) == most
    text = "e\u0301  a" * 50
    assert most is None or len(backend.encode(text).ids) >= len(text) / most
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    assert most_characters(backend) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": {**TWICE, "single": [{}]}},
        {"normalizer": {**HUNDRED, "pattern": {}}},
    ],
)
def test_steps_that_hold_nothing_are_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as raised:
        Tokenizer(changed(tmp_path, **changes), shown="org/name")
    assert "\n" not in str(raised.value)
