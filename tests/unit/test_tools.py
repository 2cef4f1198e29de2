"""Calls told from text in the forms of each family, however the text is cut; what is no call stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.client.tools.calls import Calls
from tpctl.client.tools.deepseek import DEEPSEEK, KIMI, Blocks
from tpctl.client.tools.forms import ToolForm
from tpctl.client.tools.gemma import Gemma
from tpctl.client.tools.hermes import Hermes
from tpctl.client.tools.json_value import JsonValue
from tpctl.client.tools.llama import Llama
from tpctl.client.tools.mistral import Mistral
from tpctl.client.tools.reader import Symbols
from tpctl.client.tools.reading import CallParser
from tpctl.client.tools.tagged import MINIMAX, QWEN_XML, SEED, Keyed
from tpctl.client.tools.typed import as_json, types_of

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
NAMES: dict[str, Any] = {"get_weather": WEATHER, "now": {}}
PARIS = {"city": 'Pa"ris\n </x>', "days": 3}
TWO = [("get_weather", PARIS), ("now", {})]
ARGS = json.dumps(PARIS)
BOTH = f'{{"name": "get_weather", "arguments": {ARGS}}}', '{"name": "now", "arguments": {}}'

# form, text, what stays text, calls
TEXTS: list[tuple[ToolForm, str, str, list[tuple[str, Any]]]] = [
    (
        Hermes(),
        f"Let me see.\n<tool_call>\n{BOTH[0]}\n</tool_call>\n<tool_call>\n{BOTH[1]}\n</tool_call>",
        "Let me see.",
        TWO,
    ),
    (Hermes(), f"<tool_call>{BOTH[0]}\n\n</tool_call>\n<tool_call>{BOTH[1]}", "", TWO),  # the last tag is missing
    (Hermes(), f"<tool_call>{BOTH[1]}</tool_call>\n And more. ", "And more. ", TWO[1:]),
    (Hermes(), '<tool_call>{"arguments": {"a": [1, {}]}, "name": "now"}</tool_call>', "", [("now", {"a": [1, {}]})]),
    (Hermes(), '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", {"a": 1})]),
    (Hermes(), '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    (
        QWEN_XML,
        "Well.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n" + PARIS["city"] + "\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Well.",
        TWO,
    ),
    (QWEN_XML, "<function=now>\n<parameter=x>\n\n\n</parameter>\n</function>", "", [("now", {"x": "\n"})]),
    (
        SEED,
        f"<seed:tool_call>\n<function=get_weather>\n<parameter=city>{PARIS['city']}</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n<function=now>\n</function>\n</seed:tool_call>",
        "",
        TWO,
    ),
    (
        MINIMAX,
        f'A\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{PARIS["city"]}</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "A",
        TWO,
    ),
    (
        Keyed(),
        f"\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{PARIS['city']}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "",
        TWO,
    ),
    (Keyed(), "<tool_call>now</tool_call>", "", TWO[1:]),
    (Llama(), f'\n{{"name": "get_weather", "parameters": {ARGS}}}', "", TWO[:1]),
    (Llama(), f'{{"name": "get_weather", "parameters": {ARGS}}}; {{"name": "now", "parameters": {{}}}}', "", TWO),
    (Llama(), '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', "", TWO[1:]),
    (Mistral(), f'[TOOL_CALLS] [{BOTH[0]}, {BOTH[1][:-1]}, "id": "VvvODy9mT"}}]', "", TWO),
    (Mistral(), f"[TOOL_CALLS]get_weather[ARGS]{ARGS}[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{{}}", "", TWO),
    (Mistral(), f"So. [TOOL_CALLS]get_weather{ARGS}", "So.", TWO[:1]),
    (
        Blocks("deepseek", DEEPSEEK, typed=True),
        "Hm <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + ARGS + "\n```"
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Hm",
        TWO,
    ),
    (
        Blocks("deepseek", DEEPSEEK),
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + ARGS + "<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        TWO,
    ),
    (
        Blocks("kimi", KIMI, numbered=True),
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        + ARGS
        + "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        TWO,
    ),
    (
        Gemma(),
        '<|tool_call>call:get_weather{city:<|"|>' + PARIS["city"] + '<|"|>,days:3}<tool_call|><|tool_call>call:now{}'
        "<tool_call|>",
        "",
        TWO,
    ),
    (
        Gemma(),
        '<|tool_call>call:now{a:[1.5,true,None,<|"|>x,}<|"|>],b:{c:{}},d:[]}<tool_call|>',
        "",
        [("now", {"a": [1.5, True, None, "x,}"], "b": {"c": {}}, "d": []})],
    ),
]


def told(form: ToolForm, pieces: list[str], *, single: bool = False, added: dict[str, int] | None = None) -> Any:
    """The text and the calls of an answer that came in such pieces."""
    parser = CallParser(form, Symbols(form.marks, added or {}), NAMES, single=single)
    found = [one for piece in pieces for one in parser.push(piece)] + parser.finish()
    calls, text = Calls(), ""
    for one in found:
        if isinstance(one, str):
            text += one
        else:
            calls.push(one)
    return text, [(call.name, json.loads(call.arguments)) for call in calls.all()]


@pytest.mark.parametrize(("form", "text", "rest", "calls"), TEXTS, ids=lambda value: getattr(value, "name", ""))
def test_calls_are_told_however_the_text_is_cut(form: ToolForm, text: str, rest: str, calls: Any) -> None:
    for at in range(len(text) + 1):
        assert told(form, [text[:at], text[at:]]) == (rest, calls), at
    assert told(form, list(text)) == (rest, calls)


def test_arguments_come_in_pieces_behind_id_and_name() -> None:
    form = Hermes()
    parser = CallParser(form, Symbols(form.marks, {}), NAMES)
    pieces = [one for char in f"<tool_call>\n{BOTH[0]}\n</tool_call>" for one in parser.push(char)]
    assert all(not isinstance(one, str) for one in pieces)
    first, *rest = pieces
    assert first.name == "get_weather" and first.id and first.id.startswith("call_") and first.arguments == ""
    assert len(rest) == len(ARGS) and all(one.id is one.name is None and one.at == 0 for one in rest)
    assert "".join(one.arguments for one in rest) == ARGS


def test_texts_between_tags_come_in_pieces_too() -> None:
    form = QWEN_XML
    parser = CallParser(form, Symbols(form.marks, {}), NAMES)
    begun = parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\nPa")
    assert "".join(one.arguments for one in begun) == '{"city": "Pa'
    assert [one.arguments for one in parser.push('r"')] == ['r\\"']
    assert parser.push("\n</para") == []  # which may be the end
    assert [one.arguments for one in parser.push("x")] == ["\\n</parax"]


MALFORMED: list[tuple[ToolForm, str]] = [
    (Hermes(), 'x\n<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call> y'),
    (Hermes(), "<tool_call>\nnothing of the kind\n</tool_call>"),
    (Hermes(), '<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>'),
    (Hermes(), '<tool_call>{"name": "now", "arguments": {"a": 1'),  # the answer ended there
    (Hermes(), '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    (Hermes(), '<tool_call>{"name": "now", "arguments": "x"}</tool_call>'),
    (Hermes(), '<tool_call>{"name": "now", "arguments": {}, "more": 1}</tool_call>'),
    (Hermes(), "<tool_cal and <tool_call"),
    (QWEN_XML, "<tool_call>\n<function=nobody>\n</function>\n</tool_call>"),
    (QWEN_XML, "<tool_call>\n<function=now>\n<parameter=a>\nb"),
    (QWEN_XML, "<function=now><parameter=a>1</parameter><parameter=a>2</parameter></function>"),
    (Keyed(), "<tool_call>nowhere\n<arg_key>"),
    (Keyed(), "<tool_call>now\n<arg_key>a</arg_key>b"),
    (Llama(), '{"city": "Paris"}'),
    (Llama(), '{"name": "Paris"} is the capital'),
    (Llama(), 'As JSON: {"name": "now", "parameters": {}}'),
    (Llama(), '<|python_tag|>brave_search.call(query="x")'),
    (Mistral(), "[TOOL_CALLS]nobody[ARGS]{}"),
    (Mistral(), "[TOOL_CALLS] and so on"),
    (Mistral(), "[TOOL_CALLS][ARGS]{}"),
    (Blocks("deepseek", DEEPSEEK), "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}"),
    (Blocks("kimi", KIMI, numbered=True), "<|tool_call_begin|>now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    (Gemma(), "<|tool_call>call:now{a:what?}<tool_call|>"),
    (Gemma(), "<|tool_call>call:now{a:" + "[" * 100 + "]" * 100 + "}<tool_call|>"),
]


@pytest.mark.parametrize(("form", "text"), MALFORMED, ids=lambda value: getattr(value, "name", ""))
def test_what_is_no_call_stays_text_as_it_was_written(form: ToolForm, text: str) -> None:
    for at in range(len(text) + 1):
        assert told(form, [text[:at], text[at:]]) == (text, [])
    assert told(form, list(text)) == (text, [])


def test_a_call_that_turns_out_to_be_none_is_taken_back() -> None:
    form = Hermes()
    parser = CallParser(form, Symbols(form.marks, {}), NAMES)
    begun = parser.push('<tool_call>{"name": "now", "arguments": {"a": ')
    assert begun[0].name == "now"
    back, text = parser.push("?}")[:2]
    assert back.taken_back and back.at == 0 and text == '<tool_call>{"name": "now", "arguments": {"a": '
    again = parser.push(f"</tool_call><tool_call>{BOTH[1]}")
    assert next(one.at for one in again if not isinstance(one, str)) == 1


def test_one_call_only_where_that_is_asked_for() -> None:
    text = f"A <tool_call>{BOTH[0]}</tool_call> B <tool_call>{BOTH[1]}</tool_call> C"
    assert told(Hermes(), [text], single=True) == ("A", TWO[:1])
    assert told(Hermes(), list(text), single=True) == ("A", TWO[:1])


def test_marks_that_are_tokens_are_not_seen_in_text() -> None:
    added = {"<tool_call>": 7, "</tool_call>": 8}
    text = f"<tool_call>{BOTH[0]}</tool_call>"
    assert told(Hermes(), [text], added=added) == (text, [])
    symbols = Symbols(Hermes().marks, added).by_id
    marked = f"{symbols[7]}\n{BOTH[0]}\n{symbols[8]}"
    assert told(Hermes(), [marked], added=added) == ("", TWO[:1])
    stray = f'{symbols[7]}{{"name": "now", "arguments": {{"a": "{symbols[8]}"}}}}{symbols[8]} x {symbols[8]}'
    assert told(Hermes(), list(stray), added=added) == ("x </tool_call>", [("now", {"a": "</tool_call>"})])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON, st.text(max_size=3), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_json_ends_where_it_ends(value: Any, rest: str, ascii: bool, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    whole = f"[{text}]{rest}"
    at = data.draw(st.integers(0, len(whole)))
    scanner = JsonValue()
    taken = scanner.push(whole[:at])
    if not scanner.done:
        taken += scanner.push(whole[at:])
    assert scanner.done and not scanner.failed and taken == len(text) + 2


@pytest.mark.parametrize(
    "text",
    ["[1,]", "{,}", '{"a"}', '{"a":1,}', "[01]", "[1.]", "[tru]", "[1 2]", '["\\x"]', '["\\u12g4"]', '["\n"]', "]"],
)
def test_what_is_no_json_is_seen(text: str) -> None:
    scanner = JsonValue()
    scanner.push(text + " ]")
    assert scanner.failed


def test_arguments_get_the_types_of_their_schema() -> None:
    assert as_json("01234", {"string"}) == '"01234"' and as_json("5", {"string"}) == '"5"'
    assert (
        as_json(" 5\n", {"integer"}) == "5" and as_json("5", {"number"}) == "5" and as_json("5.0", {"integer"}) == "5"
    )
    assert as_json("True", {"boolean"}) == "true" and as_json("None", {"string", "null"}) == "null"
    assert as_json("null", {"string"}) == '"null"'
    for text in ("1e999", "[1, -1e999]", "Infinity", "NaN"):  # of which no JSON could be made
        assert json.loads(as_json(text, set())) == json.loads(as_json(text, {"number", "array"})) == text
    assert as_json('{"a": [1]}', {"object"}) == '{"a": [1]}' and as_json("[1]", set()) == "[1]"
    assert as_json("many", {"integer"}) == '"many"' and as_json("NaN", {"number"}) == '"NaN"'
    assert as_json("x", set()) == '"x"' and as_json("[" * 100_000, {"array"}) == json.dumps("[" * 100_000)
    assert types_of({"anyOf": [{"type": "string"}, {"type": ["integer", "null"]}]}) == {"string", "integer", "null"}
    assert types_of({"enum": ["a", 1]}) == {"string", "integer"} and types_of({"const": True}) == {"boolean"}
    assert types_of({}) == types_of(None) == set()
