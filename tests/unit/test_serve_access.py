"""A line for each request that was answered."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, LONG, everything, running, talkative, until
from tests.unit.serving import served
from tests.unit.test_serve import CHAT, TEXT, chat
from tpctl.cli import serve as cli
from tpctl.cli.serve import ServerOptions
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.access import line
from tpctl.serve.run import ServeSettings
from tpctl.wire.messages import Output
from tpctl.wire.settings import EngineConfig

LINE = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\S+) - "([A-Z]+ \S+ HTTP/1\.[01])" (\d{3}) \d+\.\d{3}s(.*)')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "made"),
    [
        ("POST", TEXT, {"prompt": ["ab", "c"], "n": 2}, 200, r" prompt_tokens=3 completion_tokens=18 id=cmpl-\w+"),
        ("POST", TEXT, {"prompt": "ab", "stream": True}, 200, r" prompt_tokens=2 completion_tokens=5 id=cmpl-\w+"),
        ("POST", TEXT, {"prompt": "break"}, 500, r" prompt_tokens=5 completion_tokens=0 id=cmpl-\w+"),
        ("POST", CHAT, chat(max_tokens=1), 200, r" prompt_tokens=8 completion_tokens=1 id=chatcmpl-\w+"),
        ("POST", "/v1/responses", {"input": "a"}, 200, r" prompt_tokens=\d+ completion_tokens=\d+ id=resp_\w+"),
        ("POST", TEXT, {"prompt": 1}, 400, r" id=req-\w{24}"),
        ("POST", TEXT, [], 400, r" id=req-\w{24}"),
        ("POST", "/tokenize", {"prompt": "a"}, 200, r" id=req-\w{24}"),
        ("GET", "/v1/models", None, 200, r" id=req-\w{24}"),
        ("GET", "/health", None, 200, r" id=req-\w{24}"),
        ("OPTIONS", "/health", None, 405, r" id=req-\w{24}"),
        ("GET", "/no%20where?a=%0Ab", None, 404, r" id=req-\w{24}"),
    ],
)
def test_a_line_says_what_became_of_a_request(
    tokenizer: Tokenizer, method: str, path: str, body: Any, status: int, made: str
) -> None:
    told: list[str] = []
    with served(tokenizer, access=told.append) as (client, server):
        told.clear()
        answer = client.request(method, path, json=body)
        assert answer.status_code == status
        assert answer.headers.get_list("x-request-id") == re.findall(r" id=(\S+)", told[0])
        found = LINE.fullmatch("".join(told))
        assert found is not None and len(told) == 1, told
        assert found.groups()[:3] == ("testclient:50000", f"{method} {path} HTTP/1.1", str(status))
        assert re.fullmatch(made, found[4]), found[4]
        server.notes.clear()


def test_it_is_written_only_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
    engine = talkative(tokenizer)
    with running(tokenizer, engine, access_log=True) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        for count, stream in ((2, True), (3, False)):
            engine.gate.clear()
            sock = server.ask(TEXT, {**BODY, "stream": stream})
            until(lambda: len(engine.open) == 1)
            if stream:
                engine.gate.set()
                assert sock.recv(1) == b"H"
            sock.close()
            until(lambda: not engine.open)
            engine.gate.set()
            until(lambda count=count: len(server.notes) == count)
        server.end()
        health, *gone = [LINE.fullmatch(one) for one in server.heard()]
        assert health is not None and health[3] == "200" and re.fullmatch(r"127\.0\.0\.1:\d+", health[1])
        for found, status in zip(gone, ("200", "499"), strict=True):
            assert found is not None and found[3] == status, found
            assert re.fullmatch(r" prompt_tokens=2 completion_tokens=\d+ id=cmpl-\w+ hung_up", found[4])


def test_it_tells_which_streams_broke_off(tokenizer: Tokenizer) -> None:
    """By the engine, for want of memory that others hold, by the server's end."""

    class Failing(FakeEngine):
        def _next(self, id: str) -> Output:
            found = super()._next(id)
            if id not in self.open or self.open[id][2] < 5 or len(self.requests) > 1:
                return found
            del self.open[id]
            return Output(id, [], "error", "the scores are not finite")

    engine = Failing(tokenizer, say=lambda *_: LONG, max_model_len=100_000)
    with running(tokenizer, engine, access_log=True, max_memory=1 << 20, drain=0.1) as server:
        body = {**BODY, "max_tokens": 9000}
        with server.ask(TEXT, body) as sock:
            assert b"not finite" in everything(sock, b"0\r\n\r\n")
        until(lambda: len(server.notes) == 2)
        told, logged = server.notes
        server.notes.clear()
        assert re.fullmatch(r"tpctl serve: /v1/completions cmpl-\w+ after \d tokens failed: the scores are .*", told)
        assert re.search(r" 200 \S+ prompt_tokens=2 completion_tokens=\d id=cmpl-\w+ failed=500$", logged)

        app: Any = server.server._app  # type: ignore[union-attr]
        engine.pace = 0.001
        with server.ask(TEXT, body) as sock:
            assert sock.recv(1) == b"H"
            app.memory.held += 1_000_000
            assert b"memory_full" in everything(sock, b"0\r\n\r\n")
        app.memory.held -= 1_000_000
        until(lambda: len(server.notes) == 2)
        told, logged = server.notes
        server.notes.clear()
        id = logged.split(" id=")[1].removesuffix(" failed=memory_full")
        assert re.match(rf"tpctl serve: /v1/completions {id} after \d+ tokens broke off: requests hold ", told)

        with server.ask(TEXT, body) as sock:
            assert sock.recv(1) == b"H"
            server.end()
            assert b"has ended before" in everything(sock)
        assert server.heard()[-1].endswith(" failed=ended")


@pytest.mark.parametrize(("client", "said"), [(None, ":0"), (("::1", 5), "[::1]:5"), (("127.0.0.1", 5), "127.0.0.1:5")])
def test_a_line_is_one_whatever_was_asked_for(client: Any, said: str) -> None:
    scope = {"client": client, "method": "GET", "http_version": "1.1", "query_string": b""}
    found = line({**scope, "raw_path": b"/\x1b[2J\n" + b"a" * 10_000}, 404, 0.0, "req-1", None)
    assert f' {said} - "GET /\\x1b[2J\\n' in found and len(found) < 700 and found.isprintable()


def test_the_command_s_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpctl.client.conversation.recommended_sampling", lambda *_: {"temperature": 0.5})
    given = ServerOptions(
        host="gpu.example",
        api_key=["k"],
        allowed_origin=["http://A.example"],
        served_model_name=["one", "two"],
        max_waiting=3,
        max_body="1MiB",
        max_memory="1GiB",
        drain=2.0,
        access_log=True,
        stream_interval=4,
    )
    sampling, at_hand = SimpleNamespace(given=dict), SimpleNamespace(shown=None)
    rest: Any = (sampling, EngineConfig(Path("model"), 1), at_hand)
    found = cli._settings("model", given, cli._checked(given), *rest)
    assert found == ServeSettings(
        ("one", "two"),
        {"temperature": 0.5},
        ("k",),
        max_body=1 << 20,
        max_waiting=3,
        drain=2.0,
        interval=4,
        max_memory=1 << 30,
        origins=("http://a.example",),
        host="gpu.example",
        access_log=True,
    )
    assert not cli._settings("model", ServerOptions(), cli._checked(ServerOptions()), *rest).access_log
