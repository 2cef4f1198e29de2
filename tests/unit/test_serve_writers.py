"""What the chunks of a stream cost the server's event loop, which all streams share."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.serving import served
from tests.unit.test_serve_pool import job, until
from tpctl.client.echoed import PromptLogprobs
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import responses, writers
from tpctl.serve.answered import Answered
from tpctl.serve.asked import Streaming
from tpctl.serve.generation import Generation
from tpctl.serve.responses import ResponseWriter
from tpctl.serve.straight import STATE
from tpctl.serve.text_writer import TextWriter
from tpctl.serve.threads import Threads
from tpctl.serve.writers import ChatWriter, ChunkWriter
from tpctl.wire.messages import Output
from tpctl.wire.report import TokenLogprob


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_tokenizer(folder))


def noted(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[bool]:
    """For each call of a writer's method, whether a thread for answers made it."""
    made: list[bool] = []
    method = getattr(kind, name)

    def note(*arguments: Any) -> Any:
        made.append(threading.current_thread().name.startswith("tpctl-serve-answers"))
        return method(*arguments)

    monkeypatch.setattr(kind, name, note)
    return made


def lines(work: Callable[[], object]) -> int:
    """Lines of Python that something runs through."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("chat", [True, False])
def test_a_chunk_costs_no_more_beside_many_answers(tokenizer: Tokenizer, chat: bool) -> None:
    """Also with the usage so far, in which all of them count, and where several tokens are told together."""

    def cost(prompts: int) -> int:
        jobs = [job(tokenizer, "ab", answers=2) for _ in range(prompts)]
        streams = [stream for one in jobs for stream in one.streams]
        generation = Generation(streams, lambda: None, interval=8, answers=2)
        rest = (jobs, generation, tokenizer, Streaming(True, True, True))
        writer: ChunkWriter = ChatWriter("demo", *rest)
        if not chat:
            writer = TextWriter(None, PromptLogprobs(None, None), False, "demo", *rest)
        for at in range(len(streams)):
            generation.push(at, Output(str(at), [5], None, num_cached_tokens=1))
        generation._tell()
        for at in range(len(streams)):
            generation.push(at, Output(str(at), [5], None, num_cached_tokens=1))
        assert writer.usage()["total_tokens"] == 2 * prompts + 4 * prompts
        assert writer.usage()["prompt_tokens_details"] == {"cached_tokens": prompts}

        def chunk() -> None:
            generation.push(1, Output("1", [5], None, num_cached_tokens=1))
            assert writer.pieces(generation._pieces[-1:]).count(b"data: ") == 1

        return lines(chunk)

    assert cost(100) == cost(2) > 0


class Connection:
    """One to write to at once, as uvicorn's."""

    def __init__(self) -> None:
        self.transport, self.flow = self, self
        self.write_paused = False
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(data)


def test_a_prompt_s_log_probabilities_are_made_by_a_thread(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each answer's first token, the later one's as well, though the connection could be written to at once."""
    made = noted(monkeypatch, TextWriter, "_prompt")

    async def run() -> list[Any]:
        jobs = [job(tokenizer, "abc"), job(tokenizer, "de")]
        for one in jobs:
            one.sampling = [replace(sampling, logprobs=0) for sampling in one.sampling]
        generation = Generation([one.streams[0] for one in jobs], lambda: None)
        rest = (jobs, generation, tokenizer, Streaming(True))
        writer = TextWriter(["abc", "de"], PromptLogprobs(None, 0), False, "demo", *rest)
        connection, sent = Connection(), []

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                connection.written.append(message["body"])

        scope = {"state": {STATE: weakref.ref(connection)}, "http_version": "1.1"}
        with Threads() as threads:
            answered = asyncio.create_task(
                Answered(generation, writer, threads.answer, 5)(scope, asyncio.Event().wait, send)
            )
            for at, reason in ((0, None), (0, None), (1, None), (0, "length"), (1, "length")):
                count = len(connection.written)
                told = [TokenLogprob(-0.5, [])]
                begun = [TokenLogprob(-0.25, [])] * (len(jobs[at].token_ids) - 1)
                generation.push(at, Output(str(at), tokenizer.encode("x"), reason, None, told, prompt_logprobs=begun))
                generation.flush()
                await until(lambda count=count: len(connection.written) > count)
            await answered
        assert any(one.endswith(b"\r\n") for one in connection.written)  # at once
        text = b"".join(connection.written).decode()
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]

    chunks = [choice for chunk in asyncio.run(run()) for choice in chunk["choices"]]
    for at, text in enumerate(("abc", "de")):
        mine = [choice for choice in chunks if choice["index"] == at]
        assert "".join(choice["text"] for choice in mine) == text + "x" * (3 - at)
        tokens = [token for choice in mine for token in (choice["logprobs"] or {"tokens": []})["tokens"]]
        assert "".join(tokens) == text + "x" * (3 - at)
    assert made == [True, True]


@pytest.mark.parametrize("most", [0, 1 << 20])
@pytest.mark.parametrize("response", [False, True])
def test_many_log_probabilities_are_made_by_a_thread(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, response: bool, most: int
) -> None:
    """Of tokens that are told together."""
    monkeypatch.setattr(writers, "MANY", most)
    made = noted(monkeypatch, ResponseWriter if response else ChunkWriter, "pieces")
    path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    if response:
        path, body = "/v1/responses", {"input": "Hi", "include": ["message.output_text.logprobs"]}
    with served(tokenizer, interval=4) as (client, _):
        text = client.post(path, json={**body, "top_logprobs": 2, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    told = [event.get("logprobs") or () for event in events if event.get("type") == "response.output_text.delta"]
    if not response:
        each = [choice["logprobs"] for event in events for choice in event["choices"]]
        told = [one["content"] for one in each if one is not None]
    assert "".join(token["token"] for one in told for token in one).removesuffix("</s>") == "<[u]Hi[a]>"
    assert made == [most == 0] * len(made) != []


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_a_long_response_is_told_whole_by_a_thread(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(responses, "SLOW", most)
    made = [noted(monkeypatch, ResponseWriter, name) for name in ("begin", "end")]
    with served(tokenizer) as (client, _):
        answer = client.post("/v1/responses", json={"input": "Hi", "stream": True})
        assert answer.text.count("response.completed") == 2  # its name, and in its data
    assert made == [[most == 0]] * 2


def test_what_comes_before_the_prompt_s_log_probabilities_waits_for_them(tokenizer: Tokenizer) -> None:
    """The first of a prompt's answers brings them; another one's tokens may be there before."""
    one = job(tokenizer, "abc", answers=2)
    one.sampling = [replace(sampling, logprobs=0) for sampling in one.sampling]
    generation = Generation(one.streams, lambda: None, answers=2)
    writer = TextWriter(["abc"], PromptLogprobs(None, 0), False, "demo", [one], generation, tokenizer, Streaming(True))
    told = [TokenLogprob(-0.5, [])]

    def said(at: int, begun: list[TokenLogprob] | None = None, reason: str | None = None) -> list[tuple[int, str]]:
        generation.push(at, Output(str(at), tokenizer.encode("x"), reason, None, told, prompt_logprobs=begun))
        lines = writer.pieces(generation._tell()).decode().splitlines()
        choices = [json.loads(line[6:])["choices"][0] for line in lines if line]
        return [(choice["index"], choice["text"]) for choice in choices if choice["finish_reason"] is None]

    assert said(1) == said(1) == []
    generation.push(0, Output("0", [], prompt_logprobs=[TokenLogprob(-0.25, [])]))
    assert generation._tell() == [] and said(1, reason="length") == []
    assert said(0, [TokenLogprob(-0.25, [])]) == [(1, "abc"), (1, "x"), (1, "x"), (1, "x"), (0, "abc"), (0, "x")]
    assert said(0, reason="length") == [(0, "x")]


def test_what_comes_while_a_thread_writes_is_told_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop may take in a prompt's log-probabilities between any two looks at whether they are there."""
    one = job(tokenizer, "abc", answers=2)
    one.sampling = [replace(sampling, logprobs=0) for sampling in one.sampling]
    generation = Generation(one.streams, lambda: None, answers=2)
    writer = TextWriter(["abc"], PromptLogprobs(None, 0), False, "demo", [one], generation, tokenizer, Streaming(True))
    told = [TokenLogprob(-0.5, [])]
    for _ in range(3):
        generation.push(1, Output("1", tokenizer.encode("x"), None, None, told))
    looks = itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(writer, "_known", lambda _: next(looks))
    one.streams[0].prompt_logprobs = [TokenLogprob(-0.25, []), TokenLogprob(-0.25, [])]
    lines = (writer.pieces(generation._tell()) + writer.pieces([])).decode().splitlines()
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines if line] == ["abc", "xxx"]
