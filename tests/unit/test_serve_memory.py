"""What requests hold in memory: counted as it is, bounded, and given back where it has gone."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, LONG, everything, running, talkative, until
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, TEXT, chat
from tests.unit.test_serve_refusals import error
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.answered import encode
from tpctl.serve.app import App
from tpctl.serve.asked import Streaming
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation
from tpctl.serve.memory import UNTOLD, Holding, Memory, Use, prompt_size, token_size
from tpctl.serve.pool import Job
from tpctl.serve.writers import ChatWriter
from tpctl.wire.messages import Add, Output, Outputs, Request, from_wire, to_wire
from tpctl.wire.sampling import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def traced(work: Callable[[], Any]) -> tuple[Any, int]:
    """What something makes, and bytes that it took at most."""
    tracemalloc.start()
    try:
        made = work()
        return made, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("likeliest", [None, 0, 5, 20])
def test_a_token_takes_no_more_than_is_counted(tokenizer: Tokenizer, likeliest: int | None) -> None:
    """As an answer grows, untold, and while all of it becomes JSON."""
    chance, count, prompt = random.Random(0), 1000, tokenizer.encode("ab")

    def message() -> str:
        top = [[chance.randrange(100), -chance.random()] for _ in range(likeliest or 0)]
        told: Any = None if likeliest is None else [[-chance.random(), top]]
        return json.dumps(to_wire(Outputs([Output("a", [chance.randrange(1000, 99_999)], None, None, told)])))

    messages = [message() for _ in range(count)]
    sampling = SamplingParams(logprobs=likeliest)

    def grown(interval: int) -> ChatWriter:
        streams = [TextStream(tokenizer, (), prompt)]
        generation = Generation(streams, lambda: None, interval)
        for one in messages:
            outputs = from_wire(json.loads(one))
            assert isinstance(outputs, Outputs)
            generation.push(0, outputs.outputs[0])
        job = Job(prompt, [sampling], streams)
        return ChatWriter("m", [job], generation, tokenizer, Streaming(bool(interval)))

    async def told(interval: int) -> ChatWriter:
        return grown(interval)

    aside = 60_000  # a loop and a writer
    _, size = traced(lambda: asyncio.run(told(1)))
    assert 0.2 * size < count * (token_size(sampling, rows=False) + UNTOLD) + aside > size
    _, size = traced(lambda: encode(asyncio.run(told(0)).whole()))
    assert 0.2 * size < count * token_size(sampling, rows=True) + aside > size


@pytest.mark.parametrize("biases", [0, 1024])
def test_a_prompt_takes_no_more_than_is_counted(biases: int) -> None:
    """Here, and in the engine once for each answer."""
    count = 500 if biases else 50_000
    sampling = [SamplingParams(logit_bias=tuple((1000 + n, 0.5 * n / 1024) for n in range(biases)))] * 4
    ids, here = traced(lambda: [n + 1000 for n in range(count)])
    wire = json.dumps(to_wire(Add([Request(str(at), ids, one) for at, one in enumerate(sampling)])))
    tracemalloc.start()
    made = from_wire(json.loads(wire))
    there = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert isinstance(made, Add) and len(made.requests) == 4
    assert here + there <= prompt_size(count, sampling) <= (1.8 if biases else 1.1) * (here + there) + 40_000


def test_waiting_prompts_have_no_more_than_their_part(tokenizer: Tokenizer) -> None:
    with served(tokenizer, max_memory=1 << 20) as (client, server), ThreadPoolExecutor(32) as clients:
        gate = server.engines[0].gate
        gate.clear()
        long = {"prompt": [5] * 500, "n": 2, "max_tokens": 2}  # 60 kB, 16 of answers, 16 of the request
        try:
            asked: list[Future[Any]] = []
            pool = server.pool
            assert pool is not None
            while not asked or not asked[-1].done():
                before = pool.under_way
                asked.append(clients.submit(client.post, TEXT, json=long))
                until(lambda before=before: pool.under_way > before or asked[-1].done())
            found = error(asked.pop().result(), 429)
        finally:
            gate.set()
        assert "524.3 kB that --max-memory leaves for bodies and prompts" in found.message
        assert found.code == "memory_full"
        assert {one.result().status_code for one in asked} == {200} and 4 <= len(asked) <= 5
        app = server._app
        assert app is not None and app.memory.held == 0
        for fields in ({"n": 20}, {"prompt_logprobs": 20}):
            found = error(client.post(TEXT, json={**long, **fields}), 400)
            assert "in memory, but prompts may take 524.3 kB (--max-memory)" in found.message


def test_answers_that_are_too_much_for_all_are_refused_before_they_begin(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_model_len=10_000)
    with served(tokenizer, engine, max_memory=1 << 20) as (client, _):
        asked = chat(n=3, max_tokens=1000, logprobs=True, top_logprobs=20)
        found = error(client.post(CHAT, json=asked), 400)
        assert found.message == (
            "answers of 3 times 1000 tokens, each with 20 likeliest ones take 35.9 MB in memory, but all may take "
            "1.0 MB (--max-memory); ask for less"
        )
        assert not engine.requests


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_grows_beyond_what_is_left_is_the_one_that_ends(tokenizer: Tokenizer, stream: bool) -> None:
    """Of whoever asked; others go on, and what it held is free."""
    engine = FakeEngine(tokenizer, say=lambda *_: LONG, max_model_len=len(LONG) + 100)
    with served(tokenizer, engine, max_memory=4 << 20) as (client, server):
        asked = chat(stream=stream, logprobs=True, top_logprobs=5)
        response = client.post(CHAT, json=asked)
        said = response.text if stream else json.dumps(error(response, 400).message)
        assert "all may take 4.2 MB (--max-memory); ask for fewer tokens" in said  # alone, so that waiting helps nobody
        assert response.status_code == (200 if stream else 400) and "[DONE]" not in said
        app = server._app
        assert app is not None
        app.memory.take(1_900_000, Use.ANSWERS)  # others have it
        response = client.post(CHAT, json=asked)
        said = response.text if stream else json.dumps(error(response, 429).message)
        assert "would be above the 4.2 MB that --max-memory leaves for answers" in said
        assert response.status_code == (200 if stream else 429) and "[DONE]" not in said
        app.memory.take(-1_900_000, Use.ANSWERS)
        until(lambda: not engine.open)
        assert app is not None and app.memory.held == 0
        assert client.post(TEXT, json={"prompt": "ab", "max_tokens": 5}).status_code == 200
        lines = client.get("/metrics").text.splitlines()
        ends = {"stop": 0, "length": 1, "abort": 0, "error": 2}  # once each
        assert all(f'tpctl_answers_total{{finish_reason="{reason}"}} {n}.0' in lines for reason, n in ends.items())


def test_what_has_been_told_of_a_stream_is_counted_no_more(tokenizer: Tokenizer) -> None:
    memory = Memory(2_000_000)

    async def run(read: bool) -> int:
        with Holding(memory) as holding:
            each = token_size(SamplingParams(), rows=False)
            generation = Generation([TextStream(tokenizer)], lambda: None, 1, hold=holding.answers, each=each)
            for count in range(100_000):
                generation.push(0, Output("a", [5]))
                if generation.done:
                    with pytest.raises(ApiError, match=r"all may take 2\.0 MB"):
                        while await generation.next():
                            pass
                    return count
                if read:
                    await generation.next()
        return count

    unread = asyncio.run(run(read=False))
    assert 4_000 < unread < 6_000 and 2.5 < asyncio.run(run(read=True)) / unread < 4
    assert memory.held == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/detokenize"])
def test_an_answer_is_counted_until_it_has_been_read(
    tokenizer: Tokenizer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is sent as one, of which nothing waits but its connection."""
    apps: list[App] = []
    made = App.__init__
    monkeypatch.setattr(App, "__init__", lambda self, *a, **k: (apps.append(self), made(self, *a, **k))[1])
    engine = talkative(tokenizer)
    tokens = tokenizer.encode("abcdefgh") * 30_000
    body = {"tokens": tokens} if path == "/detokenize" else {**BODY, "stream": False, "n": 8}
    with running(tokenizer, engine) as server:
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # and so of its connections
        slow = server.ask(path, body, room=4096)
        (app,) = apps
        until(lambda: not engine.open and len(app.under_way) == 1)
        assert slow.recv(12) == b"HTTP/1.1 200"
        assert len(app.under_way) == 1 and app.memory.held > 100_000
        everything(slow, until=b"}")
        until(lambda: not app.under_way)
        assert app.memory.held == 0
        slow.close()
