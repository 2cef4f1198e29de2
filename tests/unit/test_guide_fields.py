"""What requests may ask for: fields that say which form an answer has, and what is no such field."""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.thinking import GPT_OSS, INSTRUCT, OPENS, QWEN3, THINK, TURNS, Model
from tpctl.cli.options import read_schema
from tpctl.client import guides
from tpctl.client.guides import check_guide, guided
from tpctl.client.results import differing
from tpctl.client.tokenizer import Tokenizer
from tpctl.engine.guiding.grammars import Grammars
from tpctl.errors import RequestError, UsageError
from tpctl.wire.guide import MOST_CHARACTERS, Guide, of_schema
from tpctl.wire.sampling import SamplingParams

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "integer"}}}
GOOD: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True, "name": "x"}}},
    {"regex": "a|b"},
    {"choice": ["yes", "no"]},
    {"grammar": 'start: "a"'},
]


@pytest.mark.parametrize("fields", GOOD)
def test_fields_travel_and_come_back(fields: dict[str, Any]) -> None:
    params = SamplingParams.from_dict({**fields, "max_tokens": 7})
    again = SamplingParams.from_dict(json.loads(json.dumps(params.to_dict())))
    assert again == params and again.guide == params.guide is not None
    hash(params)
    check_guide(params.guide)


def test_what_asks_for_no_form() -> None:
    assert SamplingParams(response_format={"type": "text"}).guide is None
    assert SamplingParams.from_dict(dict.fromkeys(("response_format", "regex", "choice", "grammar"))).guide is None


def test_properties_keep_their_order() -> None:
    guide = SamplingParams(response_format=of_schema(SCHEMA)).guide
    assert guide is not None and guide.text.index('"b"') < guide.text.index('"a"')


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": "json_object"}, 'response_format is "json_object", but must be a JSON object'),
        ({"response_format": {"type": "xml"}}, 'response_format: type is "xml", but must be "text", "json_object"'),
        ({"response_format": {}}, "response_format: type is null, but must be"),
        ({"response_format": {"type": "json_object", "schema": {}}}, 'unknown field "schema" beside type'),
        ({"response_format": {"type": "json_schema"}}, "json_schema is null, but must be a JSON object with a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema is null"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}, "strict is 1"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}}, "name is 1"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "n": 1}}}, 'unknown field "n"'),
        ({"regex": ""}, 'regex is "", but must be a text that is not empty'),
        ({"grammar": 5}, "grammar is 5, but must be a text that is not empty"),
        ({"choice": []}, "choice is [], but must be a list of texts, none of them empty"),
        ({"choice": ["a", ""]}, 'choice is ["a", ""], but must be a list of texts'),
        ({"choice": "ab"}, 'choice is "ab", but must be a list of texts'),
        ({"regex": "a", "choice": ["a"]}, "regex and choice are both set; an answer can have one form"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is true beside regex, which says where the answer ends"),
        ({"regex": "a\ud800"}, "regex is not valid Unicode"),
        ({"choice": ["a" * MOST_CHARACTERS]}, f"but at most {MOST_CHARACTERS} are taken"),
        ({"guide_after": -1}, "guide_after is -1, but must be between 0 and 2^31 - 1"),
    ],
)
def test_what_is_no_such_field_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict(fields)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "schema", [{"enum": [1] * 1_000_000}, {"enum": ["a" * MOST_CHARACTERS]}, {"allOf": [{"enum": [{}] * 1_000_000}]}]
)
def test_of_a_schema_that_is_too_long_by_far_no_text_is_made(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would hold up a server's event loop, from whatever thread."""
    monkeypatch.setattr("tpctl.wire.guide.json", None)
    with pytest.raises(
        RequestError, match=rf"response_format has at least \d+ characters, but at most {MOST_CHARACTERS}"
    ):
        SamplingParams(response_format=of_schema(schema))


def chain(length: int) -> dict[str, Any]:
    """Definitions that name each other in a row."""
    definitions = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{length}": {"type": "null"}}}


def rules(length: int) -> str:
    return "start: a0\n" + "\n".join(f"a{at}: a{at + 1}" for at in range(length)) + f'\na{length}: "x"'


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"allOf": [schema]}
    return schema


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regex": "(["}, "regex: at 1(8): invalid regex"),
        ({"regex": "(?=a)b"}, "regex: at 1(8): invalid regex"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex: "),
        ({"grammar": "start: nothing"}, 'grammar: at 1(8): unknown name: "nothing"'),
        ({"grammar": "begin: /a/"}, "grammar: "),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "grammar: 1(37): lark grammar too deeply nested"),
        ({"response_format": of_schema({"type": "objekt"})}, "response_format: Invalid type: objekt"),
        (
            {"response_format": of_schema({"unevaluatedProperties": False})},
            "response_format: unevaluatedProperties",
        ),
        (
            {"response_format": of_schema({"$ref": "https://example.org/x.json"})},
            "response_format: $ref or $schema: ",
        ),
        ({"response_format": of_schema({"$ref": "#/$defs/none"})}, "response_format: "),
        ({"response_format": of_schema(deep(100))}, "response_format: recursion limit exceeded"),
        ({"response_format": of_schema({"type": "integer", "minimum": 5, "maximum": 4})}, "response_format: "),
    ],
)
def test_grammars_that_are_none_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_guide(SamplingParams.from_dict(fields).guide)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"grammar": rules(15000)}, {"response_format": of_schema(chain(7000))}])
def test_long_chains_are_followed_and_no_process_ends(fields: dict[str, Any]) -> None:
    """By recursion, for which an ordinary thread has no room."""
    check_guide(SamplingParams.from_dict(fields).guide)


def test_what_was_looked_at_is_known_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    known: OrderedDict[bytes, str | None] = OrderedDict()
    monkeypatch.setattr(guides, "_known", known)
    monkeypatch.setattr(guides, "_KEPT", 3)
    monkeypatch.setattr(
        guides, "_tried", lambda guide: looked.append(guide.text) or ("b" if "b" in guide.text else None)
    )
    texts = ["a" * 200_000, "b" * 200_000, "a" * 200_001]
    for text in (*texts, *texts, "c", *texts[1:], texts[0]):
        with pytest.raises(RequestError, match="regex: b") if "b" in text else nullcontext():
            check_guide(SamplingParams(regex=text).guide)
    assert looked == [*texts, "c", texts[0]]
    assert len(known) == 3 and {len(key) for key in known} == {16}


def test_what_cannot_be_enforced_may_be_left_out() -> None:
    asked = {"type": "object", "properties": {"a": {"type": "null"}}, "unevaluatedProperties": False}
    form = {"type": "json_schema", "json_schema": {"schema": asked, "strict": False}}
    check_guide(SamplingParams(response_format=form).guide)


def test_a_file_s_schema_can_only_do_without_a_keyword(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "uniqueItems": true}')
    with pytest.raises(UsageError, match=r'schema.json: uniqueItems cannot be enforced; leave out \(at "#"\)'):
        read_schema(tmp_path / "schema.json")


def test_a_batch_does_not_go_on_under_another_schema() -> None:
    one, other = ({"sampling": {"max_tokens": 5, "response_format": of_schema({"title": title})}} for title in "ab")
    assert differing(one, one) == ""
    assert differing(one, other) == '--json-schema {"title": "a"} (now {"title": "b"})'
    assert differing({"sampling": {"max_tokens": 5}}, one) == '--json-schema left out (now {"title": "a"})'


def behind_a_prompt(model: Model, folder: Path, **variables: Any) -> SamplingParams:
    """What the front makes of a request for a form, behind a conversation."""
    tokenizer = model.tokenizer(folder)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Why?"}], variables)
    return guided(SamplingParams(choice=("a", "b")), tokenizer, prompt, tokenizer.reasoning)


def test_a_form_begins_behind_a_thought_that_the_template_opens(tmp_path: Path) -> None:
    opened = behind_a_prompt(Model(OPENS, TURNS, THINK), tmp_path)
    assert opened.guide_after == Tokenizer(tmp_path).backend.token_to_id("</think>")
    assert SamplingParams.from_dict(opened.to_dict()) == opened
    assert behind_a_prompt(Model(QWEN3, TURNS, THINK), tmp_path, enable_thinking=False).guide_after is None
    assert behind_a_prompt(Model(QWEN3, TURNS, THINK), tmp_path).guide_after is None
    assert behind_a_prompt(Model(INSTRUCT, TURNS), tmp_path).guide_after is None


def test_a_form_is_refused_where_it_is_not_known_where_thoughts_end(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="choice: the model thinks before it answers, and </think> is no token"):
        behind_a_prompt(Model(OPENS, TURNS), tmp_path)


MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
THOUGHT = "<|channel|>analysis<|message|>So {.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"choice": ["a", "b"]}, "b", "c"),
        ({"regex": r"\d+/"}, "42/", "4a"),
        ({"grammar": 'start: word+\nword: "ab" | PAIR\nPAIR: /c[de]/'}, "abcdab", "abcf"),
        ({"response_format": of_schema(SCHEMA)}, '{"b": null, "a": 7}', '{"b": 1'),
        ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1"),
    ],
)
def test_the_last_of_several_messages_has_the_form(fields: dict[str, Any], good: str, bad: str, tmp_path: Path) -> None:
    tokenizer = Model(GPT_OSS, MARKS).tokenizer(tmp_path)
    form, prompt = tokenizer.reasoning, tokenizer.encode_chat([{"role": "user", "content": "Why?"}])
    guide = guided(SamplingParams.from_dict(fields), tokenizer, prompt, form).guide
    assert guide is not None
    grammars = Grammars(tmp_path)
    grammars.suit(tokenizer.backend.get_vocab_size(), [tokenizer.added_ids["<|return|>"]])
    end = tokenizer.added_ids["<|return|>"]

    def taken(text: str) -> bool:
        ids = [*tokenizer.encode_rendered(text), end]
        matcher = grammars.matcher(guide)
        left = len(ids) - matcher.try_consume_tokens(ids)
        return left == 0 or (left == 1 and matcher.is_stopped())

    for before in ("", THOUGHT):
        assert taken(before + FINAL + good) and not taken(before + FINAL + bad)
    assert not taken(good) and not taken(f"{THOUGHT}{THOUGHT}{FINAL}{good}")


def test_what_is_said_of_a_form_names_its_field(tmp_path: Path) -> None:
    tokenizer = Model(GPT_OSS, MARKS).tokenizer(tmp_path)
    for fields, said in (
        ({"grammar": "start: x"}, "grammar: "),
        ({"choice": ["a" * (MOST_CHARACTERS - 20)]}, "choice has 262"),
    ):
        with pytest.raises(RequestError, match=f"^{said}"):
            guided(SamplingParams.from_dict(fields), tokenizer, [1], tokenizer.reasoning)


def test_control_tokens_are_no_text_but_a_grammar_may_name_them(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, special=["<|call|>", "<end>"], added=["<tool>"])
    grammars = Grammars(tmp_path)
    grammars.suit(300, [256])
    call, end, tool = 257, 258, 259

    def allowed(guide: Guide | None, *tokens: int) -> set[int]:
        assert guide is not None
        matcher = grammars.matcher(guide)
        assert matcher.consume_tokens(list(tokens))
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    everything = allowed(SamplingParams(regex="(?s:.)*").guide)
    assert tool in everything and 256 in everything  # what is added may be text; the empty text matches
    assert not everything & {call, end, *range(260, 300)}
    named = SamplingParams(grammar='start: <|call|> "a" <end>').guide
    check_guide(named)
    letter = Tokenizer(tmp_path).encode("a")[0]
    assert allowed(named) == {call} and allowed(named, call, letter) == {end}
    spelled = SamplingParams(grammar='start: "<tool>" /[x]/').guide
    assert tool in allowed(spelled) and allowed(spelled, tool) == {Tokenizer(tmp_path).encode("x")[0]}
