"""How a server at a real socket ends: at a signal, with its engine, and what it says of what it cuts off."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types.responses import ResponseFailedEvent
from typer.testing import CliRunner

from tests.unit import running as running_module
from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, PATIENCE, Running, everything, running, talkative, unchunked, until
from tpctl.cli import serve as cli
from tpctl.cli.app import app
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import run as run_module
from tpctl.serve.run import ServeSettings, serve
from tpctl.serve.sockets import listen
from tpctl.wire.settings import EngineConfig

HELLO = [{"role": "user", "content": "Hi"}]
WAITED_FOR = "under way, with {} s to end; a second signal ends {} at once"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [True, False])
def test_a_signal_while_engines_start_ends_it(tokenizer: Tokenizer, number: signal.Signals, before: bool) -> None:
    """Before there was a loop to take it, its exception lost somewhere on the way, or while they load."""
    settings = ServeSettings(("demo",), {"temperature": 1.0})
    engine, sock = FakeEngine(tokenizer, say=lambda *_: "abc"), listen("127.0.0.1", 0)
    engine.ready.clear()

    def signalled() -> int | None:
        if not before:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        return number if before else None

    early = serve([engine], tokenizer, sock, settings, at_once=8, ready=print, note=print, signalled=signalled)
    assert early == number and not engine.open and engine.closed


@pytest.mark.parametrize(("early", "code"), [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_never_served_says_so(
    monkeypatch: pytest.MonkeyPatch, early: signal.Signals | None, code: int
) -> None:
    monkeypatch.setattr(cli, "_configured", lambda *_: EngineConfig(Path("model"), 1))
    monkeypatch.setattr(cli, "_started", lambda *_: [])
    monkeypatch.setattr(cli, "_settings", lambda *_: None)
    monkeypatch.setattr("tpctl.cli.template.TemplateAtHand.tokenizer", lambda *_: None)
    monkeypatch.setattr(run_module, "serve", lambda *_, **__: early)
    result = CliRunner().invoke(app, ["serve", "model", "--port", "0"])
    assert result.exit_code == code
    assert result.stderr == ("" if early is None else "tpctl: interrupted before model was ready\n")


def test_an_end_in_order_lets_requests_end(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with running(tokenizer, engine, drain=PATIENCE) as server:
        engine.gate.clear()
        sock = server.ask("/v1/completions", {"prompt": "ab", "stream": True})
        until(lambda: len(engine.open) == 1)
        server.end()
        until(lambda: server.notes == [f"tpctl serve: 1 request is {WAITED_FOR.format('60', 'it')}"])
        until(lambda: _health(server) == (503, {"status": "ending"}))  # which whoever sends requests here looks at
        refused = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "ab"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "ending"
        assert refused.headers["retry-after"] == "5" and len(engine.open) == 1
        engine.gate.set()
        assert everything(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        until(lambda: _refused(server))
        assert len(server.heard()) == 1
    assert server.failed is None


@pytest.mark.parametrize("again", [True, False])
def test_an_end_does_not_wait_for_ever(tokenizer: Tokenizer, again: bool) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine, drain=PATIENCE if again else 0.2) as server:
        sock = server.ask("/v1/completions", BODY)
        until(lambda: len(engine.open) == 1)
        sock.recv(1)
        engine.gate.clear()
        others = [server.ask("/v1/chat/completions", {"messages": HELLO, "n": 2}) for _ in range(8)]
        until(lambda: len(engine.open) == 17)
        server.end()
        if again:
            server.end()
        answer = everything(sock)
        assert b'{"error":{"message":"the server has ended before this answer did","type":"server_error"' in answer
        assert b"[DONE]" not in answer
        assert all(b" 503 " in everything(one).split(b"\r\n")[0] for one in others)
        (id,) = set(re.findall(rb'"id":"(cmpl-\w+)"', answer))
        waited, cut = server.heard()
    assert waited == f"tpctl serve: 9 requests are {WAITED_FOR.format('60' if again else '0.2', 'them')}"
    chats = r"(/v1/chat/completions chatcmpl-\w+ after 0 tokens, ){7}and 1 more"
    first = rf"/v1/completions {id.decode()} after \d+ tokens"
    assert re.fullmatch(rf"tpctl serve: 9 answers were cut off: {first}, {chats}", cut)
    assert server.failed is None


def test_an_end_that_waits_for_nothing_says_nothing(tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "ab"}).status_code == 200
        server.end()
        assert server.heard() == []


def test_a_server_that_cannot_be_made_is_not_waited_for(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(running_module, "Server", broken)
    with pytest.raises(TypeError, match="no such argument"), running(tokenizer, FakeEngine(tokenizer)):
        pytest.fail("it runs all the same")


def test_a_client_that_reads_nothing_does_not_hold_up_the_end(tokenizer: Tokenizer) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine, drain=0.2) as server:
        sock = server.ask("/v1/completions", {**BODY, "n": 8}, room=4096)
        until(lambda: len(engine.requests) == 8 and not engine.open)
        server.end()
        waited, unread = server.heard()
        assert not server.thread.is_alive() and waited.startswith("tpctl serve: 1 request is under way")
        said = r"tpctl serve: 1 answer was not read to the end: /v1/completions cmpl-\w+ after 160000 tokens"
        assert re.fullmatch(said, unread)
        sock.close()


def test_an_engine_that_ends_takes_the_server_with_it(tokenizer: Tokenizer) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        stream = server.ask("/v1/completions", BODY)
        until(lambda: len(engine.open) == 1)
        stream.recv(1)
        engine.die("rank 0 was killed (SIGKILL)")
        engine.open.clear()
        said = b"the engine has ended: rank 0 was killed (SIGKILL)"
        assert said in everything(stream)
        server.thread.join(PATIENCE)
    assert str(server.failed) == "rank 0 was killed (SIGKILL)"


def test_a_response_that_is_broken_off_ends_with_an_event_of_its_own(tokenizer: Tokenizer) -> None:
    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        sock = server.ask("/v1/responses", {"input": "ab", "stream": True, "max_output_tokens": 20000})
        until(lambda: len(engine.open) == 1)
        sock.recv(1)
        engine.gate.clear()
        engine.die("rank 0 was killed (SIGKILL)")
        engine.open.clear()
        told = unchunked(everything(sock).partition(b"\r\n\r\n")[2]).decode()
        *_, last, rest = told.split("\n\n")
        name, _, data = last.partition("\ndata: ")
        event = ResponseFailedEvent.model_validate(json.loads(data), strict=True)
        assert (name, rest) == ("event: response.failed", "") and event.response.status == "failed"
        assert event.response.error is not None
        assert event.response.error.message == "the engine has ended: rank 0 was killed (SIGKILL)"
        assert told.count('"sequence_number"') == event.sequence_number + 1
    assert str(server.failed) == "rank 0 was killed (SIGKILL)"


def _health(server: Running) -> tuple[int, Any]:
    answer = httpx2.get(f"{server.url}/health")
    return answer.status_code, answer.json()


def _refused(server: Running) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False
