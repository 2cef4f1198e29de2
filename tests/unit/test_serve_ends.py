"""How a server at a real socket ends: at a signal, with its engine, and what it says of what it cuts off."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
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
from tpctl.client import guides
from tpctl.client.grammar_process import GrammarProcesses
from tpctl.client.template import ChatTemplate
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import lingering
from tpctl.serve import run as run_module
from tpctl.serve.asked import Reader
from tpctl.serve.errors import ApiError
from tpctl.serve.metrics import Metrics
from tpctl.serve.pool import Pool
from tpctl.serve.run import ServeSettings, serve
from tpctl.serve.sockets import listen
from tpctl.wire.guide import of_schema
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


def test_an_end_in_order_lets_end_what_no_engine_has_yet(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was being tokenised when the signal came is no new request."""
    let, made = threading.Event(), Reader._texts

    def slow(self: Reader, *arguments: Any) -> Any:
        assert let.wait(PATIENCE)
        return made(self, *arguments)

    monkeypatch.setattr(Reader, "_texts", slow)
    with running(tokenizer, FakeEngine(tokenizer), drain=PATIENCE) as server:
        app: Any = server.server._app  # type: ignore[union-attr]
        try:
            socks = [server.ask("/v1/completions", {"prompt": "ab", "stream": stream}) for stream in (True, False)]
            until(lambda: len(app.under_way) == 2)
            server.end()
            until(lambda: _health(server) == (503, {"status": "ending"}))
            assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "ab"}).status_code == 503
        finally:
            let.set()
        streamed, whole = (everything(sock) for sock in socks)
        assert streamed.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b"<ab>" in whole
        assert len(server.heard()) == 1


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


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def schema(number: int) -> dict[str, Any]:
    """One whose grammar takes as long as it may."""
    return of_schema({"type": "string", "allOf": [{"pattern": f"a{n}end{number}"} for n in range(40)]})


@pytest.mark.parametrize("again", [True, False])
def test_an_end_does_not_wait_for_what_is_made_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Queues of grammars and of a template that never end; each client is told, and each id is in the log."""
    processes = GrammarProcesses()
    monkeypatch.setattr(guides, "_processes", processes)
    monkeypatch.setattr("tpctl.client.grammar_process.SECONDS", PATIENCE)
    start, code = subprocess.Popen, "from tpctl.client import {0} as w; w.SECONDS = 600; w.main()"
    started: list[subprocess.Popen[bytes]] = []

    def popen(argv: list[str], **rest: Any) -> Any:
        started.append(start([argv[0], "-c", code.format(argv[-1].rpartition(".")[2])], **rest))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    tokenizer = Tokenizer(write_tokenizer(tmp_path), template=ChatTemplate(ENDLESS, {}))
    with running(tokenizer, FakeEngine(tokenizer), drain=PATIENCE if again else 0.2) as server:
        socks = [server.ask("/v1/completions", {"prompt": "ab", "response_format": schema(n)}) for n in range(6)]
        socks += [server.ask("/v1/chat/completions", {"messages": HELLO}) for _ in range(10)]
        socks += [server.ask("/tokenize", {"messages": HELLO}) for _ in range(4)]
        app: Any = server.server._app  # type: ignore[union-attr]
        until(lambda: len(app.under_way) == len(socks) and len(processes._at_work) == 2)
        assert len(started) > 2 and all(process.poll() is None for process in started)
        begun = time.monotonic()
        server.end()
        if again:
            server.end()
        said = [everything(sock) for sock in socks]
        waited, cut = server.heard()
        assert not server.thread.is_alive() and time.monotonic() - begun < PATIENCE / 2
    assert waited.startswith("tpctl serve: 20 requests are under way")
    assert all(one.startswith(b"HTTP/1.1 503 ") and b'"code":"ended"' in one for one in said)
    ids = [re.findall(rb"x-request-id: (req-\w{24})\r\n", one)[0].decode() for one in said]
    assert len(set(ids)) == 20
    paths = ["/v1/completions"] * 6 + ["/v1/chat/completions"] * 10 + ["/tokenize"] * 4
    known = {f"{path} {id} before it was begun" for path, id in zip(paths, ids, strict=True)}
    assert cut.startswith("tpctl serve: 20 answers were cut off: ") and cut.endswith(" and 12 more")
    assert set(cut.partition("cut off: ")[2].removesuffix(", and 12 more").split(", ")) <= known
    until(lambda: all(process.poll() is not None for process in started))


def test_an_end_that_has_given_up_takes_nothing_more(tokenizer: Tokenizer) -> None:
    async def scene() -> None:
        pool = Pool([], Metrics(), most=1)
        reason = ApiError(503, "ended")
        with pytest.raises(ApiError) as told, pool.preparing():
            pool.give_up(reason)  # by what it does itself: it goes on to see what has become of it
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(pool.give_up, reason)
            await asyncio.sleep(PATIENCE)
        assert str(told.value) == str(reason) and not pool._preparing
        await asyncio.sleep(0)  # nor is the task ended
        with pytest.raises(ApiError), pool.preparing():
            pytest.fail("it was let in")

    asyncio.run(scene())


def test_a_signal_while_engines_end_changes_nothing(tokenizer: Tokenizer) -> None:
    settings = ServeSettings(("demo",), {"temperature": 1.0})
    engine, sock = FakeEngine(tokenizer), listen("127.0.0.1", 0)
    close, kinds, taken = engine.close, (signal.SIGTERM, signal.SIGINT), []

    def closed() -> None:
        for number in kinds:
            assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
            os.kill(os.getpid(), number)
        time.sleep(0.1)  # the loop would have taken them
        taken.append(True)
        close()

    engine.close = closed  # type: ignore[method-assign]
    before = [signal.getsignal(number) for number in kinds]

    def ready(info: Any) -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)

    assert serve([engine], tokenizer, sock, settings, at_once=8, ready=ready, note=print) is None
    assert taken and engine.closed and [signal.getsignal(number) for number in kinds] == before


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
        # With log-probabilities, so that there is more of it than the system takes in.
        sock = server.ask("/v1/completions", {**BODY, "n": 8, "logprobs": 1}, room=4096)
        until(lambda: len(engine.requests) == 8 and not engine.open)
        server.end()
        waited, unread = server.heard()
        assert not server.thread.is_alive() and waited.startswith("tpctl serve: 1 request is under way")
        said = r"tpctl serve: 1 answer was not read to the end: /v1/completions cmpl-\w+ after 160000 tokens"
        assert re.fullmatch(said, unread)
        sock.close()


@pytest.mark.parametrize("what", ["answered", "half a head", "goes on sending"])
def test_an_end_waits_for_no_connection_without_work(
    tokenizer: Tokenizer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering, "SILENT_SECONDS", PATIENCE)
    monkeypatch.setattr(lingering, "LONGEST_SECONDS", PATIENCE)
    with running(tokenizer, FakeEngine(tokenizer), drain=PATIENCE) as server, server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert everything(sock, b'{"status":"ready"}').startswith(b"HTTP/1.1 200 ")
        if what == "half a head":
            sock.sendall(b"GET /hea")
        elif what == "goes on sending":
            sock.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\nab")
            assert sock.recv(12) == b"HTTP/1.1 404"
        begun = time.monotonic()
        server.end()
        while server.thread.is_alive() and time.monotonic() - begun < PATIENCE / 2:
            with suppress(ConnectionError):
                if what == "goes on sending":
                    sock.sendall(b"x")
            time.sleep(0.01)
        assert time.monotonic() - begun < PATIENCE / 2
        assert server.heard() == []


@pytest.mark.parametrize("dies", [False, True])
def test_half_a_body_is_refused_once_the_end_begins(tokenizer: Tokenizer, dies: bool) -> None:
    """Before what is under way ends, and whether it came before the signal or after it."""
    half = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nabc"
    engine = FakeEngine(tokenizer)
    with running(tokenizer, engine, drain=PATIENCE) as server, server.connect() as before:
        before.sendall(half)
        app: Any = server.server._app  # type: ignore[union-attr]
        until(lambda: app._arriving)
        begun = time.monotonic()
        if dies:
            engine.die()
            assert b'"code":"engine_ended"' in everything(before, b"}}")
            server.thread.join(PATIENCE)
            assert server.failed is not None
        else:
            engine.gate.clear()
            stream = server.ask("/v1/completions", {"prompt": "ab", "stream": True})
            until(lambda: len(engine.open) == 1)
            server.end()
            with server.connect() as after:
                until(lambda: _health(server) == (503, {"status": "ending"}))
                after.sendall(half)
                for sock in (before, after):
                    said = everything(sock, b"}}")
                    assert said.startswith(b"HTTP/1.1 503 ") and b'"code":"ending"' in said
            engine.gate.set()
            assert everything(stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert len(server.heard()) == 1
        assert time.monotonic() - begun < PATIENCE / 2


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
