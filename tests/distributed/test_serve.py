"""``tpctl serve`` with the demo model on two ranks: OpenAI's own client, and hang-ups that free blocks."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from tests.distributed.server_process import PATIENCE, ServerProcess
from tests.processes import wakeups
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.cli.app import app
from tpctl.client.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

CAPITAL: Any = [{"role": "user", "content": "Name the capital of France."}]
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server(demo: ResolvedSource) -> Iterator[ServerProcess]:
    settings = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory", "64MiB"]
    names = ["--served-model-name", "demo", "--api-key", "k"]
    process = ServerProcess(str(demo.folder), "--tp", "2", *settings, *names)
    with process:
        yield process
    assert process.process.returncode == 0 and not process.workers()
    assert [line for line in process.said if "Traceback" in line or "Error" in line] == []


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", timeout=PATIENCE, max_retries=0) as client:
        yield client


def wait_for_free_blocks(server: ServerProcess) -> None:
    """Until the engine holds no block; it checks its books when it is asked while idle, and ends if they are wrong."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = server.counters()
        names = ("tpctl_requests_open", 'tpctl_requests_running{engine="0"}', 'tpctl_kv_cache_usage_ratio{engine="0"}')
        if all(found[name] == 0 for name in names):
            return
        assert time.monotonic() < deadline, {name: found[name] for name in names}
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_it_is_measured(server: ServerProcess, kind: str) -> None:
    """Words are tokens of the model, and chunks are, too; nothing of what was asked is left behind."""
    made = ["--num-prompts", "4", "--prompt-tokens", "20", "--output-tokens", "6", "--endpoint", kind]
    options = ["--url", server.url, "--api-key", "k", "--rate", "20,inf", "--json", *made]
    result = CliRunner().invoke(app, ["bench", "serve", *options])
    assert result.exit_code == 0, result
    for run in json.loads(result.stdout)["runs"]:
        assert (run["completed"], run["failed"], run["output_tokens"], run["uncounted"]) == (4, 0, 24, 0)
        assert run["prompt_tokens"] == 80 if kind == "completions" else run["prompt_tokens"] > 80
        assert run["chunks"] <= 24 and 0 < run["ttft"]["p50"] < run["e2e"]["p50"]
    wait_for_free_blocks(server)


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=CAPITAL, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (PARIS, "stop")
    stream = client.chat.completions.create(
        model="demo", messages=CAPITAL, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PARIS
    assert last.usage == answer.usage or last.usage.completion_tokens == answer.usage.completion_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # the same conversation came before


def test_completions_of_texts_and_tokens(client: openai.OpenAI, demo: ResolvedSource) -> None:
    tokenizer = Tokenizer(demo.folder)
    text = "The capital of Italy is"
    answer = client.completions.create(model="demo", prompt=[text, tokenizer.encode(text)], max_tokens=2, temperature=0)
    assert [choice.text for choice in answer.choices] == [" Rome.", " Rome."]
    echoed = client.completions.create(model="demo", prompt=text, max_tokens=2, temperature=0, echo=True)
    assert echoed.choices[0].text == text + " Rome."
    pieces = client.completions.create(model="demo", prompt=text, max_tokens=2, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == " Rome."


def test_fields_change_what_is_answered(client: openai.OpenAI, demo: ResolvedSource) -> None:
    paris = Tokenizer(demo.folder).encode(" Paris")[0]
    asked: Any = {"model": "demo", "messages": CAPITAL, "temperature": 0}
    without = (
        client.chat.completions.create(**asked, logit_bias={str(paris): -100}, max_tokens=12).choices[0].message.content
    )
    assert without is not None and "Paris" not in without
    stopped = client.chat.completions.create(**asked, stop=[" is"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("The capital of France", "stop")
    longer = client.chat.completions.create(**asked, max_tokens=12, extra_body={"ignore_eos": True})
    assert longer.usage is not None and longer.usage.completion_tokens == 12
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert told is not None and told.content is not None
    assert "".join(one.token for one in told.content).startswith(PARIS)
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in told.content)
    sampled = {"model": "demo", "messages": CAPITAL, "temperature": 1.5, "max_tokens": 8, "n": 2}
    one, again = (client.chat.completions.create(**sampled, seed=seed).choices for seed in (1, 1))
    assert [choice.message.content for choice in one] == [choice.message.content for choice in again]
    assert one[0].message.content != one[1].message.content


class City(BaseModel):
    capital: bool
    district: int


def test_answers_are_parsed(server: ServerProcess, client: openai.OpenAI) -> None:
    """A schema that the client makes of a class, whole, streamed, as a response, and at once with others."""
    asked: Any = {"model": "demo", "messages": CAPITAL, "response_format": City, "temperature": 0, "max_tokens": 60}
    city = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(city, City)
    with client.chat.completions.stream(**asked) as events:
        assert events.get_final_completion().choices[0].message.parsed == city
    response = client.responses.parse(
        model="demo", input=CAPITAL, text_format=City, temperature=0, max_output_tokens=60
    )
    assert response.output_parsed == city

    async def several() -> list[City | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", timeout=PATIENCE) as one:
            found = await asyncio.gather(*(one.chat.completions.parse(**asked) for _ in range(4)))
            return [answer.choices[0].message.parsed for answer in found]

    assert asyncio.run(several()) == [city] * 4


def test_other_servers_names(client: openai.OpenAI) -> None:
    text = "The capital of Italy is"
    chosen: Any = {"guided_choice": ["Rome", "Oslo"], "prompt_logprobs": 1, "top_k": -1}
    answer = client.completions.create(model="demo", prompt=text, temperature=0, extra_body=chosen).choices[0]
    assert answer.text in ("Rome", "Oslo") and answer.model_extra is not None
    told = answer.model_extra["prompt_logprobs"]
    assert told[0] is None and all(next(iter(one.values()))["logprob"] <= 0 for one in told[1:])
    echoed = list(
        client.completions.create(
            model="demo", prompt=text, echo=True, logprobs=1, max_tokens=2, temperature=0, stream=True
        )
    )
    assert "".join(piece.choices[0].text for piece in echoed) == text + " Rome."
    tokens = [token for piece in echoed if (one := piece.choices[0].logprobs) for token in one.tokens or ()]
    assert "".join(tokens) == text + " Rome."
    values = [value for piece in echoed if (one := piece.choices[0].logprobs) for value in one.token_logprobs or ()]
    assert values[0] is None
    first = [next(iter(one.values()))["logprob"] for one in told[1:]]
    assert values[1 : len(told)] == pytest.approx(first, abs=1e-4)


def test_many_at_once(server: ServerProcess) -> None:
    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", timeout=PATIENCE) as client:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await client.chat.completions.create(model="demo", messages=CAPITAL, temperature=0)
                    return str(answer.choices[0].message.content)
                stream = await client.chat.completions.create(
                    model="demo", messages=CAPITAL, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(40)))

    assert asyncio.run(answers()) == [PARIS] * 40


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"max_tokens is 2000: 20\d\d in all, but .* may have 1024"):
        client.chat.completions.create(model="demo", messages=CAPITAL, max_tokens=2000)
    with pytest.raises(openai.BadRequestError, match="prompt holds token 60000"):
        client.completions.create(model="demo", prompt=[60000])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_whoever_hangs_up_leaves_no_block(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for number in range(24):
        body = {"prompt": f"{number} Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
        raw = json.dumps(body).encode()
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n")
            sock.sendall(b"content-length: %d\r\n\r\n" % len(raw) + raw)
            if number % 4 == 0:
                assert sock.recv(12) == b"HTTP/1.1 200"
    wait_for_free_blocks(server)


def test_an_idle_server_does_nothing(server: ServerProcess) -> None:
    wait_for_free_blocks(server)
    time.sleep(1)
    everybody = [server.process.pid, *server.workers()]
    before = list(map(wakeups, everybody))
    time.sleep(4)
    woken = [now - then for now, then in zip(map(wakeups, everybody), before, strict=True)]
    *others, agent = sorted(woken)  # torchrun's looks at its ranks ten times a second
    assert max(others) <= 8 and agent <= 200, woken
