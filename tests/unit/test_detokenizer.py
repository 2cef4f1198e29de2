"""Pieces of text join to exactly what decoding everything at once gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tpctl.client.detokenizer import context_of, detokenizer, is_byte_token
from tpctl.client.openai_answers import chat_logprobs
from tpctl.client.text_stream import StopStrings, TextStream
from tpctl.client.token_text import logprob_rows, token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Output
from tpctl.wire.report import TokenLogprob


def decode_in_pieces(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> list[str]:
    """All pieces of a finished answer to ``prompt``, one a token and one for the end; joined they are its text."""
    stream = detokenizer(tokenizer, prompt)
    return [*(stream.push(id) for id in ids), stream.finish()]


SPECIAL = AddedToken("<|end|>", special=True, normalized=False)
PLAIN_ADDED = AddedToken("<think it over>", normalized=False)


def byte_level() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("h", "e"), ("Ã", "©"), ("l", "l")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> Backend:
    """As in Llama 2: ▁ before words, bytes for what is not in the vocabulary, first space stripped."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeé", "▁a", "▁be", "ab", "▁▁"]
    merges = [("▁", "a"), ("▁b", "e"), ("a", "b"), ("▁", "▁")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    vocabulary["▁b"] = len(vocabulary)
    merges.insert(0, ("▁", "b"))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def metaspace() -> Backend:
    tokens = ["<unk>", "▁", "▁hello", "▁wor", "ld", "!", "é", "\N{REPLACEMENT CHARACTER}"]
    backend = Backend(models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


MAKERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "metaspace": metaspace}


@cache
def tokenizer(kind: str) -> Tokenizer:
    backend = MAKERS[kind]()
    backend.add_special_tokens([SPECIAL])
    backend.add_tokens([PLAIN_ADDED])
    with TemporaryDirectory() as name:
        backend.save(str(Path(name) / "tokenizer.json"))
        return Tokenizer(Path(name))


KINDS = pytest.mark.parametrize("kind", list(MAKERS))


@KINDS
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example(text="héllo wörld 👩‍👩‍👧 中文 a  be")
@example(text="\N{REPLACEMENT CHARACTER}a")
def test_any_text(kind: str, text: str) -> None:
    model = tokenizer(kind)
    ids = model.encode(text)
    assert "".join(decode_in_pieces(model, ids)) == model.decode(ids)


@KINDS
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_ids(kind: str, data: st.DataObject) -> None:
    model = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, model.backend.get_vocab_size() - 1), max_size=60))
    assert "".join(decode_in_pieces(model, ids)) == model.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_comes_whole(kind: str) -> None:
    model = tokenizer(kind)
    ids = model.encode("a👍a")
    pieces = decode_in_pieces(model, ids)
    assert len(ids) >= 6
    assert [piece for piece in pieces if "👍" in piece]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 2  # shown on the way, not all at the end


def test_spaces_between_sentencepiece_words_and_none_before_the_first() -> None:
    model = tokenizer("metaspace")
    hello, world = model.backend.token_to_id("▁hello"), model.backend.token_to_id("▁wor")
    end = model.backend.token_to_id("<|end|>")
    assert decode_in_pieces(model, [end, hello, end, world]) == ["", "hello", "", " wor", ""]


def test_an_id_outside_the_vocabulary_is_no_text() -> None:
    for kind in MAKERS:
        assert decode_in_pieces(tokenizer(kind), [10**6]) == ["", ""]


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", max_size=7), max_size=3),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    shown = ""
    consumed = ""
    for piece in pieces:
        shown += finder.push(piece)
        consumed += piece
        if finder.found:
            break
    shown += finder.finish()
    starts = [start for stop in stops if stop and (start := consumed.find(stop)) >= 0]
    assert finder.found == bool(starts)
    assert shown == (consumed[: min(starts)] if starts else consumed)


class Looked(str):
    """A text that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> str:
        Looked.looks += 1
        return super().__getitem__(at)


def test_a_token_s_text_costs_the_same_however_much_of_a_stop_string_has_come() -> None:
    """Of one that nearly comes again and again, too: others' tokens wait meanwhile."""
    finder, size = StopStrings([Looked("a" * 500 + "b"), Looked("b" + "a" * 500)]), 1000
    Looked.looks = 0
    assert "".join(finder.push("a") for _ in range(size)) + finder.push("c") == "a" * size + "c"
    assert Looked.looks <= 8 * size, Looked.looks


def shown_by(stream: TextStream, output: Output) -> str:
    segments = stream.push(output)
    assert not any(segment.reasoning for segment in segments)
    return "".join(segment.text for segment in segments)


def test_text_stream_stops_at_a_stop_string_over_two_tokens() -> None:
    model = tokenizer("byte-level")
    stream = TextStream(model, ["wor"])
    shown = ""
    for id in model.encode("hello world"):
        shown += shown_by(stream, Output("a", [id]))
    assert (shown, stream.text, stream.finish_reason, stream.stopped_early) == (
        "hello ",
        "hello ",
        "stop",
        True,
    )
    assert model.decode(stream.token_ids) == "hello wor"


def test_text_stream_leaves_out_the_token_that_ended_it_and_shows_what_was_held() -> None:
    model = tokenizer("byte-level")
    (full_stop,) = model.encode("x")
    stream = TextStream(model, ["llama"])
    assert shown_by(stream, Output("a", model.encode("he"))) == "he"
    assert shown_by(stream, Output("a", model.encode("ll"))) == ""
    assert shown_by(stream, Output("a", [full_stop], "stop")) == "ll"
    assert (stream.text, stream.finish_reason, stream.stopped_early) == ("hell", "stop", False)
    assert len(stream.token_ids) == 3


def test_text_stream_shows_the_broken_rest_at_the_end() -> None:
    model = tokenizer("byte-level")
    ids = model.encode("é👍")[:-1]
    stream = TextStream(model)
    assert shown_by(stream, Output("a", ids, "length")) == "é\N{REPLACEMENT CHARACTER}"
    assert stream.finish_reason == "length"


def behind(model: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    """The right text of an answer: that of everything, less that of the prompt."""
    before = model.decode(prompt)
    whole = model.decode([*prompt, *answer])
    assert whole.startswith(before)
    return whole[len(before) :]


@KINDS
@settings(max_examples=200, deadline=None)
@given(text=st.text("abe é中!\n", max_size=30), share=st.floats(0, 1))
@example(text="ab be", share=0.5)
@example(text="中文 é", share=0.4)
def test_an_answer_is_decoded_behind_its_prompt(kind: str, text: str, share: float) -> None:
    model = tokenizer(kind)
    ids = [model.backend.token_to_id("<|end|>"), *model.encode(text)]
    cut = 1 + round(share * (len(ids) - 1))
    while cut < len(ids) and model.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}"):
        cut += 1  # a prompt is made of whole characters
    prompt, answer = ids[:cut], ids[cut:]
    wanted = behind(model, prompt, answer)
    assert "".join(decode_in_pieces(model, answer, prompt)) == wanted
    texts = token_texts(model, prompt)
    assert "".join(texts.push(id) for id in answer) == wanted
    stream = TextStream(model, [], prompt)
    stream.push(Output("a", answer, "length"))
    assert stream.text == wanted


@KINDS
def test_the_first_space_of_an_answer_is_kept(kind: str) -> None:
    model = tokenizer(kind)
    token = {"byte-level": "Ġw", "byte-fallback": "▁be", "metaspace": "▁hello"}[kind]
    word, text = model.backend.token_to_id(token), " " + token[1:]
    prompt = [model.backend.token_to_id("<|end|>"), *model.encode("a"), model.backend.token_to_id("<|end|>")]
    stream = TextStream(model, [text], prompt)
    stream.push(Output("a", [word]))
    assert (stream.text, stream.finish_reason) == ("", "stop")
    texts = token_texts(model, prompt)
    assert (texts.peek(word), texts.push(word), texts.push(word)) == (text, text, text)
    assert texts.peek(prompt[0]) == "<|end|>"
    if kind != "byte-level":  # where nothing stands before a word it has none
        assert "".join(decode_in_pieces(model, [word], prompt[:1])) == text[1:]
        assert token_texts(model, prompt[:1]).push(word) == text[1:]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_is_the_text_of_its_last_token(kind: str) -> None:
    model = tokenizer(kind)
    prompt, answer = model.encode("a"), model.encode("a中")[-3:]
    texts = token_texts(model, prompt)
    assert [texts.push(id) for id in answer] == ["", "", "中"]
    assert texts.peek(answer[0]) == ""
    assert texts.peek(model.backend.token_to_id("b")) == "b"


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_parts_of_characters_have_their_own_bytes(kind: str) -> None:
    model = tokenizer(kind)
    prompt, answer = model.encode("a"), model.encode("ab中é")[1:]
    other, end = answer[-1], model.backend.token_to_id("<|end|>")
    at = TokenLogprob(-0.5, ((other, -1.0), (end, -2.0)))
    answer.append(end)
    rows = logprob_rows(token_texts(model, prompt), answer, [at] * len(answer))
    told = chat_logprobs(rows)["content"]
    assert b"".join(bytes(one["bytes"]) for one in told[:-1]) == "b中é".encode()
    assert all(len(one["bytes"]) >= 1 for one in told) and told[-1]["bytes"] == list(b"<|end|>")
    # Where it breaks off a character, too.
    assert {tuple(one["top_logprobs"][0]["bytes"]) for one in told} == {tuple("é".encode())}
    assert "".join(one["token"] for one in told[:-1]) == "b中é"
    assert "bytes" not in rows[0] and "bytes" in rows[1]


def test_broken_bytes_do_not_spoil_the_prompt_before_them() -> None:
    model = tokenizer("byte-fallback")
    prompt, broken = model.encode("中"), model.backend.token_to_id("<0xFF>")
    assert "".join(decode_in_pieces(model, [broken], prompt)) == "\N{REPLACEMENT CHARACTER}"


@KINDS
def test_the_context_has_a_text_and_begins_with_no_byte(kind: str) -> None:
    model = tokenizer(kind)
    for text in ("", "a", "ab be a ab be", "中" * 40, "a" + "中" * 40):
        ids = model.encode(text)
        context = context_of(model, [*ids, model.backend.token_to_id("<|end|>")])
        assert context == ids[len(ids) - len(context) :]
        assert bool(model.decode(context)) == bool(text)
        assert not (
            kind == "byte-fallback" and context and len(context) < len(ids) and is_byte_token(model, context[0])
        )
