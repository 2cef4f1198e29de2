"""What the server says of itself is what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from tests.unit.fake_client import write_tokenizer
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, TEXT, chat
from tpctl.client.openai_schemas import FIELDS, NOT_DONE, RESPONSES
from tpctl.client.tokenizer import Tokenizer

RIGHT: dict[str, dict[str, Any]] = {CHAT: chat(), TEXT: {"prompt": "abc"}, RESPONSES: {"input": "Hi"}}
RANGES = [
    (path, name, schema)
    for path, fields in FIELDS.items()
    for name, schema in fields.items()
    if schema.get("type") in ("integer", "number") and name not in ("best_of", "top_logprobs", "prompt_logprobs")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def described(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def asked(description: dict[str, Any], path: str) -> Draft202012Validator:
    """For the bodies of requests."""
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check(description: dict[str, Any], path: str, method: str, response: Any) -> None:
    """An answer is as it is described, and so is its status."""
    said = description["paths"][path][method]["responses"][str(response.status_code)]["content"]
    kind = response.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        schema = said[kind]["schema"]
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(response.json())
    else:
        assert kind in said


def test_answers_and_refusals_are_as_described(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        description = described(client)
        more: dict[str, list[dict[str, Any]]] = {
            CHAT: [{"logprobs": True, "top_logprobs": 2, "n": 2}, {"prompt_logprobs": 1}, {"stream": True}, {"x": 1}],
            TEXT: [{"logprobs": 1, "echo": True}, {"prompt_logprobs": 0}, {"stream": True}, {"n": 0}],
            RESPONSES: [{"max_output_tokens": 2}, {"stream": True}, {"model": "other"}],
        }
        for path, right in RIGHT.items():
            for fields in ({}, *more[path]):
                check(description, path, "post", client.post(path, json={**right, **fields}))
        for path, body in (
            ("/tokenize", {"prompt": "ab", "return_token_strs": True}),
            ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("/tokenize", {}),
            ("/detokenize", {"tokens": [5]}),
            ("/detokenize", {"tokens": "a"}),
        ):
            response = client.post(path, json=body)
            check(description, path, "post", response)
            assert asked(description, path).is_valid(body) is (response.status_code == 200)
        for path in ("/v1/models", "/health", "/metrics", "/tokenizer_info"):
            check(description, path, "get", client.get(path))
        check(description, "/v1/models/{name}", "get", client.get("/v1/models/alias"))
        assert not server.notes


@pytest.mark.parametrize(("path", "name", "schema"), RANGES)
def test_numbers_are_taken_up_to_their_bounds(
    tokenizer: Tokenizer, path: str, name: str, schema: dict[str, Any]
) -> None:
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    step = 1 if schema["type"] == "integer" else 1e-3
    with served(tokenizer, most=10_000) as (client, _):
        wanted = asked(described(client), path)

        def status(value: Any) -> int:
            body = {**RIGHT[path], "max_output_tokens" if path == RESPONSES else "max_tokens": 2, name: value}
            found: int = client.post(path, json=body).status_code
            assert wanted.is_valid(body) or found == 400
            return found

        if not name.startswith("max_"):
            assert status(least + step if "exclusiveMinimum" in schema else least) == 200
            assert most is None or name == "min_tokens" or status(most) == 200
            assert status(float(most if most and most < 1000 else least + step)) == 200 or name == "min_tokens"
        for wrong in (least - step, *(() if most is None else (most + step,)), True, "1", [1]):
            assert status(wrong) == 400
        if "exclusiveMinimum" in schema:
            assert status(least) == 400


def test_every_field_that_is_described_is_known_and_no_other(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        for path, fields in FIELDS.items():
            assert not {name for name, values in NOT_DONE.items() if not values} & fields.keys()
            for name in fields:
                said = client.post(path, json={**RIGHT[path], name: None}).json()
                assert "unknown field" not in json.dumps(said), (path, name)
                said = client.post(path, json={**RIGHT[path], name: {"no": "such"}}).text
                assert "unknown field '" + name not in said, (path, name)
            assert "unknown field 'colour'" in client.post(path, json={**RIGHT[path], "colour": 1}).text


def test_who_may_read_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with served(tokenizer, api_keys=("k",)) as (client, _):
        description = described(client)
        assert description["security"] == [{"key": []}]
        refused = client.get("/v1/models")
        assert refused.status_code == 401
        check(description, "/v1/models", "get", refused)
        for path in ("/health", "/metrics"):
            assert description["paths"][path]["get"]["security"] == []
            check(description, path, "get", client.get(path))
        wrong = client.delete("/v1/models", headers={"authorization": "Bearer k"})
        assert wrong.status_code == 405 and set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD"}
