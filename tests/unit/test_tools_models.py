"""Calls in whole conversations: the templates of each family write them, and their answers are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.thinking import MODELS as PLAIN
from tests.unit.tool_answers import USER, model
from tests.unit.tool_models import MODELS
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tool_stream import check_tools
from tpctl.client.tools.asked import Tools, ToolsError, read_tools, with_tools
from tpctl.errors import RequestError
from tpctl.wire.messages import Output

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
OFFERED = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
ARGUMENTS = {"city": 'São "Paulo"', "days": 3}


def tools(**more: Any) -> Tools:
    found = read_tools({"tools": OFFERED, **more})
    assert found is not None
    return found


def calls(form: str, count: int) -> list[dict[str, Any]]:
    """As a client sends them back."""
    each = [("get_weather", json.dumps(ARGUMENTS)), ("now", "{}")][:count]
    ids = [f"functions.{name}:{at}" if form == "kimi" else f"call0000{at}" for at, (name, _) in enumerate(each)]
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": text}}
        for id, (name, text) in zip(ids, each, strict=True)
    ]


def read(tokenizer: Tokenizer, answer: str, asked: Tools, *, size: int = 1, reason: str = "stop") -> TextStream:
    return grown(tokenizer, answer, asked, size=size, reason=reason)[0]


def grown(
    tokenizer: Tokenizer, answer: str, asked: Tools, *, size: int = 1, reason: str = "stop", stop: tuple[str, ...] = ()
) -> tuple[TextStream, list[str]]:
    """An answer that came in so many tokens at a time, and what was told of it: texts, and the names of calls."""
    prompt = tokenizer.encode_chat([USER], with_tools({}, asked))
    stream = TextStream(tokenizer, stop, prompt, form=tokenizer.reasoning, tools=asked)
    ids = tokenizer.encode_rendered(answer)
    told = [one for at in range(0, len(ids), size) for one in stream.push(Output("a", ids[at : at + size]))]
    told += stream.push(Output("a", [0] if reason == "stop" else [], reason))
    pieces = [
        one.call.name if one.call else one.text for one in told if not one.reasoning and (not one.call or one.call.name)
    ]
    return stream, [piece for piece in pieces if piece]


def form_of(name: str) -> str:
    return name.split(",")[0].split(" ")[0]


def written(name: str, count: int) -> str:
    """An answer of so many calls, as the model's template writes it."""
    variables = with_tools({}, tools())
    turn = {"role": "assistant", "content": None, "tool_calls": calls(form_of(name), count)}
    prompt = model(name).template.render([USER], variables=variables)
    whole = model(name).template.render([USER, turn], variables=variables, add_generation_prompt=False)
    assert whole.startswith(prompt) and "get_weather" in prompt
    return whole[len(prompt) :].removesuffix("\n").removesuffix("<|im_end|>").removesuffix("<|call|>")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_a_template_writes_is_read_back(name: str, size: int) -> None:
    tokenizer = model(name)
    form = form_of(name)
    assert tokenizer.tool_form is not None and tokenizer.tool_form.name == {"gpt-oss": "harmony"}.get(form, form)
    count = 1 if form in ("llama", "gpt-oss") else 2
    variables = with_tools({}, tools())
    answer = written(name, count)
    stream = read(tokenizer, answer, tools(), size=size)
    assert [(call.name, json.loads(call.arguments)) for call in stream.calls] == [
        ("get_weather", ARGUMENTS),
        ("now", {}),
    ][:count]
    assert stream.text == "" and stream.finish_reason == "tool_calls"
    if form == "mistral":
        assert all(len(call.id) == 9 and call.id.isalnum() for call in stream.calls)
    again = {"role": "assistant", "tool_calls": [call.to_dict() for call in stream.calls]}
    assert tokenizer.encode_chat([USER, again], variables)[: len(tokenizer.encode_chat([USER]))]


@pytest.mark.parametrize("name", MODELS)
def test_results_go_back_in_the_order_of_the_calls(name: str) -> None:
    tokenizer = model(name)
    form = name.split(",")[0].split(" ")[0]
    made = calls(form, 1 if form in ("llama", "gpt-oss") else 2)
    turn = {"role": "assistant", "content": "", "tool_calls": made, "refusal": None, "annotations": []}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"result {at}"} for at, call in enumerate(made)]
    text = tokenizer.template.render([USER, turn, *results[::-1]], variables=with_tools({}, tools()))
    assert [text.index(f"result {at}") for at in range(len(made))] == sorted(
        text.index(f"result {at}") for at in range(len(made))
    )


def test_answers_without_calls_are_as_they_are_without_tools() -> None:
    for name in ("hermes", "mistral, named", "gpt-oss", "llama"):
        text = " Well, \n then. \n" if name != "gpt-oss" else "<|channel|>final<|message|> Well, \n then. \n"
        stream = read(model(name), text, tools())
        assert (stream.text, stream.calls, stream.finish_reason) == (" Well, \n then. \n", [], "stop")


def test_thoughts_hold_no_calls() -> None:
    tokenizer = model("hermes, thinking")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    stream = read(tokenizer, f"<think>\nI could {call}\n</think>\n\nYes.\n{call}", tools())
    assert stream.reasoning == f"I could {call}" and stream.text == "Yes."
    assert [one.name for one in stream.calls] == ["now"]
    assert read(tokenizer, f"\n{call}", tools()).text == ""


def test_messages_of_gpt_oss() -> None:
    tokenizer = model("gpt-oss")
    stream = read(
        tokenizer,
        "<|channel|>analysis<|message|>Weather, then.<|end|><|start|>assistant"
        "<|channel|>commentary<|message|>Let me look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}',
        tools(),
    )
    assert (stream.reasoning, stream.text) == ("Weather, then.", "Let me look.")
    assert [(call.name, call.arguments) for call in stream.calls] == [("get_weather", '{"city": "Oslo"}')]
    assert stream.finish_reason == "tool_calls"
    for to in ("python", "functions.nobody"):
        stream = read(tokenizer, f"<|channel|>commentary to={to} code<|message|>1 + 1", tools())
        assert (stream.text, stream.calls) == (f"commentary to={to} code\n1 + 1", [])
    broken = read(tokenizer, "<|channel|>commentary to=functions.now json<|message|>{oops}", tools())
    assert (broken.text, broken.calls) == ("commentary to=functions.now json\n{oops}", [])


@pytest.mark.parametrize("name", MODELS)
def test_a_call_that_is_cut_off_stays_as_far_as_it_was_told(name: str) -> None:
    """Wherever that is; before its name is whole it is text. What was told as it grew is what there is in the end."""
    tokenizer = model(name)
    prompt = tokenizer.encode_chat([USER], with_tools({}, tools()))
    ids = tokenizer.encode_rendered(written(name, 1))
    cut = 0
    for most in range(1, len(ids), 5):
        stream = TextStream(tokenizer, (), prompt, form=tokenizer.reasoning, tools=tools())
        told = [segment for id in ids[: most - 1] for segment in stream.push(Output("a", [id]))]
        told += stream.push(Output("a", [ids[most - 1]], "length"))
        assert stream.finish_reason == "length"
        pieces = [segment.call for segment in told if segment.call is not None]
        assert not any(piece.taken_back for piece in pieces)
        assert stream.text == "".join(segment.text for segment in told if not segment.reasoning)
        assert [call.name for call in stream.calls] == [piece.name for piece in pieces if piece.id is not None]
        for call in stream.calls:
            assert call.arguments == "".join(piece.arguments for piece in pieces) and stream.text.strip() == ""
            assert call.whole is (not pieces[-1].cut)
            cut += not call.whole
    assert cut


def test_a_call_that_the_model_leaves_unfinished_is_text() -> None:
    answer = '<tool_call>\n{"name": "now", "arguments": {"a"'
    stream = read(model("hermes"), answer, tools())
    assert (stream.calls, stream.text, stream.finish_reason) == ([], answer, "stop")


def test_an_answer_ends_with_the_only_call() -> None:
    tokenizer, asked = model("hermes"), tools(parallel_tool_calls=False)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    prompt = tokenizer.encode_chat([USER], with_tools({}, asked))
    stream = TextStream(tokenizer, (), prompt, tools=asked)
    stream.push(Output("a", tokenizer.encode_rendered(f"{call}\n{call} and so on")))
    assert len(stream.calls) == 1 and stream.finish_reason == "tool_calls" and stream.stopped_early


NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "now", "arguments": oops}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"Let me look. {NOW} It rains. {NOW}{NOW}\nSo.", "Let me look.\n\nIt rains.\n\nSo.", 3),
        (f"{NOW} It rains.", "It rains.", 1),
        (f"Well.\n{BROKEN} So.", f"Well.\n{BROKEN} So.", 0),
        (f"Well.\n{NOW}\n{BROKEN} So.", f"Well.\n\n{BROKEN} So.", 1),
        (f"Well.\n{BROKEN}\n{NOW}\nSo.", f"Well.\n{BROKEN}\n\nSo.", 1),
    ],
)
def test_text_behind_a_call_is_a_blank_line_apart(answer: str, text: str, calls: int, size: int) -> None:
    for stop in ((), ("\n<nothing",), ("\n\nX", " Y")):
        stream, told = grown(model("hermes"), answer, tools(), size=size, stop=stop)
        assert stream.text == "".join(piece for piece in told if piece != "now") == text
        assert len(stream.calls) == calls and stream.finish_reason == ("tool_calls" if calls else "stop")
        parts = [part.text if part.call is None else part.call.name for part in stream.parts]
        assert "".join(part for part in parts if part != "now") == text and parts.count("now") == calls


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stop_text_ends_with_the_text_that_a_call_ends(size: int) -> None:
    for stop in ("x.It", "x.\n\nIt", "\n\n", "x.\n<tool_call>\nz"):
        stream, told = grown(model("hermes"), f"Max.{NOW}It rains.", tools(), size=size, stop=(stop,))
        assert stream.text == "Max.\n\nIt rains." and not stream.stopped_early
        at = told.index("now")  # what may have begun it is told before the call
        assert "".join(told[:at]) == "Max." and "".join(told[at + 1 :]) == "\n\nIt rains."
    for stop, text, count in (("ax", "M", 0), ("t r", "Max.\n\nI", 1), ("I", "Max.", 1)):
        stream, told = grown(model("hermes"), f"Max.{NOW}It rains.", tools(), size=size, stop=(stop,))
        assert (stream.text, len(stream.calls), stream.stopped_early) == (text, count, True)
        assert told.count("now") == count


def test_models_without_tools_refuse_them(tmp_path: Path) -> None:
    tokenizer = PLAIN["qwen3"].tokenizer(tmp_path)
    with pytest.raises(
        ToolsError, match=r"does not read them; leave them out, or have another \(--chat-template FILE\)"
    ):
        check_tools(tokenizer)
    other = PLAIN["qwen3"].__class__("{{ tools }}{{ messages[0].content }}").tokenizer(tmp_path / "b")
    with pytest.raises(ToolsError, match="in no form that is known: hermes"):
        check_tools(other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": "x"}, 'tools is "x"'),
        ({"tools": [3]}, "tool 1 is 3"),
        ({"tools": [{"type": "custom"}]}, 'tool 1 has type "custom"'),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 'tool 1: name is "a b"'),
        ({"tools": [{**OFFERED[1], "note": 1}]}, 'tool 1: unknown field "note" beside its function'),
        (
            {"tools": OFFERED, "tool_choice": {"type": "function", "function": {"name": "now", "note": 1}}},
            "tool_choice is",
        ),
        ({"tools": [OFFERED[1], OFFERED[1]]}, 'two functions named "now"'),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "parameters is",
        ),
        ({"tools": OFFERED, "tool_choice": "always"}, 'tool_choice is "always"'),
        ({"tools": OFFERED, "tool_choice": {"type": "function", "function": {"name": "b"}}}, 'tool_choice names "b"'),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": OFFERED, "parallel_tool_calls": 1}, "parallel_tool_calls is 1"),
    ],
)
def test_what_is_wrong_with_tools_is_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match="^" + said.replace("(", r"\(") if said.startswith("tool") else said):
        read_tools(fields)


def test_what_is_asked_of_tools() -> None:
    assert read_tools({}) is None and read_tools({"tools": OFFERED, "tool_choice": "none"}) is None
    assert not tools().must and not tools().single and tools().strict == frozenset()
    assert tools(tool_choice="required").must
    named = tools(tool_choice={"type": "function", "function": {"name": "now"}})
    assert named.must and named.single and list(named.callable) == ["now"] and len(named.offered) == 2
    assert tools().offered[1] == {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    }
