"""Tools with the demo model's weights, whose template is given calls in Hermes' form: OpenAI's own client over
``tpctl serve``, with calls that a grammar enforces, and OpenAI's lines in ``tpctl batch``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.distributed.server_process import PATIENCE, ServerProcess
from tests.unit.tool_models import HERMES
from tpctl.checkpoint.sources import ResolvedSource

pytestmark = pytest.mark.slow

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
CLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["CET", "UTC"]}},
    "required": ["zone"],
    "additionalProperties": False,  # else the model makes up others, for 100 tokens
}
SCHEMAS = {"get_weather": PARAMETERS, "get_time": CLOCK}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"Tells {name[4:]}", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASKED: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
TIME: Any = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "tools.jinja"
    file.write_text(HERMES)
    return file


@pytest.fixture(scope="module")
def client(demo: ResolvedSource, template: Path) -> Iterator[openai.OpenAI]:
    settings = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory", "64MiB"]
    names = ["--served-model-name", "demo", "--chat-template", str(template)]
    server = ServerProcess(str(demo.folder), "--tp", "1", *settings, *names)
    with (
        server,
        openai.OpenAI(base_url=f"{server.ready().url}/v1", api_key="k", timeout=PATIENCE, max_retries=0) as client,
    ):
        yield client
    assert [line for line in server.said if "Traceback" in line] == []


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_a_call_is_made_where_one_is_required(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function" and answer.choices[0].message.content is None
    check(call.function.name, call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_call_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice=TIME, stream=True, max_tokens=200, temperature=0
    )
    chunks = [chunk.choices[0] for chunk in stream]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    first, *rest = deltas
    assert first.function is not None and first.function.name == "get_time" and first.id and first.type == "function"
    assert rest and all(one.index == 0 and one.id is None for one in rest)
    arguments = "".join(one.function.arguments or "" for one in deltas if one.function is not None)
    check("get_time", arguments)
    assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)
    whole = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice=TIME, max_tokens=200, temperature=0
    )
    (call,) = whole.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.arguments == arguments


def test_seeds_give_calls_that_validate(client: openai.OpenAI) -> None:
    for seed in range(2):
        answer = client.chat.completions.create(
            model="demo",
            messages=ASKED,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=seed % 2 == 0,
            seed=seed,
            max_tokens=120,
            temperature=1.0,
        )
        calls = answer.choices[0].message.tool_calls or []
        assert calls or answer.choices[0].finish_reason == "length"
        for call in calls:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)


def test_a_conversation_goes_on_behind_a_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice=TIME, max_tokens=200, temperature=0
    )
    turn = answer.choices[0].message
    assert turn.tool_calls
    result: Any = {"role": "tool", "tool_call_id": turn.tool_calls[0].id, "content": "noon"}
    messages: Any = [*ASKED, turn, result]
    said = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=20, temperature=0)
    assert said.choices[0].finish_reason in ("stop", "length") and said.choices[0].message.content


class Weather(BaseModel):
    """Tells the weather."""

    city: str
    days: int


def test_the_client_parses_calls(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    assert tool["function"]["strict"] is True
    answer = client.chat.completions.parse(
        model="demo",
        messages=ASKED,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
        max_tokens=200,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)


def test_strict_tools_need_not_be_called(client: openai.OpenAI) -> None:
    """As the client makes all of its own; <tool_call> is text for this tokenizer."""
    tools: Any = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.create(model="demo", messages=ASKED, tools=tools, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content


def test_an_answer_calls_or_has_its_form(client: openai.OpenAI) -> None:
    ok = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": ok, "strict": True}}
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, response_format=form, max_tokens=60, temperature=0
    )
    choice = answer.choices[0]
    assert choice.message.content or choice.message.tool_calls
    for call in choice.message.tool_calls or ():
        assert call.type == "function"
        check(call.function.name, call.function.arguments)
    if choice.finish_reason == "stop":
        jsonschema.validate(json.loads(choice.message.content or ""), ok)
