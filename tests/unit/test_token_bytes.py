"""The bytes of tokens are those of the text that they make, whatever the tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tests.unit.fake_client import write_tokenizer
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.client.detokenizer import detokenizer
from tpctl.client.token_bytes import TokenBytes
from tpctl.client.tokenizer import Tokenizer

WORDS = [
    "hello",
    "world",
    "a",
    "b",
    "{",
    "}",
    '"',
    ":",
    ",",
    "name",
    "▁name",
    "▁hello",
    "▁",
    "▁▁",
    "é",
    "日",
    "▁{",
    "\n",
]


def save(backend: Backend, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer(folder)


def sentencepiece(folder: Path, *, prefix: bool) -> Tokenizer:
    """As Gemma's (every space is marked, none is added) or, with a ``prefix``, as Llama 2's."""
    letters = sorted({char for word in WORDS for char in word} | set("helowrdnam"))
    tokens = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {token: id for id, token in enumerate(dict.fromkeys([*tokens, *WORDS]))}
    merges = [("▁", "▁"), ("▁", "{")]
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_special_tokens(["<unk>", "<eos>", "<start_of_turn>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("\n\n", normalized=False)])
    return save(backend, folder)


def metaspace(folder: Path) -> Tokenizer:
    vocab = {token: id for id, token in enumerate(["<unk>", "<eos>", *WORDS])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<eos>"])
    return save(backend, folder)


@pytest.fixture(params=["bytes", "gemma", "llama2", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tokenizer]:
    if request.param == "bytes":
        yield Tokenizer(write_tokenizer(tmp_path, special=["<|im_end|>"], added=["<tool_call>", "ß€"]))
    elif request.param == "metaspace":
        yield metaspace(tmp_path)
    else:
        yield sentencepiece(tmp_path, prefix=request.param == "llama2")


def check(tokenizer: Tokenizer, size: int, prompt: list[int]) -> None:
    """Tokens in any order make the text that their bytes are, where those are UTF-8."""
    found = TokenBytes(tokenizer, size)
    assert len(found.tokens) == size and found.special == tokenizer.special_ids
    usable = [id for id, data in enumerate(found.tokens) if data and id not in found.special]
    assert len(usable) > 0.9 * (tokenizer.backend.get_vocab_size() - len(found.special))
    picker, checked = random.Random(0), 0
    for number in range(3000):
        ids = picker.choices(usable, k=1 + number % 5)
        data = b"".join(found.tokens[id] for id in ids)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        shown = detokenizer(tokenizer, prompt)
        assert "".join(map(shown.push, ids)) + shown.finish() == text, ids
        assert b"".join(found.tokens[id] for id in found.encode(data)) == data
        checked += 1
    assert checked > 100


def test_bytes_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    known = tokenizer.backend.get_vocab_size()
    prompt = tokenizer.encode("hello")
    check(tokenizer, known, prompt)
    found = TokenBytes(tokenizer, known + 70)  # a model has more rows than its tokenizer has tokens
    assert found.tokens[known:] == [b""] * 70


def test_bytes_of_the_demo_model(demo: ResolvedSource) -> None:
    tokenizer = Tokenizer(demo.folder)
    check(tokenizer, tokenizer.backend.get_vocab_size(), tokenizer.encode("Hello"))
    text = 'A {"name": "Jürgen"}\n\n  日本 😀'
    assert TokenBytes(tokenizer, 49152).encode(text.encode()) == tokenizer.encode(text)


@pytest.mark.parametrize("prefix", [False, True])
def test_text_is_tokenized_as_the_tokenizer_would_where_it_stands(tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece(tmp_path, prefix=prefix)
    found = TokenBytes(tokenizer, tokenizer.backend.get_vocab_size())
    names = [tokenizer.backend.id_to_token(id) for id in found.encode(b"{ {\xc3\xbc")]
    assert names == ["{", "▁{", "<0xC3>", "<0xBC>"]
    assert [tokenizer.backend.id_to_token(id) for id in found.encode(b"\xc3")] == ["<0xC3>"]
