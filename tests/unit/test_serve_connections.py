"""A server at a real socket: clients that hang up, read slowly or send half of something."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import httpx2
import openai
import pytest

from tests.processes import threads, wakeups
from tests.unit.deaf import deafen, doublings, hurried
from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, LONG, PATIENCE, everything, running, talkative, unchunked, until
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import connection as connection_module
from tpctl.serve import run as run_module
from tpctl.serve import server as server_module
from tpctl.serve.app import App
from tpctl.serve.connection import Connection, _Requests
from tpctl.serve.straight import Straight
from tpctl.serve.threads import Threads


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_hangs_up_gives_up_the_engines_work(tokenizer: Tokenizer, stream: bool) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        sock = server.ask("/v1/completions", {**BODY, "stream": stream, "n": 3})
        until(lambda: len(engine.open) == 3)
        if stream:
            assert sock.recv(10) == b"HTTP/1.1 2"
        sock.close()
        until(lambda: not engine.open)
        assert len(engine.aborted) == 3
        engine.gate.clear()  # now before there is any token
        sock = server.ask("/v1/completions", {**BODY, "stream": stream})
        until(lambda: len(engine.open) == 1)
        sock.close()
        until(lambda: not engine.open)
        engine.gate.set()


@pytest.mark.parametrize("stream", [True, False])
def test_who_ends_the_sending_side_alone_has_hung_up(tokenizer: Tokenizer, stream: bool) -> None:
    """As whoever closes a connection does, of which the server sees no more than that."""
    engine = talkative(tokenizer)
    engine.gate.clear()
    with running(tokenizer, engine) as server, server.ask("/v1/completions", {**BODY, "stream": stream}) as sock:
        until(lambda: len(engine.open) == 1)
        sock.shutdown(socket.SHUT_WR)
        said = everything(sock)
        assert not said if not stream else b"[DONE]" not in said  # a token may have come
        until(lambda: not engine.open)
        assert len(engine.aborted) == 1
        engine.gate.set()


@pytest.mark.parametrize(
    ("path", "body", "of"),
    [
        ("/v1/completions", {"prompt": "ab"}, "_prompts"),
        ("/v1/completions", {"prompt": "ab", "regex": "a"}, "_formed"),
        ("/tokenize", {"prompt": "ab"}, "_aside"),
    ],
)
def test_what_waits_for_a_thread_goes_with_its_client(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], of: str
) -> None:
    """Its place, and what it holds in memory, too; the thread never sees it."""
    made: list[Threads] = []
    monkeypatch.setattr(run_module, "Threads", lambda: made.append(Threads()) or made[0])
    begin, encoded = Tokenizer.encode, []

    def encode(self: Tokenizer, text: str, **more: Any) -> list[int]:
        encoded.append(text)
        return begin(self, text, **more)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    let = threading.Event()
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        executor = getattr(made[0], of)
        busy = [executor.submit(let.wait, PATIENCE) for _ in range(executor._max_workers)]
        app: Any = server.server._app  # type: ignore[union-attr]
        try:
            socks = [server.ask(path, body) for _ in range(3)]
            until(lambda: len(app.under_way) == 3 and executor._work_queue.qsize() == 3)
            assert app.memory.held
            socks[0].close()
            until(lambda: len(app.under_way) == 2)
            for sock in socks[1:]:
                sock.close()
            until(lambda: not len(app.under_way))
            assert (app.memory.held, app._endpoints.pool._reserved, made[0]._asides) == (0, 0, 0)
            queued = [executor._work_queue.get() for _ in range(executor._work_queue.qsize())]
            assert not any(any(item.args) for item in queued)  # nor is it kept there
            for item in queued:
                executor._work_queue.put(item)
        finally:
            let.set()
        assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "ab"}).status_code == 200
        assert all(one.result() for one in busy)
        until(lambda: executor._work_queue.empty())
        assert encoded.count("ab") == 1


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(tokenizer: Tokenizer) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        slow = server.ask("/v1/completions", BODY, room=4096)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
        assert client.completions.create(model="demo", prompt="ab", max_tokens=5).choices[0].text == LONG[:5]
        until(lambda: not engine.open)  # it is done, though nothing was read
        _, _, body = everything(slow, until=b"0\r\n\r\n").partition(b"\r\n\r\n")
        lines = unchunked(body).decode().split("\n\n")
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
        assert "".join(texts) == LONG[: BODY["max_tokens"]]
        slow.close()


def test_a_reader_that_pauses_is_kept_as_long_as_its_host_answers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch)
    with running(tokenizer, talkative(tokenizer)) as server:
        paused = server.ask("/v1/completions", {**BODY, "n": 4}, room=4096)
        until(lambda: server.server and len(server.server.server_state.connections) == 1)
        (connection,) = server.server.server_state.connections  # type: ignore[union-attr]
        # So often the system has asked whether there is room again, and was told that there is none: for six seconds.
        transport = connection.transport
        until(lambda: transport.is_closing() or doublings(transport.get_extra_info("socket")) >= 5)
        assert everything(paused, until=b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        paused.close()


@pytest.mark.parametrize("paused", [True, False])
def test_a_connection_whose_other_end_is_gone_is_ended(
    tokenizer: Tokenizer, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or while its reader takes nothing; else the system would wait for a quarter of an hour."""
    hurried(monkeypatch)
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        assert server.server is not None
        engine.gate.clear()
        sock = server.ask("/v1/completions", {**BODY, "n": 4}, room=4096)
        until(lambda: len(engine.open) == 4)
        if paused:
            engine.gate.set()
            until(lambda: not engine.open)
        deafen(sock)
        engine.gate.set()
        until(lambda: not server.server.server_state.connections)  # type: ignore[union-attr]
        until(lambda: not engine.open)
        sock.close()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_tokens_go_straight_to_their_connection(
    tokenizer: Tokenizer, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = Straight.write
    monkeypatch.setattr(Straight, "write", lambda self, data: (written.append(len(data)), write(self, data)))
    with running(tokenizer, talkative(tokenizer)) as server, server.connect() as sock:
        raw = json.dumps({**BODY, "max_tokens": 5000, "n": 2}).encode()
        head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\nconnection: close\r\n".encode()
        sock.sendall(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        headers, _, body = everything(sock).partition(b"\r\n\r\n")
        assert (b"chunked" in headers) == (version == "1.1")
        lines = (unchunked(body) if version == "1.1" else body).decode().split("\n\n")
        texts = ["", ""]
        for choice in (json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")):
            texts[choice["index"]] += choice["text"]
        assert texts == [LONG[:5000]] * 2 and lines[-2] == "data: [DONE]"
    assert bool(written) == (version == "1.1")  # before, there is no telling where a body ends but by its connection


def test_a_connection_leaves_nothing_to_collect(tokenizer: Tokenizer) -> None:
    def connections() -> int:
        return sum(type(one) is Connection for one in gc.get_objects())

    with running(tokenizer, talkative(tokenizer)) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                sock = server.ask("/v1/completions", {**BODY, "max_tokens": 300})
                assert everything(sock, until=b"0\r\n\r\n")
                assert connections()
                sock.close()
            until(lambda: connections() <= 2)
        finally:
            gc.enable()


def test_what_is_no_http_leaves_nothing_to_collect(tokenizer: Tokenizer) -> None:
    def left() -> int:
        return sum(type(one) is _Requests for one in gc.get_objects())

    with running(tokenizer, FakeEngine(tokenizer)) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                with server.connect() as sock:
                    sock.sendall(b"NO\r\n\r\n")
                    assert everything(sock).startswith(b"HTTP/1.1 400 ")
            until(lambda: left() <= 2)
        finally:
            gc.enable()


def test_openai_s_clients_are_served(tokenizer: Tokenizer) -> None:
    hello: Any = [{"role": "user", "content": "Hi"}]
    with running(tokenizer, FakeEngine(tokenizer), api_keys=("k",)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        assert client.responses.create(model="demo", input="Hi").output_text == "<[u]Hi[a]>"
        with client.responses.stream(model="demo", input="Hi") as events:
            assert events.get_final_response().output_text == "<[u]Hi[a]>"
        assert client.chat.completions.create(model="demo", messages=hello).choices[0].message.content == "<[u]Hi[a]>"
        pieces = client.chat.completions.create(model="demo", messages=hello, stream=True)
        assert "".join(one.choices[0].delta.content or "" for one in pieces) == "<[u]Hi[a]>"
        several = client.completions.create(model="demo", prompt=["a", "b"])
        assert several.choices[1].text == "<b>" and several._request_id == several.id
        assert [model.id for model in client.models.list()] == ["demo"]
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="max_tokens is -1") as refused:
            client.completions.create(model="demo", prompt="a", max_tokens=-1)
        assert not client.completions.create(model="demo", prompt="a", max_tokens=0).choices[0].text
        assert refused.value.param == "max_tokens"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


@pytest.mark.parametrize("interval", [1, 7])
def test_hundreds_stream_at_once(tokenizer: Tokenizer, interval: int) -> None:
    async def all_of_them(url: str) -> list[str]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as client:

            async def one(number: int) -> str:
                body = {"prompt": f"p{number}", "max_tokens": 100, "stream": True}
                found = ""
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            found += json.loads(line[6:])["choices"][0]["text"]
                return found

            return await asyncio.gather(*(one(number) for number in range(300)))

    with running(tokenizer, FakeEngine(tokenizer), interval=interval) as server:
        assert asyncio.run(all_of_them(server.url)) == [f"<p{number}>" for number in range(300)]


def test_requests_that_are_given_up_anywhere_leave_nothing(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        for number in range(300):
            sock = server.connect()
            raw = json.dumps({**BODY, "n": draw.choice([1, 3])}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw)
            whole = head + raw
            sock.sendall(whole[: draw.choice([0, 5, len(head), len(whole) - 3, len(whole), len(whole)])])
            if number % 3 == 0:
                sock.settimeout(0.02)
                with suppress(TimeoutError):
                    sock.recv(100)
            sock.close()
        until(lambda: not engine.open)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
        assert client.completions.create(model="demo", prompt="ab", max_tokens=5).choices[0].text == LONG[:5]
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
        assert "tpctl_requests_open 0.0" in lines


def test_what_is_half_sent_is_not_waited_for(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(run_module, "App", partial(App, body_seconds=0.3))
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        for begun in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /"):
            with server.connect() as sock:
                sock.sendall(begun)
                answer = everything(sock)  # until the server closes
                assert answer.startswith(b"HTTP/1.1 200") if b"health" in begun else answer == b""
        with server.connect() as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            answer = everything(sock, b"}}")
            assert b" 408 " in answer.split(b"\r\n")[0] and b"timeout_error" in answer


def test_an_idle_server_does_nothing(tokenizer: Tokenizer) -> None:
    others = threads(os.getpid())  # this one, and what tests before have left
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        before = wakeups(os.getpid(), others)
        time.sleep(2)
        assert before and wakeups(os.getpid(), others) - before <= 4
