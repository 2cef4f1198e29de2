"""Fields that other servers' clients send: what they mean is done, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, TEXT, chat, events
from tests.unit.test_serve_refusals import error
from tpctl.client.openai_schemas import METADATA, RESPONSES
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.asked import read_tools
from tpctl.serve.items import chat_tools
from tpctl.wire.guide import of_schema
from tpctl.wire.sampling import SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMS: list[tuple[dict[str, Any], str, Any]] = [
    ({"guided_json": SCHEMA}, "response_format", of_schema(SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, "response_format", of_schema(SCHEMA)),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["x", "y"]}, "choice", ("x", "y")),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "response_format", of_schema(SCHEMA)),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    (
        {"structured_outputs": {"regex": "a+", "disable_fallback": True, "disable_any_whitespace": False}},
        "regex",
        "a+",
    ),
    ({"structured_outputs": {"choice": ["x"]}}, "choice", ("x",)),
    ({"structured_outputs": {"json_object": True}}, "response_format", {"type": "json_object"}),
]
UNIQUE = {"type": "array", "uniqueItems": True}
UNSURE = (
    'uniqueItems cannot be enforced; leave out, or ask by response_format, and say "strict": false beside the schema'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def sampled(tokenizer: Tokenizer, body: dict[str, Any], path: str = CHAT) -> SamplingParams:
    """What the engine is asked for."""
    with served(tokenizer) as (client, server):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return server.engines[0].requests[0].sampling


@pytest.mark.parametrize(("asked", "name", "value"), FORMS)
def test_forms_by_vllm_s_names(tokenizer: Tokenizer, asked: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(sampled(tokenizer, chat(**asked)), name) == value
    assert getattr(sampled(tokenizer, {"prompt": "a", **asked}, TEXT), name) == value


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"guided_grammar": "start: x"}, "guided_grammar", "write grammar, in llguidance's dialect of Lark"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", "write grammar, in llguidance's dialect"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", 'unknown field "structural_tag" in'),
        ({"structured_outputs": {"json": None}}, "structured_outputs", "structured_outputs asks for no form"),
        ({"structured_outputs": {"disable_fallback": True}}, "structured_outputs", "asks for no form"),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "structured_outputs",
            "structured_outputs.disable_any_whitespace is true, but must be false; leave it out",
        ),
        ({"structured_outputs": {"json": {}, "disable_fallback": 1}}, "structured_outputs", "must be false or true"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "is false, but must be true"),
        ({"structured_outputs": 1}, "structured_outputs", "structured_outputs is 1, but must be a JSON object"),
        ({"guided_json": "{"}, "guided_json", 'guided_json is "{", but must be a JSON schema'),
        ({"guided_json": "[]"}, "guided_json", "but must be a JSON schema, an object or the text of one"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex are both set"),
        ({"guided_regex": "a", "regex": "b"}, "guided_regex", "guided_regex and regex are both set"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "are both set; an answer can"),
        ({"guided_json": {}, "choice": ["a"]}, "choice", "guided_json and choice are both set"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
            "response_format and structured_outputs.regex are both set",
        ),
        ({"guided_json": UNIQUE}, "guided_json", f"guided_json: {UNSURE}"),
        ({"structured_outputs": {"json": UNIQUE}}, "structured_outputs.json", f"structured_outputs.json: {UNSURE}"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "is false, which tpctl cannot do; leave it out"),
        ({"skip_special_tokens": 1}, "skip_special_tokens", "is 1, which tpctl cannot do"),
        ({"use_beam_search": True}, "use_beam_search", "is true, which tpctl cannot do"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "is [1], which tpctl cannot do"),
        ({"top_k": -2}, "top_k", "top_k is -2, but must be"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21, but must be a whole number from 0 to 20"),
        ({"prompt_logprobs": 1, "stream": True}, "stream", "prompt_logprobs are set with stream"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "unknown field 'guided_decoding_backend'"),
    ],
)
def test_what_is_not_one_thing_is_refused(
    tokenizer: Tokenizer, asked: dict[str, Any], param: str | None, said: str
) -> None:
    with served(tokenizer) as (client, server):
        for path, body in ((CHAT, chat()), (TEXT, {"prompt": "a"})):
            found = error(client.post(path, json={**body, **asked}), 400)
            assert said in found.message and found.param == param
        assert not server.notes and not server.engines[0].requests


def test_a_schema_is_refused_by_the_name_that_it_was_given_by(tokenizer: Tokenizer) -> None:
    asked = {"type": "json_schema", "name": "a", "schema": UNIQUE, "strict": True}
    with served(tokenizer) as (client, _):
        found = error(client.post("/v1/responses", json={"input": "Hi", "text": {"format": asked}}), 400)
        assert 'leave out, or say "strict": false beside the schema' in found.message
        body = {"input": "Hi", "text": {"format": asked}, "regex": "a"}
        found = error(client.post("/v1/responses", json=body), 400)
        assert (found.param, found.message[:36]) == ("regex", "text.format and regex are both set; ")


def test_without_the_package_forms_are_refused_by_their_names(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    said = "this needs the llguidance package, which is not installed; pip install 'tpctl[guided]'"
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "maxProperties": 7}, "strict": True}
    with served(tokenizer) as (client, _):
        for path, body, name in (
            (CHAT, chat(guided_choice=["not", "had"]), "guided_choice"),
            (TEXT, {"prompt": "a", "structured_outputs": {"choice": ["not", "had"]}}, "structured_outputs.choice"),
            (TEXT, {"prompt": "a", "choice": ["not", "had"]}, "choice"),
            ("/v1/responses", {"input": "Hi", "text": {"format": form}}, "text.format"),
        ):
            found = error(client.post(path, json=body), 400)
            assert (found.param, found.message) == (name, f"{name}: {said}")


def test_what_asks_for_nothing_is_let_pass(tokenizer: Tokenizer) -> None:
    nothing = {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "metadata": {"a": "b"},
        "priority": 0,
        "service_tier": "auto",
        "skip_special_tokens": True,
        "store": True,
        "suffix": "",
        "top_k": -1,
        "use_beam_search": False,
        "user": "somebody",
    }
    plain = sampled(tokenizer, chat(seed=1))
    assert sampled(tokenizer, chat(seed=1, **nothing)) == plain and plain.top_k == 0


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (5, "metadata is 5, but must be a JSON object"),
        ([], "metadata is [], but must be a JSON object"),
        ({"a": 5}, 'metadata: "a" is 5, but must be a text'),
        ({"a": None}, 'metadata: "a" is null, but must be a text'),
        ({str(n): "" for n in range(17)}, "metadata has 17 pairs, but at most 16 are taken; leave some out"),
        ({"a" * 65: "b"}, "has 65 characters and its text 1, but at most 64 and 512 are taken; shorten them"),
        ({"a": "b" * 513}, 'metadata: "a" has 1 characters and its text 513, but at most 64 and 512 are taken'),
    ],
)
def test_metadata_has_the_limits_of_openai_s(tokenizer: Tokenizer, metadata: Any, said: str) -> None:
    schema = Draft202012Validator(METADATA)
    most = {f"{n:064}": "\u3042" * 512 for n in range(16)}
    assert schema.is_valid(most) and not schema.is_valid(metadata)
    with served(tokenizer) as (client, server):
        for path, body in ((CHAT, chat()), (TEXT, {"prompt": "a"}), (RESPONSES, {"input": "a"})):
            found = error(client.post(path, json={**body, "metadata": metadata}), 400)
            assert said in found.message and found.param == "metadata"
            assert client.post(path, json={**body, "metadata": None}).status_code == 200
            answer = client.post(path, json={**body, "metadata": most})
            assert answer.status_code == 200 and answer.json().get("metadata", most) == most
        assert not server.notes


def test_reasoning_effort_beside_what_is_no_object(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        body = chat(reasoning_effort="low", chat_template_kwargs=5)
        found = error(client.post(CHAT, json=body), 400)
        assert "chat_template_kwargs is 5, but must be a JSON object" in found.message and not server.notes


def test_prompt_logprobs_by_that_name(tokenizer: Tokenizer) -> None:
    told = {"logprob": -0.25, "rank": None}
    with served(tokenizer) as (client, server):
        a, b, c = tokenizer.encode("abc")
        expected = [None, {str(b): {**told, "decoded_token": "b"}}, {str(c): {**told, "decoded_token": "c"}}]
        answer = client.post(TEXT, json={"prompt": ["abc", [a, c]], "prompt_logprobs": 3}).json()
        Completion.model_validate(answer, strict=True)
        assert answer["choices"][0]["prompt_logprobs"] == expected
        assert answer["choices"][1]["prompt_logprobs"] == [None, {str(c): {**told, "decoded_token": "c"}}]
        assert answer["choices"][0]["logprobs"] is None
        assert server.engines[0].requests[0].sampling.prompt_logprobs == 3
        answer = client.post(CHAT, json=chat(prompt_logprobs=0)).json()
        ChatCompletion.model_validate(answer, strict=True)
        assert len(answer["prompt_logprobs"]) == len("[u]Hi[a]") and "prompt_logprobs" not in answer["choices"][0]
        both = {"prompt": "abc", "prompt_logprobs": 0, "logprobs": 2, "echo": True}
        answer = client.post(TEXT, json=both).json()["choices"][0]
        assert answer["logprobs"]["tokens"][:3] == ["a", "b", "c"] and answer["prompt_logprobs"] == expected
        assert server.engines[0].requests[-1].sampling.prompt_logprobs == 2


def test_an_echo_streams_with_log_probabilities(tokenizer: Tokenizer) -> None:
    """Joined, the chunks are the whole answer."""
    body = {"prompt": ["abc", "de"], "echo": True, "logprobs": 1, "max_tokens": 4, "n": 2, "seed": 1}
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    with served(tokenizer) as (client, _):
        whole = client.post(TEXT, json=body).json()["choices"]
        found: dict[int, dict[str, Any]] = {at: {"text": "", **{name: [] for name in names}} for at in range(4)}
        for chunk in events(client, TEXT, body):
            (choice,) = chunk["choices"]
            one = found[choice["index"]]
            one["text"] += choice["text"]
            for name in names if choice["logprobs"] is not None else ():
                one[name] += choice["logprobs"][name]
        assert found == {choice["index"]: {"text": choice["text"], **choice["logprobs"]} for choice in whole}
        assert whole[3]["text"] == "de<de>" and whole[3]["logprobs"]["token_logprobs"][:2] == [None, -0.25]


def test_models_are_told_when_requests_are_taken(tokenizer: Tokenizer) -> None:
    """Some clients wait for that (datatrove's)."""
    engine = FakeEngine(tokenizer, loading=True)
    with served(tokenizer, engine) as (client, _):
        assert error(client.get("/v1/models"), 503).code == "loading"
        assert error(client.get("/v1/models/demo"), 503).code == "loading"
        engine.ready.set()
        while client.get("/v1/models").status_code != 200:
            pass
        assert client.get("/v1/models/demo").json()["max_model_len"] == 512


def test_what_stands_in_for_a_tokenizer(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, template=template))
    with served(tokenizer) as (client, _):
        info = client.get("/tokenizer_info").json()
        assert info == {**tokenizer.special_tokens, "chat_template": template} and info["eos_token"] == "</s>"
        plain = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
        assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json()["prompt"] == "ab"


def test_what_is_null_is_not_there_wherever_it_stands(tokenizer: Tokenizer) -> None:
    """As clients send it that write down all fields they know."""
    schema = {"name": "a", "schema": SCHEMA, "strict": True}
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat(response_format={"type": "json_object", "json_schema": None, "later": None})),
        (CHAT, chat(response_format={"type": "json_schema", "json_schema": {**schema, "later": None}})),
        (CHAT, chat(response_format={"type": "text", "json_schema": None})),
        (CHAT, chat(stream=True, stream_options={"include_usage": None, "later": None})),
        (
            RESPONSES,
            {"input": "a", "text": {"format": {"type": "json_schema", **schema, "later": None}, "later": None}},
        ),
        (RESPONSES, {"input": "a", "reasoning": {"effort": None, "later": None}}),
    ]
    with served(tokenizer) as (client, _):
        described = client.get("/openapi.json").json()
        for path, body in asked:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            content = described["paths"][path]["post"]["requestBody"]["content"]
            Draft202012Validator(content["application/json"]["schema"]).validate(body)
    tool = {"type": "function", "later": None, "function": {"name": "f", "description": None, "later": None}}
    flat = {"type": "function", "function": None, "name": "f", "parameters": None, "strict": None, "later": None}
    for one in (tool, *chat_tools({"tools": [flat]})["tools"]):
        tools = read_tools({"tools": [one]})
        assert tools is not None and list(tools.schemas) == ["f"]
