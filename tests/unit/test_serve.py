"""The server's endpoints over a fake engine: answers are read by OpenAI's own types, and so are refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tpctl.client.batch import CHOICES_APART
from tpctl.client.openai_answers import completed, text_logprobs
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.generation import Generation

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
ANSWER = "<[u]Hi[a]>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, **more}


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a stream, which ends as it should."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *found, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(one.removeprefix("data: ")) for one in found]


def test_a_chat_is_answered(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        response = client.post(CHAT, json=chat())
        assert response.status_code == 200 and "date" in response.headers
        answer = ChatCompletion.model_validate(response.json(), strict=True)
        assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
        assert answer.model == "demo" and answer.usage is not None
        assert answer.usage.prompt_tokens == len("[u]Hi[a]") and answer.usage.completion_tokens == len(ANSWER) + 1
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        sampling = server.engines[0].requests[0].sampling
        assert sampling.temperature == 1.0 and sampling.max_tokens == 512 - len("[u]Hi[a]")
        assert not server.notes


def test_a_chat_streams(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        chunks = [ChatCompletionChunk.model_validate(one, strict=True) for one in events(client, CHAT, chat())]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)

        *chunks, last = events(client, CHAT, chat(stream_options={"include_usage": True}))
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(ANSWER) + 1
        assert all(chunk["usage"] is None for chunk in chunks)
        every = events(client, CHAT, chat(stream_options={"continuous_usage_stats": True}))
        assert every[-2]["usage"] == every[-1]["usage"] and every[-1]["choices"] == []
        assert all(chunk["usage"]["prompt_tokens"] == len("[u]Hi[a]") for chunk in every)


@pytest.mark.parametrize("body", [chat(), {"prompt": "ab"}, {"prompt": ["ab", "c"]}], ids=["chat", "text", "texts"])
@pytest.mark.parametrize("option", ["include_usage", "continuous_usage_stats"])
def test_a_stream_ends_with_the_usage_of_the_whole_answer(
    tokenizer: Tokenizer, body: dict[str, Any], option: str
) -> None:
    """Whatever else is asked for; each chunk of a continuous one has what there is so far."""
    is_chat = "messages" in body
    of_texts = [{"echo": True}, {"echo": True, "logprobs": 1}, {"max_tokens": 0}, {"max_tokens": 0, "echo": True}]
    more = [{}, {"n": 2}, {"logprobs": True if is_chat else 1}, *([] if is_chat else of_texts)]
    with served(tokenizer) as (client, server):
        for asked in ({**body, **one} for one in more):
            path = CHAT if is_chat else TEXT
            expected = client.post(path, json=asked).json()["usage"]
            *chunks, last = events(
                client, path, {**asked, "stream_options": {option: True, "include_obfuscation": False}}
            )
            assert last["choices"] == [] and last["usage"] == expected, asked
            if option == "include_usage":
                assert all(chunk["usage"] is None for chunk in chunks)
                continue
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts) and counts[-1] == expected["completion_tokens"], asked
            assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {expected["prompt_tokens"]}
        assert not server.notes


@pytest.mark.parametrize("interval", [2, 5, 1000])
def test_tokens_are_told_together(tokenizer: Tokenizer, interval: int) -> None:
    """What is left at the end; several answers and log-probabilities stay what they are."""

    def told(chunks: list[Any]) -> dict[int, str]:
        texts: dict[int, str] = {}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        return texts

    with served(tokenizer, interval=interval) as (client, _):
        chunks = events(client, CHAT, chat())
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(texts) == ANSWER
        assert len(texts) <= 4 + len(ANSWER) // interval  # role, the first token, what is left, the end
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
        assert told(events(client, CHAT, chat(n=3))) == dict.fromkeys(range(3), ANSWER)
        each = [
            token["token"]
            for chunk in events(client, CHAT, chat(logprobs=True))
            for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert "".join(each[: len(ANSWER)]) == ANSWER


def test_whole_answers_wake_nobody_before_they_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[int] = []
    wake = Generation._wake
    monkeypatch.setattr(Generation, "_wake", lambda self: (woken.append(self._left), wake(self))[1])
    with served(tokenizer) as (client, _):
        answer = client.post(CHAT, json=chat(n=2)).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == [ANSWER] * 2
    assert woken == [0]


def test_several_answers_differ_in_their_seeds(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        answer = client.post(CHAT, json=chat(n=3, seed=-1)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] == 3 * (len(ANSWER) + 1)
        seeds = [request.sampling.seed for request in server.engines[0].requests]
        assert seeds == [(2**63 - 1 + at * CHOICES_APART) % 2**63 for at in range(3)]
        texts = {0: "", 1: "", 2: ""}
        for chunk in events(client, CHAT, chat(n=3)):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        assert set(texts.values()) == {ANSWER}


def test_every_field_reaches_the_engine(tokenizer: Tokenizer) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5],
    }
    with served(tokenizer) as (client, server):
        of_no_effect = {"user": "u", "verbosity": "medium", "prediction": {"type": "content", "content": "<[u]"}}
        response = client.post(CHAT, json=chat(**asked, logit_bias={"7": -3}, max_completion_tokens=9, **of_no_effect))
        assert response.status_code == 200
        assert response.json()["choices"][0]["finish_reason"] == "length"
        sampling = server.engines[0].requests[0].sampling
        expected = {**asked, "stop_token_ids": (5,), "max_tokens": 9, "logit_bias": ((7, -3.0),)}
        assert {name: getattr(sampling, name) for name in expected} == expected


def test_a_stop_text_ends_an_answer_and_the_engines_request(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, say=lambda *_: ANSWER + "x" * 20_000, max_model_len=30_000)
    with served(tokenizer, engine) as (client, server):
        answer = client.post(CHAT, json=chat(stop="i[")).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("<[u]H", "stop")
        deltas = [one["choices"][0]["delta"] for one in events(client, CHAT, chat(stop=["i["]))]
        assert "".join(delta.get("content", "") for delta in deltas) == "<[u]H"
        while engine.open:
            assert server.pool is not None and not server.pool.under_way
        assert len(engine.aborted) == 2


def test_log_probabilities_are_told(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        answer = ChatCompletion.model_validate(client.post(CHAT, json=chat(logprobs=True, top_logprobs=2)).json())
        content = answer.choices[0].logprobs.content
        assert "".join(one.token for one in content) == ANSWER + "</s>"
        assert content[0].logprob == -0.5 and [top.logprob for top in content[0].top_logprobs] == [-0.5, -2.0]
        chunks = events(client, CHAT, chat(logprobs=True))
        told = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert "".join(one["token"] for one in told) == ANSWER + "</s>"

        body = {"prompt": "ab", "logprobs": 1}
        whole = Completion.model_validate(client.post(TEXT, json=body).json(), strict=True).choices[0].logprobs
        assert whole.tokens == [*"<ab>", "</s>"] and whole.text_offset == [0, 1, 2, 3, 4]
        none = client.post(TEXT, json={**body, "logprobs": 0}).json()["choices"][0]["logprobs"]
        assert none["top_logprobs"][0] == {"<": -0.5}  # the token itself is always told
        found: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
        for chunk in events(client, TEXT, body):
            for name in found:
                found[name] += (chunk["choices"][0]["logprobs"] or {name: []})[name]
        assert found == {"tokens": whole.tokens, "text_offset": whole.text_offset}


def test_texts_and_tokens_are_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cd")
    with served(tokenizer) as (client, server):
        for prompt, texts in (
            ("ab", ["<ab>"]),
            (ids, ["<cd>"]),
            (["ab", "x"], ["<ab>", "<x>"]),
            ([ids, ids], ["<cd>", "<cd>"]),
            (["ab", ids], ["<ab>", "<cd>"]),
        ):
            answer = Completion.model_validate(client.post(TEXT, json={"prompt": prompt}).json(), strict=True)
            assert [choice.text for choice in answer.choices] == texts
            assert answer.object == "text_completion" and answer.choices[-1].finish_reason == "stop"
        assert server.engines[0].requests[0].sampling.max_tokens == 16
        answer = client.post(TEXT, json={"prompt": ["ab", ids], "n": 2, "echo": True, "max_tokens": 2}).json()
        assert [choice["text"] for choice in answer["choices"]] == ["ab<a", "ab<a", "cd<c", "cd<c"]
        texts = {0: "", 1: ""}
        for chunk in events(client, TEXT, {"prompt": ["ab", "cd"], "echo": True}):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == {0: "ab<ab>", 1: "cd<cd>"}


def test_an_echo_has_the_prompt_s_log_probabilities(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = client.post(TEXT, json=body).json()["choices"][0]
        assert answer["text"] == "abc<" and answer["logprobs"]["tokens"] == ["a", "b", "c", "<"]
        assert answer["logprobs"]["token_logprobs"] == [None, -0.25, -0.25, -0.5]  # of the first nothing can be said
        assert answer["logprobs"]["text_offset"] == [0, 1, 2, 3]
        assert server.engines[0].requests[0].sampling.prompt_logprobs == 1


def test_a_prompt_s_log_probabilities_are_computed_once_for_all_of_its_answers(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, server):
        body = {"prompt": ["abc", "de"], "n": 3, "prompt_logprobs": 1, "max_tokens": 1}
        choices = client.post(TEXT, json=body).json()["choices"]
        assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 3, 3, 2, 2, 2]
        asked = [request.sampling.prompt_logprobs for request in server.engines[0].requests]
        assert asked == [1, None, None, 1, None, None]


@pytest.mark.parametrize("echo", [True, False])
def test_no_tokens_are_told_where_none_are_to_follow(tokenizer: Tokenizer, echo: bool) -> None:
    """The way to score a prompt: the engine's one token is no part of the answer."""
    with served(tokenizer) as (client, server):
        body = {"prompt": ["abc", "d"], "echo": echo, "logprobs": 1, "max_tokens": 0}
        whole = Completion.construct(
            **client.post(TEXT, json=body).json()
        )  # of a prompt's first token nothing is known
        assert [choice.text for choice in whole.choices] == (["abc", "d"] if echo else ["", ""])
        assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == (["a", "b", "c"] if echo else [])
        assert logprobs.token_logprobs == ([None, -0.25, -0.25] if echo else [])
        usage = {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
        assert whole.usage is not None and usage.items() <= whole.usage.model_dump().items()
        assert server.engines[0].requests[0].sampling.max_tokens == 1
        chunks = events(client, TEXT, {**body, "stream_options": {"include_usage": True}})
        texts, tokens = {0: "", 1: ""}, []
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
            tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
        assert list(texts.values()) == [choice.text for choice in whole.choices]
        assert sorted(tokens) == (["a", "b", "c", "d"] if echo else [])
        assert usage.items() <= chunks[-1]["usage"].items()
        plain = client.post(TEXT, json={"prompt": "abc", "echo": echo, "max_tokens": 0}).json()["choices"][0]
        assert (plain["text"], plain["logprobs"]) == ("abc" if echo else "", None)


def test_each_likeliest_token_of_a_text_has_a_name() -> None:
    """Parts of characters have no text, and others the same."""
    one = {"id": 7, "token": "", "logprob": -3.0}
    top = [{"id": id, "token": text, "logprob": -0.5 * id} for id, text in ((1, "a"), (2, ""), (3, "a"), (4, ""))]
    (found,) = text_logprobs([{**one, "top": top}], [0])["top_logprobs"]
    assert found == {"a": -0.5, "token_id:2": -1.0, "token_id:3": -1.5, "token_id:4": -2.0, "": -3.0}
    (found,) = text_logprobs([{**top[2], "top": top}], [0])["top_logprobs"]
    assert found == {"token_id:1": -0.5, "token_id:2": -1.0, "a": -1.5, "token_id:4": -2.0}


def test_tokens_that_a_text_leaves_out_take_no_room_in_it() -> None:
    tokens = [
        {"id": id, "token": token, "logprob": -1.0, "top": []} for id, token in enumerate(["a", "</s>", "bc", "d"])
    ]
    for text, places in (("abcd", [0, 1, 1, 3]), ("ab", [0, 1, 1, 3]), ("abc", [0, 1, 1, 3])):
        found = completed(0, {"text": text, "finish_reason": "stop", "logprobs": tokens})
        assert found["logprobs"]["text_offset"] == places


def test_a_form_reaches_the_engine(tokenizer: Tokenizer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}}
    with served(tokenizer) as (client, server):
        assert client.post(CHAT, json=chat(response_format=schema)).status_code == 200
        assert client.post(TEXT, json={"prompt": "a", "choice": ["x", "y"]}).status_code == 200
        form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
        told = client.post("/v1/responses", json={"input": "a", "text": {"format": form}})
        assert told.status_code == 200 and told.json()["text"]["format"] == form
        first, second, third = (request.sampling for request in server.engines[0].requests)
        assert first.response_format == third.response_format == schema and second.choice == ("x", "y")


def test_thoughts_stand_apart(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if false %}</think>{% endif %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, template=template, added=("<think>", "</think>")))
    with served(tokenizer, FakeEngine(tokenizer, say=lambda *_: "<think>hm</think>So")) as (client, _):
        message = client.post(CHAT, json=chat()).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "So")
        deltas = [chunk["choices"][0]["delta"] for chunk in events(client, CHAT, chat())]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "So"


def test_what_is_served_is_told(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        models = client.get("/v1/models").json()
        assert [Model.model_validate(one, strict=True).id for one in models["data"]] == ["demo", "alias"]
        assert models["data"][0]["max_model_len"] == 512
        assert client.get("/v1/models/alias").json() == models["data"][1]
        assert client.post(CHAT, json=chat(model="alias")).json()["model"] == "alias"
        assert client.get("/health").json() == {"status": "ready"}


def test_tokens_and_back(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        found = client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
        assert found == {"count": 2, "max_model_len": 512, "tokens": tokenizer.encode("ab"), "token_strs": ["a", "b"]}
        assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "ab"}
        for body, has in (({"prompt": "a", "messages": HELLO}, "both a"), ({}, "neither a")):
            refused = client.post("/tokenize", json=body).json()["error"]
            assert f"the body has {has} prompt" in refused["message"] and refused["param"] == "prompt"
        chatted = client.post("/tokenize", json={"messages": HELLO}).json()
        assert chatted["tokens"] == tokenizer.encode("[u]Hi[a]")


def test_counters_are_told(tokenizer: Tokenizer) -> None:
    with served(tokenizer) as (client, _):
        client.post(CHAT, json=chat())
        client.post(CHAT, json={})
        client.get("/nowhere")
        for name in ("demo", "alias", "of/another", ""):
            client.get(f"/v1/models/{name}")
        lines = client.get("/metrics").text.splitlines()
        assert 'tpctl_http_requests_total{path="/v1/chat/completions",status="200"} 1.0' in lines
        assert 'tpctl_http_requests_total{path="/v1/chat/completions",status="400"} 1.0' in lines
        assert 'tpctl_http_requests_total{path="other",status="404"} 2.0' in lines
        assert 'tpctl_http_requests_total{path="/v1/models/{name}",status="200"} 2.0' in lines
        assert 'tpctl_http_requests_total{path="/v1/models/{name}",status="404"} 1.0' in lines
        assert f"tpctl_generated_tokens_total {len(ANSWER) + 1}.0" in lines
        assert "tpctl_time_to_first_token_seconds_count 1.0" in lines
        assert f"tpctl_inter_token_seconds_count {len(ANSWER)}.0" in lines
        assert 'tpctl_kv_cache_usage_ratio{engine="0"} 0.6' in lines
        assert 'tpctl_preemptions_total{engine="0"} 3.0' in lines
        assert 'tpctl_held_steps_total{engine="0"} 2.0' in lines


def test_answers_are_timed_by_path(tokenizer: Tokenizer) -> None:
    """A look at /health every second is no answer of a model's, nor is a refusal, nor a path that somebody tries."""
    with served(tokenizer) as (client, _):
        for _ in range(3):
            assert client.post(CHAT, json=chat()).status_code == 200
            assert client.post(TEXT, json={"prompt": 5}).status_code == 400
            client.get("/nowhere")
        client.get("/health")  # and the fixture's
        lines = client.get("/metrics").text.splitlines()
        name = "tpctl_http_request_seconds"
        assert [line for line in lines if line.startswith(f"{name}_count")] == [
            f'{name}_count{{path="/health"}} 2.0',
            f'{name}_count{{path="{CHAT}"}} 3.0',
        ]
        assert f'{name}_bucket{{le="+Inf",path="{CHAT}"}} 3.0' in lines
