"""What was thought told from what is answered, by the marks of each family, whole and in pieces of any size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.unit.fake_client import write_tokenizer
from tests.unit.test_detokenizer import byte_fallback
from tests.unit.thinking import MODELS
from tpctl.client.reasoning import Harmony, Tags
from tpctl.client.text_stream import TextStream
from tpctl.client.token_text import token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Output
from tpctl.wire.report import TokenLogprob

USER = {"role": "user", "content": "What does <think> mean?"}
FINAL = "<|start|>assistant<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
COMMAND = "<|START_THINKING|>hm<|END_THINKING|>"


@cache
def model(name: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return MODELS[name].tokenizer(Path(folder))


def told(
    tokenizer: Tokenizer,
    answer: str,
    sizes: Sequence[int] = (),
    *,
    stop: Sequence[str] = (),
    prompt: Sequence[int] | None = None,
    reason: str = "length",
) -> TextStream:
    """The stream of an answer that came in outputs of so many tokens each; of one each beyond."""
    prompt = tokenizer.encode_chat([USER]) if prompt is None else prompt
    stream = TextStream(tokenizer, stop, prompt, form=tokenizer.reasoning)
    ids, shown, at = tokenizer.encode_rendered(answer), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        new = ids[at : at + size]
        at += len(new)
        ends = at == len(ids)
        logprobs = [TokenLogprob(-1.0, []) for _ in new]
        shown += stream.push(Output("a", new, reason if ends else None, logprobs=logprobs))
        if ends or stream.finish_reason is not None:
            break
    assert "".join(piece.text for piece in shown if piece.reasoning) == (stream.reasoning or "")
    assert "".join(piece.text for piece in shown if not piece.reasoning) == stream.text
    assert all(piece.text for piece in shown)
    assert len(stream.logprobs) == len(stream.token_ids) == at
    return stream


def split(name: str, answer: str, sizes: Sequence[int] = ()) -> tuple[str | None, str]:
    stream = told(model(name), answer, sizes)
    return stream.reasoning, stream.text


def test_the_form_is_read_from_template_and_tokens() -> None:
    forms = {name: model(name).reasoning for name in MODELS}
    token = model("qwen3").backend.token_to_id
    think = Tags("<think>", "</think>", ids=(token("<think>"), token("</think>")))
    assert forms["qwen3"] == forms["opens"] == think
    assert forms["qwen3 by text"] == forms["opens by text"] == Tags("<think>", "</think>")
    for name in ("glm4_moe", "minimax_m2"):
        assert isinstance(found := forms[name], Tags)
        assert (found.open, found.ids is not None) == ("<think>", True)
    assert isinstance(mistral := forms["mistral"], Tags)
    assert (mistral.open, mistral.close, mistral.ids is not None) == ("[THINK]", "[/THINK]", True)
    token = model("gpt_oss").backend.token_to_id
    marks = [token(f"<|{mark}|>") for mark in ("start", "channel", "message", "end")]
    assert forms["gpt_oss"] == Harmony(*marks)
    assert (
        forms["no thoughts"] is None
    )  # a vocabulary with the tags is not enough: the family's instruct models have it


def test_a_base_model_has_no_form(tmp_path: Path) -> None:
    assert Tokenizer(write_tokenizer(tmp_path, template=None, added=["<think>", "</think>"])).reasoning is None


CASES = [
    ("qwen3", "<think>\nhm, né\n\nso\n</think>\n\nIt is\n\n 4.\n", "hm, né\n\nso", "It is\n\n 4.\n"),
    ("qwen3", "<think>\n\n</think>\n\nYes", "", "Yes"),
    ("qwen3", "\n<think>a</think>b", "a", "b"),
    ("qwen3", "\n\nYes", "", "\n\nYes"),
    ("qwen3", "The tag <think> opens and </think> closes.", "", "The tag <think> opens and </think> closes."),
    ("qwen3", "<think>a<think>b</think>c</think>d <think>e", "a<think>b", "c</think>d <think>e"),
    ("qwen3", "<think>\nlong thou\n", "long thou", ""),
    ("qwen3", "<think>", "", ""),
    ("qwen3", " \n", "", " \n"),
    ("opens", "hm\n</think>\n\nYes", "hm", "Yes"),
    ("opens", "\n\nhm", "hm", ""),
    ("glm4_moe", "\n<think>hm</think>\nYes", "hm", "Yes"),
    ("minimax_m2", "hm\n</think>\n\nYes", "hm", "Yes"),
    ("mistral", "[THINK]hm[/THINK]Yes", "hm", "Yes"),
    ("mistral", "Yes", "", "Yes"),
    ("gemma4", "<|channel>thought\nhm\n<channel|>Yes", "hm", "Yes"),
    ("gemma4", "<|channel>thought\n<channel|>Yes", "", "Yes"),
    ("gemma4", "<|channel>though", "though", ""),  # cut: it may have become another word
    ("gemma4", "<|channel>thoughts are free<channel|>Yes", "thoughts are free", "Yes"),
    ("command", f"{COMMAND}<|START_RESPONSE|>Yes<|END_RESPONSE|>", "hm", "Yes"),
    ("command", "\n<|START_RESPONSE|>\nYes<|END_RESPONSE|>", "", "Yes"),
    ("command", "<|START_THINKING|>hm<|START_RESPONSE|>Yes", "hm", "Yes"),
    ("command", f"{COMMAND}\nYes", "hm", "Yes"),
    ("gpt_oss", f"{ANALYSIS}hm\n\nso<|end|>{FINAL}Yes", "hm\n\nso", "Yes"),
    ("gpt_oss", f"{ANALYSIS}a<|end|><|start|>assistant{ANALYSIS}b<|end|>{FINAL}c<|end|>{FINAL}d", "a\n\nb", "c\n\nd"),
    ("gpt_oss", f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>{FINAL}c", "a", "b\n\nc"),
    (
        "gpt_oss",
        ANALYSIS + "a<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}",
        "a",
        "commentary to=functions.f json\n{}",
    ),
    ("gpt_oss", " to=functions.f<|channel|>analysis<|message|>{}", "", "to=functions.f analysis\n{}"),
    ("gpt_oss", "<|channel|>final<|message|>Yes", "", "Yes"),
    ("gpt_oss", f"{ANALYSIS}cut he", "cut he", ""),
    ("gpt_oss", "<|channel|>anal", "", ""),
    ("gpt_oss", "no marks at all", "", "no marks at all"),
    ("gpt_oss", "<|message|>Yes", "", "Yes"),
    ("no thoughts", "<think>\nhm\n</think>\n\nYes", None, "<think>\nhm\n</think>\n\nYes"),
]
BY_TEXT = [(f"{name} by text", *rest) for name, *rest in CASES if name in ("qwen3", "opens")]


@pytest.mark.parametrize(("name", "answer", "reasoning", "text"), [*CASES, *BY_TEXT])
def test_an_answer_is_told_apart(name: str, answer: str, reasoning: str | None, text: str) -> None:
    assert split(name, answer) == (reasoning, text)
    assert split(name, answer, [10**6]) == (reasoning, text)


@pytest.mark.parametrize("size", [1, 3, 10**6])
@pytest.mark.parametrize(
    ("name", "answer", "thought"),
    [
        ("qwen3", "<think>\nhm, né\n</think>\n\nYes", "\nhm, né\n"),
        ("qwen3", "\nYes", ""),
        ("opens", "hm\n</think>\n\nYes", "hm\n"),
        ("opens", "hm, n", "hm, n"),
        ("gpt_oss", f"{ANALYSIS}a né<|end|><|start|>assistant{ANALYSIS}b<|end|>{FINAL}c", "a néb"),
        ("gemma4", "<|channel>thought\nhm\n<channel|>Yes", "thought\nhm\n"),
    ],
)
def test_tokens_of_thoughts_are_counted_without_their_marks(name: str, answer: str, thought: str, size: int) -> None:
    """Each letter of these tokenizers is a token, and each byte of others."""
    assert told(model(name), answer, [size] * len(answer)).num_thought == len(thought.encode())


@settings(max_examples=200, deadline=None)
@given(case=st.sampled_from([*CASES, *BY_TEXT]), sizes=st.lists(st.integers(0, 7), max_size=30))
def test_the_pieces_that_it_comes_in_change_nothing(
    case: tuple[str, str, str | None, str], sizes: Sequence[int]
) -> None:
    name, answer, reasoning, text = case
    assert split(name, answer, sizes) == (reasoning, text)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<", "think", ">", "</think", "</", "\n", "a", " ", "<think>", "</think>"]), max_size=12)
)
def test_tags_in_the_text_are_found_where_those_of_single_tokens_are(parts: list[str]) -> None:
    answer = "".join(parts)
    if answer:
        for name in ("qwen3", "opens"):
            assert split(f"{name} by text", answer) == split(name, answer)


@pytest.mark.parametrize(
    ("name", "end", "reasoning", "text"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "a</think>b"),
        ("qwen3", "<|im_start|>assistant\n<think>", "a", "b"),
        ("qwen3", "<think>", "a", "b"),
        ("qwen3 by text", "<think>\n", "a", "b"),
        ("qwen3", "<think> ?<|im_end|>\n<|im_start|>assistant\n", "", "a</think>b"),  # a user's word for it
        ("qwen3", "</think>", "", "a</think>b"),
    ],
)
def test_a_prompt_may_begin_or_end_the_thoughts(name: str, end: str, reasoning: str, text: str) -> None:
    tokenizer = model(name)
    stream = told(tokenizer, "a</think>b", prompt=tokenizer.encode_rendered("long before " * 9 + end))
    assert (stream.reasoning, stream.text) == (reasoning, text)


def test_stop_texts_end_answers_and_not_thoughts() -> None:
    stream = told(model("qwen3"), "<think>\na\nb\n</think>\n\nfirst\nsecond", stop=["\n"])
    assert (stream.reasoning, stream.text, stream.finish_reason) == ("a\nb", "first", "stop")
    assert model("qwen3").decode(stream.token_ids).endswith("first\n")
    stream = told(model("qwen3"), "<think>stop</think>go", stop=["stop", "st", "</think>go"])
    assert (stream.reasoning, stream.text, stream.stopped_early) == ("stop", "go", False)
    # What is held back of a thought and of an answer never joins.
    stream = told(model("opens by text"), "a</th</think>ink>", stop=["k>x"])
    assert (stream.reasoning, stream.text) == ("a</th", "ink>")


def test_the_end_token_belongs_to_neither(tmp_path: Path) -> None:
    tokenizer = model("gpt_oss")
    for end in ("<|return|>", "<|call|>"):  # both are in the list of generation_config.json
        stream = told(tokenizer, f"{ANALYSIS}a<|end|>{FINAL}b{end}", reason="stop")
        assert (stream.reasoning, stream.text, stream.finish_reason) == ("a", "b", "stop")
    stream = told(model("opens"), "only thoughts</think>", reason="stop")
    assert (stream.reasoning, stream.text) == ("only thoughts", "")


def test_the_texts_of_tokens_are_of_thoughts_marks_and_answer() -> None:
    tokenizer = model("qwen3")
    answer = "<think>\nhm\n</think>\n\nYes"
    texts = token_texts(tokenizer, [])
    assert "".join(texts.push(id) for id in told(tokenizer, answer).token_ids) == answer


@pytest.mark.parametrize("added", [True, False])
def test_a_decoder_that_looks_at_the_token_before(added: bool, tmp_path: Path) -> None:
    """sentencepiece's, which writes a space before each word and leaves out the first."""
    backend = byte_fallback()
    if added:
        backend.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(MODELS["qwen3"].template)
    tokenizer = Tokenizer(tmp_path)
    for sizes in ([], [10**6], [3, 1, 2]):
        stream = told(tokenizer, "<think>a be é中</think>be a", sizes, prompt=tokenizer.encode("a"))
        # Behind a tag a word of its own begins, so this tokenizer reads a space there.
        assert (stream.reasoning or "").strip() == "a be é中"
        assert stream.text.strip() == "be a"
