"""A server at a real socket: bytes behind requests, and what is no HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2
import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, LONG, Running, everything, running, unchunked, until
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Output

CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
BEHIND = [b"\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x00" * 100_000]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Halting(FakeEngine):
    """Makes one token when its gate is set, and closes that, as long as it ``halts``."""

    halts = True

    def _next(self, id: str) -> Output:
        if self.halts:
            self.gate.clear()
        return super()._next(id)


def request(body: dict[str, Any], version: str = "1.1", *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    lines = [f"POST /v1/completions HTTP/{version}", "host: x", *headers, f"content-length: {len(raw)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def said(answer: bytes) -> str:
    """The text of an answer that is whole, and nothing behind it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    if b"text/event-stream" not in head:
        return str(json.loads(body)["choices"][0]["text"])
    if b"chunked" in head:
        assert body.endswith(b"\r\n0\r\n\r\n")
        body = unchunked(body)
    *lines, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)


def refused(answer: bytes, status: int = 400) -> str:
    """What a client is told that something is wrong, as everywhere."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 %d " % status), answer[:300]
    assert b"content-type: application/json" in lines and b"connection: close" in lines
    assert any(line.startswith(b"date: ") for line in lines)
    error = json.loads(body)["error"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return str(error["message"])


@pytest.mark.parametrize(("stream", "later"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("last", [("1.1", "connection: close"), ("1.0",)])
@pytest.mark.parametrize("behind", BEHIND, ids=lambda raw: str(raw[:16]))
def test_what_is_behind_the_last_request_is_dropped(
    tokenizer: Tokenizer, behind: bytes, last: tuple[str, ...], stream: bool, later: bool
) -> None:
    """In the same packet, or while its answer is under way, before a first token or behind it."""
    engine = Halting(tokenizer, say=lambda *_: LONG, max_model_len=100_000)
    engine.gate.clear()
    with running(tokenizer, engine) as server, server.connect() as sock:
        whole = request({**BODY, "max_tokens": 3000, "stream": stream}, *last)
        sock.sendall(whole if later else whole + behind)
        until(lambda: engine.open)
        if later:
            sock.sendall(behind)
            _settled(server)
        engine.gate.set()
        begun = b""
        if stream:
            begun = sock.recv(1)
            if later:
                sock.sendall(behind)
                _settled(server)
        engine.halts = False
        engine.gate.set()
        assert said(begun + everything(sock)) == LONG[:3000]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("empty", [b"\r\n", b"\n", b"\r\n\r\n\r\n"])
def test_empty_lines_between_requests_are_none(tokenizer: Tokenizer, empty: bytes, later: bool) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server, server.connect() as sock:
        one = request({"prompt": "ab"})
        sock.sendall(empty)
        for _ in range(2):
            sock.sendall(one if later else one + empty)
            assert b"<ab>" in (answer := everything(sock, until=b"}}}")) and answer.startswith(b"HTTP/1.1 200 ")
            for byte in empty if later else b"":
                sock.sendall(bytes([byte]))
        sock.sendall(one + empty + request({"prompt": "b"}, "1.1", "connection: close") + empty)
        answers = everything(sock)
        assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == 2 and b"<b>" in answers


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"\x00\xff\xfe" * 50, 400, "illegal request line"),
        (b"\x16\x03\x01\x02\x00", 400, "illegal request line"),
        (b"GET\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/one\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\x00: a\r\n\r\n", 400, "illegal header line"),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 1_000_000, 431, "too long"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501, "Transfer-Encoding"),
        (CHUNKED + b"\r\nzz\r\n", 400, "illegal chunk header"),
        (CHUNKED + b"expect: 100-continue\r\n\r\nzz\r\n", 400, "illegal chunk header"),
    ],
)
def test_what_is_no_http_is_refused_as_everything_is(
    tokenizer: Tokenizer, raw: bytes, status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        with server.connect() as sock:
            sock.sendall(raw)
            assert words in refused(everything(sock), status)
        with server.connect() as sock:  # behind an answer
            sock.sendall(request({"prompt": "ab"}) + raw)
            first, _, second = everything(sock).partition(b"}}}")
            assert b"<ab>" in first and words in refused(second, status)
        assert httpx2.get(f"{server.url}/health").status_code == 200
        until(lambda: len(server.server.server_state.connections) == 0)  # type: ignore[union-attr]
    assert capfd.readouterr().err == ""


def test_a_refusal_is_not_taken_back_by_a_broken_body(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    """What is refused before its body has come is told once, whatever the rest of that is."""
    with running(tokenizer, FakeEngine(tokenizer), api_keys=("k",)) as server, server.connect() as sock:
        sock.sendall(CHUNKED + b"\r\n2\r\nab\r\n")
        answer = sock.recv(1 << 16)
        sock.sendall(b"zz\r\n")
        answer += everything(sock)
        assert answer.startswith(b"HTTP/1.1 401 ") and answer.count(b"HTTP/1.1") == 1
    assert capfd.readouterr().err == ""


def _settled(server: Running) -> None:
    """Wait until the server has seen what was sent; that leaves nothing to wait for."""
    for _ in range(2):
        assert httpx2.get(f"{server.url}/health").status_code == 200
        time.sleep(0.01)
