"""Tools over a fake engine: calls as OpenAI's own types read them, in chats and responses, whole and as they grow."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, chat, events
from tests.unit.test_serve_refusals import error
from tests.unit.test_serve_responses import PATH
from tests.unit.test_serve_responses import events as response_events
from tests.unit.thinking import MODELS as PLAIN
from tests.unit.thinking import TURNS
from tests.unit.tool_models import MODELS
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Request

ROOT = Path(__file__).parent.parent.parent
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "get_weather", "description": "d", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
FLAT = [{"type": "function", **WEATHER, "strict": False}, {"type": "function", "name": "now"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "now", "arguments": {"a": oops}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return MODELS["hermes"].tokenizer(folder)


def saying(tokenizer: Tokenizer, text: str) -> FakeEngine:
    def say(tokenizer: Tokenizer, request: Request) -> str:
        return text

    return FakeEngine(tokenizer, say=say, max_model_len=2048)


def test_calls_of_a_chat(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, f"Well.\n{CALL}\n{NOW}")) as (client, server):
        body = client.post(CHAT, json=chat(tools=TOOLS)).json()
        answer = ChatCompletion.model_validate(body, strict=True).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("Well.", "tool_calls")
        calls = answer.message.tool_calls or []
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [  # type: ignore[union-attr]
            ("get_weather", {"city": "Oslo"}),
            ("now", {}),
        ]
        assert len({call.id for call in calls}) == 2
        prompt = tokenizer.decode(server.engines[0].requests[0].token_ids, skip_special=False)
        assert '"name": "get_weather"' in prompt and "strict" not in prompt
        for more in ({"tool_choice": "none"}, {}):  # without tools it is text
            body = client.post(CHAT, json=chat(**({"tools": TOOLS, **more} if more else {}))).json()
            assert body["choices"][0]["message"]["content"] == f"Well.\n{CALL}\n{NOW}"
            assert "tool_calls" not in body["choices"][0]["message"]
            prompt = tokenizer.decode(server.engines[0].requests[-1].token_ids, skip_special=False)
            assert "get_weather" not in prompt


def test_calls_of_a_chat_stream(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, f"Well.\n{CALL}\n{NOW}")) as (client, _):
        chunks = [
            ChatCompletionChunk.model_validate(one, strict=True) for one in events(client, CHAT, chat(tools=TOOLS))
        ]
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        heads = [(one.index, one.function.name) for one in deltas if one.id is not None and one.function]
        assert heads == [(0, "get_weather"), (1, "now")]
        for at, arguments in ((0, {"city": "Oslo"}), (1, {})):
            pieces = [one.function.arguments for one in deltas if one.index == at and one.function]
            assert json.loads("".join(pieces)) == arguments  # type: ignore[arg-type]
        assert len(deltas) > 10
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Well."
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its template marks thoughts, and reads none of earlier turns."""
    folder: Path = tmp_path_factory.mktemp("thinking")
    return MODELS["hermes, thinking"].tokenizer(folder)


def weather_teller(tokenizer: Tokenizer) -> FakeEngine:
    """Thinks, calls for two cities' weather, and tells it once it knows."""

    def say(tokenizer: Tokenizer, request: Request) -> str:
        known = "rain" in tokenizer.decode(request.token_ids)
        return f"<think>\nhm\n</think>\n\n{'It rains.' if known else f'{CALL}{CALL}'}"

    return FakeEngine(tokenizer, say=say, max_model_len=2048)


def test_the_loop_of_the_documentation(thinking: Tokenizer) -> None:
    page = Path(__file__).parents[2] / "docs" / "tools.md"
    loop = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    made, kept = 'OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")', loop
    loop = loop.replace(made, 'OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)')
    assert loop != kept
    with served(thinking, weather_teller(thinking)) as (http, server):
        said: dict[str, Any] = {"http": http}
        exec(loop, said)
        assert said["answer"].content == "It rains." and said["answer"].reasoning_content == "hm"
        first, second = (thinking.decode(one.token_ids, skip_special=False) for one in server.engines[0].requests)
        assert second.count("4 degrees, rain") == 2 and second.count("<tool_call>") == 2 and "hm" not in second
        assert second.startswith(first)


def test_a_response_goes_on_from_its_output(thinking: Tokenizer) -> None:
    with served(thinking, weather_teller(thinking)) as (http, server):
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
        items: list[Any] = [{"role": "user", "content": "Hi"}]
        tools: Any = FLAT
        answer = client.responses.create(model="demo", input=items, tools=tools)
        assert [item.type for item in answer.output] == ["reasoning", "function_call", "function_call"]
        items += answer.output
        for call in answer.output[1:]:
            assert call.type == "function_call"
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
        answer = client.responses.create(model="demo", input=items, tools=tools)
        assert answer.output_text == "It rains."
        items += answer.output
        assert client.responses.create(model="demo", input=items, tools=tools).output_text == "It rains."
        assert "hm" not in thinking.decode(server.engines[0].requests[-1].token_ids)


def test_what_the_client_parsed_goes_back(tokenizer: Tokenizer) -> None:
    """OpenAI's client puts what it made of an answer beside it, and sends that, too."""
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}", "parsed_arguments": {}}}
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": '{"a": 1}', "parsed": {"a": 1}},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    with served(tokenizer) as (client, server):
        assert client.post(CHAT, json=chat(messages=said, tools=TOOLS)).status_code == 200
        assert "parsed" not in tokenizer.decode(server.engines[0].requests[0].token_ids)
        found = error(client.post(CHAT, json=chat(messages=[{**said[0], "parsed": 1}])), 400)
        assert 'the field "parsed"' in found.message


def test_a_result_of_a_call_that_is_not_there_is_let_pass(tokenizer: Tokenizer) -> None:
    """Of a conversation that was shortened between the two."""
    result = {"role": "tool", "tool_call_id": "call_none", "content": "4 degrees"}
    messages = [{"role": "user", "content": "Hi"}, result]
    output = {"type": "function_call_output", "call_id": "call_none", "output": "4 degrees"}
    items = [{"role": "user", "content": "Hi"}, output]
    with served(tokenizer) as (client, server):
        for path, body in ((CHAT, {"messages": messages}), ("/v1/responses", {"input": items})):
            assert client.post(path, json=body).status_code == 200
            assert "4 degrees" in tokenizer.decode(server.engines[0].requests[-1].token_ids)


def test_a_broken_call_is_text(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, BROKEN)) as (client, _):
        body = client.post(CHAT, json=chat(tools=TOOLS)).json()["choices"][0]
        assert (body["message"]["content"], body["finish_reason"]) == (BROKEN, "stop")
        chunks = events(client, CHAT, chat(tools=TOOLS))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == BROKEN
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("model", "call"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": [\\"\\\\ud800\\"]}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ["\\ud800"]}}</tool_call>'),
        ("qwen-xml", '<function=now>\n<parameter=a>\n["\\ud800"]\n</parameter>\n</function>'),
    ],
    ids=["a text of arguments", "arguments", "a list between tags"],
)
def test_half_a_surrogate_pair_that_a_model_writes_stays_an_escape(tmp_path: Path, model: str, call: str) -> None:
    """UTF-8 has no form for it, but JSON has."""
    tokenizer = MODELS[model].tokenizer(tmp_path)
    with served(tokenizer, saying(tokenizer, call)) as (client, server):
        whole = client.post(CHAT, json=chat(tools=TOOLS)).json()["choices"][0]["message"]["tool_calls"]
        deltas = [chunk["choices"][0]["delta"] for chunk in events(client, CHAT, chat(tools=TOOLS))]
        pieces = [piece["function"]["arguments"] for delta in deltas for piece in delta.get("tool_calls", ())]
        for arguments in (whole[0]["function"]["arguments"], "".join(pieces)):
            assert arguments.isascii() and json.loads(arguments) == {"a": ["\ud800"]}
        for stream in (False, True):
            body = {"input": "Hi", "tools": FLAT, "stream": stream}
            assert r"\\ud800" in client.post(PATH, json=body).text
        said = [*chat()["messages"], {"role": "assistant", "content": None, "tool_calls": whole}]
        assert client.post(CHAT, json=chat(messages=said, tools=TOOLS)).status_code == 200  # it goes back as it came
        assert '["\\ud800"]' in tokenizer.decode(server.engines[0].requests[-1].token_ids)
        assert not server.notes


def test_one_call_ends_an_answer(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, f"{CALL}\n{NOW}")) as (client, server):
        body = client.post(CHAT, json=chat(tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0]
        assert len(body["message"]["tool_calls"]) == 1 and body["finish_reason"] == "tool_calls"
        assert body["message"]["content"] is None
        deadline = time.monotonic() + 60
        while not server.engines[0].aborted:  # what came behind it is not computed
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_calls_that_are_required_have_a_grammar(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, CALL)) as (client, server):
        choice = {"type": "function", "function": {"name": "get_weather"}}
        for more in ({"tool_choice": "required"}, {"tool_choice": choice}):
            assert client.post(CHAT, json=chat(tools=TOOLS, **more)).status_code == 200
            grammar = server.engines[0].requests[-1].sampling.grammar
            assert grammar is not None and ("now" in grammar) is (more["tool_choice"] == "required")
        strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
        assert client.post(CHAT, json=chat(tools=strict)).status_code == 200
        assert "TEXT" in str(server.engines[0].requests[-1].sampling.grammar)
        client.post(CHAT, json=chat(tools=TOOLS))
        assert server.engines[0].requests[-1].sampling.grammar is None
        both = chat(tools=TOOLS, response_format={"type": "json_object"})
        assert client.post(CHAT, json=both).status_code == 200
        sampling = server.engines[0].requests[-1].sampling
        assert "get_weather" in str(sampling.grammar) and sampling.response_format is None


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program against a model that has the template that the page names."""
    page = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    named = re.search(r"^tpctl serve demo --chat-template (\S+)$", page, re.MULTILINE)
    program = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert named is not None and program is not None
    template = (ROOT / named[1]).read_text(encoding="utf-8")
    model = PLAIN["no thoughts"].__class__(template, TURNS).tokenizer(tmp_path)

    def say(tokenizer: Tokenizer, request: Request) -> str:
        prompt = tokenizer.decode(request.token_ids, skip_special=False)
        assert '"name": "get_weather"' in prompt
        return f"It rains in {prompt.count(CALL)} city." if "<tool_response>\n4 degrees, rain" in prompt else CALL

    with served(model, FakeEngine(model, say=say, max_model_len=2048)) as (http, server):
        opened = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
        monkeypatch.setattr("openai.OpenAI", lambda **options: opened)
        told: list[str] = []
        exec(program[1], {"print": told.append})
    assert told == ["It rains in 1 city."] and len(server.engines[0].requests) == 2


def test_what_cannot_be_had_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with served(tokenizer) as (client, _):
        for more, param, said in (
            ({"tools": 3}, "tools", "tools is 3"),
            ({"tools": TOOLS, "tool_choice": "x"}, "tool_choice", 'tool_choice is "x"'),
            ({"tools": TOOLS, "grammar": "start: x"}, "tools", "grammar beside tools: "),
            ({"functions": TOOLS}, "functions", "functions is"),
            ({"tools": TOOLS, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "has tools of its own"),
        ):
            found = error(client.post(CHAT, json=chat(**more)), 400)
            assert found.param == param and said in found.message
    plain = PLAIN["no thoughts"].tokenizer(tmp_path)
    with served(plain) as (client, _):
        found = error(client.post(CHAT, json=chat(tools=TOOLS)), 400)
        assert found.param == "tools" and found.message.endswith("or have another (--chat-template FILE)")


def test_a_form_that_the_engine_has_no_text_for_is_named_as_it_was_asked_for(tokenizer: Tokenizer) -> None:
    """Not as the grammar that it was made into."""
    stuck = {"name": "stuck", "parameters": PARAMETERS}
    with served(tokenizer) as (client, _):
        for more, param, name in (
            ({"regex": "stuck"}, "regex", "regex"),
            ({"tools": TOOLS, "regex": "stuck"}, "tools", "regex beside tools"),
            ({"tools": [{"type": "function", "function": stuck}], "tool_choice": "required"}, *["tool_choice"] * 2),
            ({"tools": [{"type": "function", "function": {**stuck, "strict": True}}]}, "tools", "tools with strict"),
        ):
            found = error(client.post(CHAT, json=chat(**more)), 400)
            assert found.param == param and found.message.startswith(f"{name}: the grammar has no text that"), more
        schema = {"type": "object", "properties": {"stuck": {"type": "string"}}, "required": ["stuck"]}
        form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
        for path, body, param, name in (
            (CHAT, chat(guided_json=schema), "guided_json", "guided_json"),
            (CHAT, chat(guided_json=schema, tools=TOOLS), "tools", "guided_json beside tools"),
            (CHAT, chat(structured_outputs={"json": schema}), "structured_outputs.json", "structured_outputs.json"),
            (PATH, {"input": "Hi", "text": {"format": form}}, "text.format", "text.format"),
            (PATH, {"input": "Hi", "text": {"format": form}, "tools": FLAT}, "tools", "text.format beside tools"),
        ):
            found = error(client.post(path, json=body), 400)
            assert found.param == param and found.message.startswith(f"{name}: the grammar has no text that"), body
        found = error(client.post(CHAT, json=chat(guided_json={**schema, "uniqueItems": True}, tools=TOOLS)), 400)
        assert found.message.startswith(
            "guided_json beside tools: uniqueItems cannot be enforced; leave out, or ask by"
        )
        assert found.param == "tools"


def test_calls_of_a_response(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, f"Well.\n{CALL}\n{NOW}")) as (client, server):
        body = {"input": "Hi", "tools": FLAT, "tool_choice": "auto"}
        answer = Response.model_validate(client.post(PATH, json=body).json())
        assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
        assert answer.output_text == "Well." and answer.tools[0].type == "function"
        call = answer.output[1]
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Oslo"}
        items = [{"role": "user", "content": "Hi"}, *client.post(PATH, json=body).json()["output"]]
        outputs = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": f"result {item['name']}"}
            for item in items[2:]
        ]
        assert client.post(PATH, json={**body, "input": [*items, *outputs[::-1]]}).status_code == 200
        prompt = tokenizer.decode(server.engines[0].requests[-1].token_ids, skip_special=False)
        assert f"Well.\n{CALL}\n{NOW}<|im_end|>" in prompt
        assert prompt.index("result get_weather") < prompt.index("result now")
        named = {**body, "tool_choice": {"type": "function", "name": "now"}}
        assert client.post(PATH, json=named).status_code == 200
        assert "now" in str(server.engines[0].requests[-1].sampling.grammar)


def test_calls_of_a_response_stream(tokenizer: Tokenizer) -> None:
    with served(tokenizer, saying(tokenizer, f"Well.\n{CALL} Done.")) as (client, _):
        found = response_events(client, {"input": "Hi", "tools": FLAT})
        done = [event for event in found if event.type == "response.output_item.done"]
        assert [event.item.type for event in done] == ["message", "function_call", "message"]
        assert [event.output_index for event in done] == [0, 1, 2]
        deltas = [event.delta for event in found if event.type == "response.function_call_arguments.delta"]
        (arguments,) = [event for event in found if event.type == "response.function_call_arguments.done"]
        assert "".join(deltas) == arguments.arguments == '{"city": "Oslo"}' and len(deltas) > 5
        assert arguments.name == "get_weather"
        last = found[-1].response
        assert last.status == "completed" and [item.type for item in last.output] == [
            "message",
            "function_call",
            "message",
        ]
        assert len({item.id for item in last.output}) == 3 and last.output_text == "Well.Done."


@pytest.mark.parametrize("before", ["", "Well.\n", f"{CALL}\n"], ids=["alone", "behind a text", "behind a call"])
def test_a_call_that_is_cut_off_is_told_the_same_whole_and_as_it_grows(tokenizer: Tokenizer, before: str) -> None:
    """As OpenAI tells it: with the beginning of its arguments, and not as text."""

    def items(response: Response) -> list[Any]:
        told = response.model_dump()["output"]  # whole, the text stands before the calls
        texts = [item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"] for item in told]
        return sorted((item["type"], item["status"], text.strip()) for item, text in zip(told, texts, strict=True))

    with served(tokenizer, saying(tokenizer, before + CALL)) as (client, _):
        for cut in ('{"name": "get_wea', '{"name": "get_weather"', '"arguments": {"ci'):
            answer = before + CALL.partition(cut)[0] + cut
            most = {"max_tokens": len(tokenizer.encode_rendered(answer))}
            whole = client.post(CHAT, json=chat(tools=TOOLS, **most)).json()["choices"][0]
            message, calls = whole["message"], before.count("<tool_call>") + ("weather" in cut or "arguments" in cut)
            deltas = [chunk["choices"][0]["delta"] for chunk in events(client, CHAT, chat(tools=TOOLS, **most))]
            assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
            pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
            told = [call["function"] for call in message.get("tool_calls", ())]
            assert len(told) == calls and whole["finish_reason"] == "length"
            for at, function in enumerate(told):
                mine = [piece["function"] for piece in pieces if piece["index"] == at]
                assert mine[0]["name"] == function["name"] == "get_weather"
                assert "".join(piece["arguments"] for piece in mine) == function["arguments"]
            if cut == '"arguments": {"ci':
                assert told[-1]["arguments"] == '{"ci'
            body = {"input": "Hi", "tools": FLAT, "max_output_tokens": most["max_tokens"]}
            response = Response.model_validate(client.post(PATH, json=body).json())
            last = response_events(client, body)[-1].response
            assert items(response) == items(last) and response.status == last.status == "incomplete"
            assert sum(item.status == "incomplete" for item in response.output) == 1
