"""What a server refuses, and how: in OpenAI's form, with a status, and without a traceback."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types.shared.error_object import ErrorObject
from starlette.testclient import TestClient

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, HELLO, TEXT, chat
from tpctl.cli.serve import ServerOptions
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import UsageError
from tpctl.wire.guide import of_schema


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def error(response: Any, status: int) -> ErrorObject:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    return ErrorObject.model_validate(response.json()["error"], strict=True)


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        (CHAT, {}, "messages", "the body has no messages"),
        (CHAT, chat(messages=[]), "messages", "messages is [], but must be a list of"),
        (CHAT, chat(messages=HELLO * 2049), "messages", "messages is a list of 2049, but at most 2048 are taken"),
        ("/tokenize", {"messages": HELLO * 2049}, "messages", "messages is a list of 2049, but at most 2048 are"),
        (CHAT, chat(messages=[{"role": "user", "content": "forbidden"}]), None, "refuses these messages: not that"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages",
            "tpctl takes text only",
        ),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}]),
            "messages",
            'message 1 has a part with the field "colour", which the model\'s chat template does not read; leave',
        ),
        (
            "/tokenize",
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}]},
            "messages",
            'message 2 has a part with the field "colour"',
        ),
        (CHAT, chat(**{"x" * 5000: 1}), "x" * 79 + "…", f"unknown field '{'x' * 38}… in the body of a request to"),
        (
            CHAT,
            chat(chat_template_kwargs={"x" * 5000: 1}),
            "chat_template_kwargs",
            f"chat_template_kwargs has '{'x' * 38}…, which the chat template does not read",
        ),
        ("/tokenize", {"prompt": "a", "x" * 5000: 1}, "x" * 79 + "…", f"unknown field '{'x' * 38}… in the body"),
        ("/v1/responses", {"input": "a", "text": {"x" * 5000: 1}}, "text", f"unknown field '{'x' * 38}… in text"),
        (CHAT, chat(colour=1), "colour", "unknown field 'colour' in the body of a request to /v1/chat/completions"),
        (CHAT, chat(temperature=9e9), "temperature", "temperature is 9000000000.0, but must be"),
        (CHAT, chat(temperature="hot"), "temperature", 'temperature is "hot", but must be a number'),
        (CHAT, chat(max_tokens=0), "max_tokens", "max_tokens is 0, but must be at least 1"),
        (CHAT, chat(max_tokens=600), "max_tokens", "is 600: 608 in all, but prompt and answer together may have 512"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 600}]), "messages", "has 606 tokens, but prompt and"),
        (CHAT, chat(n=0), "n", "n is 0, but must be a whole number from 1 to 128"),
        (
            CHAT,
            chat(max_completion_tokens=600),
            "max_completion_tokens",
            "and max_completion_tokens is 600: 608 in all",
        ),
        (CHAT, chat(max_completion_tokens=0), "max_completion_tokens", "max_completion_tokens is 0, but must be at"),
        (
            CHAT,
            chat(reasoning_effort="low"),
            "reasoning_effort",
            "reasoning_effort is given, but the model's chat template reads no reasoning_effort; leave it out",
        ),
        (CHAT, chat(top_logprobs=3), "top_logprobs", "top_logprobs is 3, but logprobs is not true"),
        (CHAT, chat(stream="yes"), "stream", 'stream is "yes", but must be true or false'),
        (CHAT, chat(stream_options={}), "stream_options", "stream_options is {}, but stream is not true"),
        (CHAT, chat(stream=True, stream_options={"a": 1}), "stream_options", "unknown field 'a' in stream_options"),
        (
            CHAT,
            chat(stream=True, stream_options={"include_obfuscation": True}),
            "include_obfuscation",
            "include_obfuscation is true, which tpctl cannot do",
        ),
        (
            "/v1/responses",
            {"input": "a", "stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            'stream_options is {"include_obfuscation": true}, which tpctl cannot do',
        ),
        (CHAT, chat(tools=[{"type": "function"}]), "tools", "tool 1: function is null"),
        (
            CHAT,
            chat(response_format={"type": "json"}),
            "response_format",
            'response_format: type is "json"',
        ),
        (
            CHAT,
            chat(response_format=of_schema({"properties": {"a": {"type": "array", "uniqueItems": True}}})),
            "response_format",
            'response_format: uniqueItems cannot be enforced; leave out, or say "strict": false beside the schema '
            '(at "#/properties/a")',
        ),
        (
            TEXT,
            {"prompt": "a", "guided_json": {"type": "string", "maxlength": 3}},
            "guided_json",
            'guided_json: "maxlength" is no keyword and would ask for nothing; is maxLength meant? (at "#")',
        ),
        (CHAT, chat(regex="(a"), "regex", "regex: "),
        (CHAT, chat(regex="a", choice=["a"]), "choice", "regex"),
        (CHAT, chat(stop=[""]), "stop", 'stop is [""], but must be a string or a list of strings, none empty'),
        (
            CHAT,
            chat(stop_token_ids=[10**6]),
            "stop_token_ids",
            "holds token 1000000, but the model",
        ),
        (CHAT, chat(stop=["a"] * 17), "stop", "stop has 17 texts, but at most 16 are taken"),
        (
            CHAT,
            chat(stop=["a" * 4000, "b" * 97]),
            "stop",
            "stop has 4097 characters in all, but at most 4096 are taken",
        ),
        (TEXT, {"prompt": "a", "stop": "a" * 5000}, "stop", "stop has 5000 characters in all, but at most 4096"),
        (
            TEXT,
            {"prompt": "a", "logit_bias": {str(n): 1 for n in range(1025)}},
            "logit_bias",
            "logit_bias has 1025 tokens, but at most 1024 are taken; leave some out",
        ),
        (TEXT, {"prompt": "a", "stop_token_ids": [1] * 257}, "stop_token_ids", "has 257 tokens, but at most 256 are"),
        (CHAT, chat(logit_bias={"9999": 1}), "logit_bias", "logit_bias holds token 9999, but the model knows ids 0 to"),
        (
            CHAT,
            chat(logit_bias={"5": 101}),
            "logit_bias",
            "logit_bias: that of token 5 is 101.0, but must be from",
        ),
        (
            TEXT,
            {"prompt": "a", "logit_bias": {"5": -1e3}},
            "logit_bias",
            "that of token 5 is -1000.0, but must be",
        ),
        (CHAT, chat(chat_template_kwargs={"colour": 1}), "chat_template_kwargs", "has 'colour', which"),
        (CHAT, chat(logprobs=3), "logprobs", "logprobs is 3, but must be true or false"),
        (TEXT, {"prompt": ""}, "prompt", 'prompt is "", but must be a text or a list of token ids'),
        (TEXT, {"prompt": []}, "prompt", "prompt has 0 prompts"),
        (TEXT, {"prompt": [1, "a"]}, "prompt", 'prompt has "a" at place 1, but begins with a token id'),
        (TEXT, {"prompt": [[1, 2, 1.5]]}, "prompt", "prompt has 1.5 at place 2, but begins with a token id"),
        (TEXT, {"prompt": [True]}, "prompt", "prompt is true, but must be a text or a list of token ids"),
        (TEXT, {"prompt": [[]]}, "prompt", "prompt is [], but must be"),
        (TEXT, {"prompt": [-1]}, "prompt", "prompt holds token -1, but the model knows ids 0 to"),
        (TEXT, {"prompt": [10**30]}, "prompt", "prompt holds token 1000000000000000000000000000000, but"),
        (TEXT, {"prompt": ["a"] * 3000}, "prompt", "prompt has 3000 prompts, but must have from 1 to 2048"),
        (TEXT, {"prompt": "a", "max_tokens": 0, "min_tokens": 2}, "min_tokens", "min_tokens is set, and max_tokens is"),
        (TEXT, {"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens is -1, but must be at least 0"),
        (
            TEXT,
            {"prompt": "a", "max_completion_tokens": -2},
            "max_completion_tokens",
            "max_completion_tokens is -2, but must be at least 0",
        ),
        (CHAT, chat(max_tokens=-1), "max_tokens", "max_tokens is -1, but must be at least 1"),
        (TEXT, {"prompt": "a", "max_tokens": False}, "max_tokens", "max_tokens is false"),
        (CHAT, chat(verbosity="low"), "verbosity", 'verbosity is "low", which tpctl cannot do'),
        (CHAT, chat(web_search_options={}), "web_search_options", "which tpctl cannot do"),
        (TEXT, {"prompt": "a", "verbosity": "medium"}, "verbosity", "unknown field 'verbosity'"),
        (TEXT, {"prompt": "a", "best_of": 4}, "best_of", "best_of is 4 with n 1, which tpctl cannot do"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", 'suffix is "b", which tpctl cannot do'),
        ("/tokenize", {"prompt": 1}, "prompt", "prompt is 1, but must be a text"),
        ("/tokenize", {"prompt": "a", "b": 1}, "b", "unknown field 'b' in the body of a request to /tokenize"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", 'tokens is ["a"], but must be a list of token ids'),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "tokens holds token 1000000, but the model knows"),
    ],
)
def test_a_body_that_cannot_be_had(tokenizer: Tokenizer, path: str, body: Any, param: str | None, said: str) -> None:
    with served(tokenizer) as (client, server):
        found = error(client.post(path, json=body), 400)
        assert said in found.message and found.type == "invalid_request_error" and found.param == param
        assert not server.notes and not server.engines[0].open


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the body is empty, but must be a JSON object"),
        (b" \r\n", "the body is empty, but must be a JSON object"),
        (b"{", "the body is not valid JSON"),
        (b"[1]", "the body is [1], but must be a JSON object"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON: Invalid UTF-8"),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON: it holds half of a surrogate pair"),
        (b'{"prompt": "\\uD83D..."}', "the body is not valid JSON: it holds half of a surrogate pair"),
        (b'{"prompt": "\\ud83d\\ude00', "the body is not valid JSON: Input data was truncated"),
        (b'{"prompt": "\\ud800 and what follows, which is long"}', "unexpected end of escaped utf-16 surrogate pair"),
        (b'{"a":' * 10000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "more than 64 digits in a row"),
        (b'{"prompt": NaN}', "the body is not valid JSON"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "the body begins with a byte order mark (BOM); send it in UTF-8 without one"),
        ('{"prompt": "a"}'.encode("utf-16"), "the body begins with a byte order mark (BOM)"),
        (b'{"temperature": -1e999}', "temperature is -1e999, but numbers are taken up to 1.8e308"),
        (b'{"a": 1e5, "b": [{"c": 1e400}]}', "b holds 1e400, but numbers are taken up to 1.8e308"),
        (b'{"a": 1e400, "b": "' + b"x" * 70_000 + b'"}', "the body is not valid JSON: Number out of range"),
    ],
)
def test_bytes_that_are_no_body(tokenizer: Tokenizer, raw: bytes, said: str) -> None:
    with served(tokenizer) as (client, server):
        assert said in error(client.post(TEXT, content=raw), 400).message
        assert not server.notes


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, deflate"])
def test_a_packed_body(tokenizer: Tokenizer, encoding: str) -> None:
    with served(tokenizer) as (client, _):
        packed = client.post(TEXT, content=gzip.compress(b'{"prompt": "a"}'), headers={"content-encoding": encoding})
        said = f"the body is packed (Content-Encoding: {encoding}), and this server unpacks none; send it as it is"
        found = error(packed, 415)
        assert (found.message, found.code, found.type) == (said, "unsupported_encoding", "invalid_request_error")
        assert packed.headers["accept-encoding"] == "identity"
        plain = client.post(TEXT, json={"prompt": "a"}, headers={"content-encoding": "identity"})
        assert plain.status_code == 200


def test_a_long_path_is_not_repeated_whole(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        said = error(client.get("/" + "x" * 10_000), 404).message
        assert said == "/" + "x" * 198 + "… is not known here"


def test_paths_methods_models_and_keys(tokenizer: Tokenizer) -> None:
    with served(tokenizer, api_keys=("secret",)) as (client, _):
        for path in ("/", "/health", "/metrics", "/openapi.json"):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                assert client.get(path, headers=headers).status_code == 200
        for path in ("/v1/models", "/v1/models/demo", "/tokenizer_info", "/nowhere", "/metrics/"):
            assert client.get(path).status_code == 401
        missing = client.get("/v1/models")
        assert error(missing, 401).code == "invalid_api_key" and missing.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer wrong", "Basic secret", "secret", "Bearer"):
            found = error(client.post(CHAT, json=chat(), headers={"authorization": wrong}), 401)
            assert "is none that" in found.message and "secret" not in found.message
        client.headers["authorization"] = "Bearer secret"
        assert client.post(CHAT, json=chat()).status_code == 200
        assert "/v1/embeddings is not known here" in error(client.post("/v1/embeddings", json={}), 404).message
        assert "/v1/models/ is not known here" in error(client.get("/v1/models/"), 404).message
        assert "is not for GET" in error(client.get(CHAT), 405).message
        unknown = error(client.post(CHAT, json=chat(model="gpt-4")), 404)
        assert (unknown.code, unknown.param) == ("model_not_found", "model")
        assert unknown.message == 'the model "gpt-4" does not exist here; this server has demo or alias'


def test_any_of_several_keys_will_do(tokenizer: Tokenizer) -> None:
    with served(tokenizer, api_keys=("first", "second")) as (client, _):
        for key, status in (("first", 200), ("second", 200), ("third", 401), ("firstsecond", 401)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status


@pytest.mark.parametrize(
    ("options", "said", "found"),
    [
        ([], None, ()),
        ([], "k", ("k",)),
        (["a", "b"], "k", ("a", "b")),
        ([], "", "TPCTL_API_KEY is empty; give it a value, or unset it"),
        ([], " k", "the API key (TPCTL_API_KEY) must be of printable ASCII"),
        (["a", "ä"], None, "the API key (--api-key) must be of printable ASCII"),
    ],
)
def test_where_keys_come_from(
    options: list[str], said: str | None, found: tuple[str, ...] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty variable would leave the server open, and whoever set it believe that it is not."""
    monkeypatch.delenv("TPCTL_API_KEY", raising=False)
    if said is not None:
        monkeypatch.setenv("TPCTL_API_KEY", said)
    given = ServerOptions(api_key=options or None)
    if isinstance(found, tuple):
        assert given.keys() == found
    else:
        with pytest.raises(UsageError, match=re.escape(found)):
            given.keys()


def test_a_body_that_is_too_long(tokenizer: Tokenizer) -> None:
    with served(tokenizer, max_body=1000) as (client, _):
        found = error(client.post(CHAT, json=chat(user="x" * 1500)), 413)
        assert "but at most 1.0 kB are read (--max-body)" in found.message and found.code == "body_too_large"
        assert error(client.post(CHAT, content=iter([b"x" * 900] * 3)), 413).code == "body_too_large"
        assert error(client.post(CHAT, json=chat(user="x" * 50000)), 413).code == "body_too_large"
        assert client.post(CHAT, json=chat()).status_code == 200


def test_a_model_without_a_template_has_completions_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, template=None))
    with served(tokenizer) as (client, _):
        assert "has no chat template" in error(client.post(CHAT, json=chat()), 400).message
        assert client.post(TEXT, json={"prompt": "a"}).status_code == 200


def test_a_form_for_which_an_engine_has_no_time_may_be_asked_for_again(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        found = client.post(TEXT, json={"prompt": "a", "regex": "slow"})
        assert error(found, 503).code == "busy" and found.headers["retry-after"] == "1"
        assert not server.notes


@pytest.mark.parametrize("characters", [600, 100_000])
def test_what_is_too_long_is_said_with_its_code(tokenizer: Tokenizer, characters: int) -> None:
    """Also of what is so long that it is not tokenised."""
    text = "x" * characters
    asked: list[tuple[str, dict[str, Any], str]] = [
        (CHAT, chat(messages=[{"role": "user", "content": text}]), "messages"),
        (TEXT, {"prompt": text}, "prompt"),
        ("/v1/responses", {"input": text}, "input"),
    ]
    with served(tokenizer) as (client, _):
        for path, body, param in asked:
            found = error(client.post(path, json=body), 400)
            assert (found.code, found.param) == ("context_length_exceeded", param)
            assert "tokens" in found.message


def test_a_full_queue(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with served(tokenizer, engine, most=2) as (client, server):
        found = error(client.post(CHAT, json=chat(n=3)), 400)  # what no wait would change
        assert "asks for 3 answers at once, and this server takes 2, with those that wait" in found.message
        assert client.post(CHAT, json=chat(n=2)).status_code == 200
        assert server.pool is not None and server.pool.under_way == 0


def test_what_comes_before_the_engine_is_ready(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, loading=True)
    with served(tokenizer, engine) as (client, _):
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert error(client.post(CHAT, json=chat()), 503).code == "loading"
        engine.ready.set()
        while client.get("/health").status_code != 200:
            pass
        assert client.post(CHAT, json=chat()).status_code == 200


def test_a_request_that_the_engine_fails_at(tokenizer: Tokenizer) -> None:
    """Its client is told, and whoever runs the server."""
    with served(tokenizer) as (client, server):
        found = error(client.post(TEXT, json={"prompt": "break"}), 500)
        assert (found.type, found.message) == ("server_error", "the scores are not finite")
        (said,) = server.notes
        assert re.fullmatch(rf"tpctl serve: {TEXT} cmpl-\w+ after 0 tokens failed: the scores are not finite", said)
        assert client.post(TEXT, json={"prompt": "break"}).headers["x-request-id"] in server.notes.pop()
        assert error(client.post(TEXT, json={"prompt": "break", "stream": True}), 500).type == "server_error"
        assert error(client.post(TEXT, json={"prompt": ["long enough", "break"]}), 500).type == "server_error"
        assert client.post(TEXT, json={"prompt": "a"}).status_code == 200
        assert len(server.notes) == 3
        lines = client.get("/metrics").text.splitlines()
        ends = {"stop": 1, "length": 0, "tool_calls": 0, "abort": 0, "error": 5}
        assert all(f'tpctl_answers_total{{finish_reason="{reason}"}} {n}.0' in lines for reason, n in ends.items())


def test_a_form_that_the_model_has_no_text_for_is_the_request_s_fault(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        for stream in (False, True):
            found = error(client.post(TEXT, json={"prompt": "a", "regex": "stuck", "stream": stream}), 400)
            assert found.param == "regex" and "has no text that could follow" in found.message


def test_an_engine_that_ends_ends_every_request(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with served(tokenizer, engine) as (client, _):
        engine.die()
        for _ in range(2):
            found = error(client.post(CHAT, json=chat()), 500)
            assert (found.type, found.code) == ("server_error", "engine_ended")
            assert found.message == "the engine has ended: rank 1 was killed (SIGKILL)"
        assert client.get("/health").json() == {"status": "failed"}


def test_a_bug_is_told_to_whoever_runs_the_server(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpctl.serve.endpoints import Endpoints

    monkeypatch.setattr(Endpoints, "model", lambda self, body: 1 / 0)
    with served(tokenizer) as (client, server):
        found = error(client.post(CHAT, json=chat()), 500)
        said, number = found.message.rsplit(" ", 1)
        assert said == "the server failed at this request; its log says how, of request"
        first, *trace, last = server.notes[0].split("\n")
        assert first == f"tpctl serve: request {number}, to {CHAT}, failed:"
        assert last == "ZeroDivisionError: division by zero" and any("1 / 0" in line for line in trace)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_bug_in_an_answer_is_told_as_well(
    tokenizer: Tokenizer, bare: bool, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = TextStream.add if bare else TextStream.push

    def broken(self: TextStream, new: Any) -> Any:
        if len(self.token_ids) == 2:
            raise ValueError("a bug")
        return taken(self, new)

    monkeypatch.setattr(TextStream, taken.__name__, broken)
    with served(tokenizer) as (client, server):
        answer = client.post(TEXT, json={"prompt": "abc", "stream": stream, "logprobs": None if bare else 0})
        if stream:
            *_, last, rest = answer.text.split("\n\n")
            assert rest == "" and "[DONE]" not in answer.text
            said = json.loads(last.removeprefix("data: "))["error"]["message"]
        else:
            said = error(answer, 500).message
        (note,) = server.notes
        assert note.startswith(f"tpctl serve: request {said.split()[-1]}, to {TEXT}, failed:\nTraceback")
        assert note.endswith("ValueError: a bug") and server.pool is not None and not server.pool.under_way


def test_a_text_that_is_no_conversation_costs_nobody_else(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        assert isinstance(client, TestClient)
        for content in ("\x00", "\u202e", "a" * 100):
            said = {"role": "user", "content": content}
            assert client.post(CHAT, json=chat(messages=[*HELLO, said])).status_code == 200
