"""/v1/responses over a fake engine, read by OpenAI's own types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tests.unit.test_serve_refusals import error
from tpctl.client.tokenizer import Tokenizer

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
HELLO = {"role": "user", "content": "a"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template = (
        "{% for m in messages %}[{{ m.role[0] }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}{% endfor %}{% if false %}</think>{% endif %}{% if reasoning_effort %}!{% endif %}"
    )
    folder: Path = tmp_path_factory.mktemp("thinking")
    return Tokenizer(write_tokenizer(folder, template=template, added=("<think>", "</think>")))


def events(client: TestClient, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, each of its type and in its place."""
    text = client.post(PATH, json={**body, "stream": True}).text
    found = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        kind, data = block.split("\n")
        event = EVENT.validate_python(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {event.type}" and event.sequence_number == number
        found.append(event)
    return found


def test_a_response(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        body = {"input": "Hi", "instructions": "Be brief", "max_output_tokens": 40, "temperature": 0.5, "store": True}
        answer = Response.model_validate(client.post(PATH, json={"model": "demo", **body}).json())
        assert answer.output_text == "<[s]Be brief[u]Hi[a]>" and answer.status == "completed"
        assert answer.usage is not None and answer.usage.output_tokens == len(answer.output_text) + 1
        assert answer.instructions == "Be brief" and answer.max_output_tokens == 40 and answer.temperature == 0.5
        sampling = server.engines[0].requests[0].sampling
        assert (sampling.max_tokens, sampling.temperature) == (40, 0.5)
        cut = Response.model_validate(client.post(PATH, json={**body, "max_output_tokens": 2}).json())
        assert (cut.status, cut.output_text) == ("incomplete", "<[")
        assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"


def test_items_are_messages(thinking: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "user", "content": "d"},
    ]
    with served(thinking) as (client, _):
        answer = Response.model_validate(client.post(PATH, json={"input": items}).json())
        assert answer.output_text == "<[s]D[u]a\nb[a](hm)c[u]d>"
        effort = Response.model_validate(client.post(PATH, json={"input": "x", "reasoning": {"effort": "low"}}).json())
        assert effort.output_text == "<[u]x!>" and effort.reasoning is not None and effort.reasoning.effort == "low"


@pytest.mark.parametrize(
    ("thoughts", "told"),
    [
        ([{"summary": [{"type": "summary_text", "text": "in short"}]}], "in short"),
        ([{"summary": [{"type": "summary_text", "text": "in short"}], "content": THOUGHT["content"]}], "hm"),
        ([{"content": THOUGHT["content"], "encrypted_content": "x"}, THOUGHT], "hm\nhm"),
        ([{"summary": []}], ""),
    ],
)
def test_what_was_thought_is_told_whichever_way_an_item_has_it(
    thinking: Tokenizer, thoughts: list[dict[str, Any]], told: str
) -> None:
    parsed = {"type": "output_text", "text": "c", "annotations": [], "logprobs": [], "parsed": {"c": 1}}
    answer = {"role": "assistant", "content": [parsed], "id": "msg_1", "status": "completed", "phase": None}
    items = [HELLO, *({"type": "reasoning", "id": "rs_1", **one} for one in thoughts), answer, HELLO]
    with served(thinking) as (client, _):
        found = Response.model_validate(client.post(PATH, json={"input": items}).json()).output_text
        assert found == f"<[u]a[a]{f'({told})' if told else ''}c[u]a>"


def test_a_response_streams(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        found = events(client, {"input": "Hi"})
        kinds = [event.type for event in found]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        deltas = [event.delta for event in found if event.type == "response.output_text.delta"]
        assert "".join(deltas) == found[-4].text == found[-1].response.output_text == "<[u]Hi[a]>"


def test_thoughts_are_an_item_of_their_own(thinking: Tokenizer) -> None:
    with served(thinking, FakeEngine(thinking, say=lambda *_: "<think>hm</think>So")) as (client, _):
        answer = Response.model_validate(client.post(PATH, json={"input": "Hi"}).json())
        assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output_text == "So"
        assert answer.output[0].content[0].text == "hm"
        found = events(client, {"input": "Hi"})
        thought = [event.delta for event in found if event.type == "response.reasoning_text.delta"]
        said = [event.delta for event in found if event.type == "response.output_text.delta"]
        assert ("".join(thought), "".join(said)) == ("hm", "So")
        assert found[-1].response.output[0].content[0].text == "hm"
        asked = {"input": "Hi", "include": ["reasoning.encrypted_content"], "store": False}
        assert client.post(PATH, json=asked).json()["output"][0]["content"][0]["text"] == "hm"
        places = [event.output_index for event in found if event.type == "response.output_item.done"]
        assert places == [0, 1] and found[-1].response.usage.output_tokens_details.reasoning_tokens == 2


def test_tokens_of_thoughts_are_counted_one_by_one(thinking: Tokenizer) -> None:
    """A letter of two tokens has its text with the second."""
    with served(thinking, FakeEngine(thinking, say=lambda *_: "<think>hé</think>So")) as (client, _):
        usage = client.post(PATH, json={"input": "Hi"}).json()["usage"]
        assert usage["output_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize("thinks", [False, True])
def test_log_probabilities_of_a_message(tokenizer: Tokenizer, thinking: Tokenizer, thinks: bool) -> None:
    used, answer = (thinking, "<think>hm</think>Só") if thinks else (tokenizer, "Só")
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with served(used, FakeEngine(used, say=lambda *_: answer)) as (client, server):
        whole = Response.model_validate(client.post(PATH, json=body).json(), strict=True)
        told = whole.output[-1].content[0].logprobs
        assert server.engines[0].requests[0].sampling.logprobs == 2
        *_, last = told
        assert "".join(token.token for token in told) == whole.output_text == "Só"
        assert [token.logprob for token in told] == [-0.5] * len(told)
        assert b"".join(bytes(token.bytes) for token in told) == "Só".encode()
        assert [token.logprob for token in last.top_logprobs] == [-0.5, -2.0]
        found = events(client, body)
        streamed = [one for event in found if event.type == "response.output_text.delta" for one in event.logprobs]
        done = next(event for event in found if event.type == "response.output_text.done")
        assert [one.token for one in streamed] == [one.token for one in done.logprobs] == [one.token for one in told]
        assert found[-1].response.output[-1].content[0].logprobs == told
        none = client.post(PATH, json={**body, "include": [], "top_logprobs": 0}).json()
        assert none["output"][-1]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("stop", ["S", "ab", "c"])
def test_log_probabilities_of_what_a_stop_text_cut_off(tokenizer: Tokenizer, stop: str) -> None:
    """They are the same streamed and whole, also where there is no text."""
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "stop": stop}
    with served(tokenizer, FakeEngine(tokenizer, say=lambda *_: "Sabc")) as (client, _):
        whole = Response.model_validate(client.post(PATH, json=body).json(), strict=True)
        last = events(client, body)[-1].response
        told, text = whole.output[0].content[0], "Sabc".partition(stop)[0]
        assert [token.token for token in told.logprobs] == list(text + stop)
        assert last.output[0].content[0] == told and told.text == text


def test_an_answer_without_text_is_a_message(tokenizer: Tokenizer) -> None:
    with served(tokenizer, FakeEngine(tokenizer, say=lambda *_: "")) as (client, _):
        found = events(client, {"input": "Hi"})
        assert found[-1].response.output_text == "" and found[-1].response.output[0].type == "message"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "the body has no input"),
        ({"input": []}, "input", "input is [], but must be a text or a list of items"),
        ({"input": [{"type": "function_call"}]}, "input", "item 1 of input: name is null"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "tpctl takes text only"),
        ({"input": [5]}, "input", "item 1 of input is 5, which tpctl cannot take"),
        ({"input": [{"role": 5, "content": "a"}]}, "input", "must have a string as its role"),
        (
            {"input": [{"role": "user", "content": "a", "colour": 1}]},
            "input",
            'item 1 of input has the field "colour", which tpctl does not know; leave it out',
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "colour": 1}]}]},
            "input",
            'a part of item 1 of input has the field "colour"',
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "namespace": "g"}]},
            "input",
            'has the field "namespace"',
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b", "content": "c"}]},
            "input",
            'has the field "content"',
        ),
        ({"input": [{"type": [], "role": "user"}]}, "input", "item 1 of input is of type []"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, HELLO]},
            "input",
            "item 1 of input has its thoughts as encrypted_content, which tpctl cannot read",
        ),
        (
            {"input": [HELLO, THOUGHT, THOUGHT]},
            "input",
            "item 2 of input is reasoning, which no message or call of the assistant follows; leave it out",
        ),
        ({"input": [THOUGHT, HELLO, {"role": "assistant", "content": "b"}]}, "input", "item 1 of input is reasoning"),
        ({"input": [THOUGHT, {"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input", "item 1"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "which tpctl cannot do"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools", "tool 1: name is null"),
        ({"input": "a", "text": {"format": {"type": "json"}}}, "text.format", 'text.format: type is "json"'),
        ({"input": "a", "reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort is given, but the mod"),
        ({"input": "a", "text": {"verbosity": "low"}}, "verbosity", "which tpctl cannot do"),
        ({"input": "a", "truncation": "auto"}, "truncation", "which tpctl cannot do"),
        ({"input": "a", "colour": 1}, "colour", "unknown field 'colour' in the body of a request to /v1/responses"),
        ({"input": "a", "n": 2}, "n", "unknown field 'n'"),
        ({"input": "a", "include": ["file_search_call.results"]}, "include", 'include has "file_search_call.results"'),
        ({"input": "a", "top_logprobs": 2}, "top_logprobs", "is 2, but include has no message.output_text.logprobs"),
        ({"input": "a", "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21, but must be a whole number from 0"),
        ({"input": "a", "include": "all"}, "include", 'include is "all", but must be a list'),
        ({"input": "a", "prompt_logprobs": 1}, "prompt_logprobs", "unknown field 'prompt_logprobs'"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0, but must be at least"),
        ({"input": "a", "max_output_tokens": 600}, "max_output_tokens", "and max_output_tokens is 600: 607 in all"),
        ({"input": "a", "reasoning": 5}, "reasoning", "reasoning is 5, but must be a JSON object"),
    ],
)
def test_what_cannot_be_had(tokenizer: Tokenizer, body: Any, param: str, said: str) -> None:
    with served(tokenizer) as (client, server):
        found = error(client.post(PATH, json=body), 400)
        assert said in found.message and found.param == param
        assert not server.notes
