"""What comes over a connection beside the request that is being answered."""

from __future__ import annotations

import gc
import json
import time
from contextlib import nullcontext, suppress

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import BODY, LONG, PATIENCE, everything, running, talkative, until
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve import lingering
from tpctl.serve.generation import Generation


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("behind", [b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"G", b"\r\n" * 20_000])
def test_whoever_hangs_up_is_seen_behind_what_he_sent_meanwhile(tokenizer: Tokenizer, behind: bytes) -> None:
    engine = talkative(tokenizer)
    engine.gate.clear()
    with running(tokenizer, engine) as server:
        for _ in range(2):
            sock = server.ask("/v1/completions", {**BODY, "stream": False})
            until(lambda: len(engine.open) == 1)
            sock.sendall(behind)
            sock.close()
            until(lambda: not engine.open)
        engine.gate.set()


def test_what_is_sent_ahead_is_answered_in_turn(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.gate.clear()
    with running(tokenizer, engine) as server:
        sock = server.ask("/v1/completions", {"prompt": "ab"})
        until(lambda: len(engine.open) == 1)
        body = b"x" * 5000
        for path in (b"/health", b"/v1/models"):
            sock.sendall(b"GET %s HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" % path + body)
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        engine.gate.set()
        said = everything(sock)
        marks = [b'"<ab>"', b'{"status":"ready"}', b'"object":"list"', b'"openapi":"3.1']
        assert said.count(b"HTTP/1.1 200 OK") == 4
        assert [said.index(mark) for mark in marks] == sorted(said.index(mark) for mark in marks)
        sock.close()


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize(
    "lengths", [b"Content-Length: 6\r\nTransfer-Encoding: chunked", b"transfer-encoding: Chunked\r\ncontent-length: 0"]
)
def test_a_body_of_two_lengths_is_none(tokenizer: Tokenizer, before: bytes, version: bytes, lengths: bytes) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server, server.connect() as sock:
        head = b"POST /v1/completions HTTP/%s\r\nhost: x\r\n%s\r\n\r\n" % (version, lengths)
        sock.sendall(before + head + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        *earlier, said = everything(sock).split(b"HTTP/1.1 ")[1:]
        assert [one[:4] for one in earlier] == [b"200 "] * bool(before)
        assert said.startswith(b"400 ") and b"connection: close" in said.lower()
        assert b"both Content-Length and Transfer-Encoding" in said and not server.engine.requests


@pytest.mark.parametrize(
    ("target", "status", "mark"),
    [
        (b"http://x/v1/models", 200, b'"object":"list"'),
        (b"HTTPS://x:8000/v1/models?a=http://y/", 200, b'"object":"list"'),
        (b"http://[::1]:8000/health", 200, b'"ready"'),
        (b"http://x", 200, b"<html"),
        (b"http://x?a=b", 200, b"<html"),
        (b"http://x/nowhere", 404, b"/nowhere is not known"),
        (b"ftp://x/health", 404, b"is not known"),
        (b"http:///health", 400, b"no host"),
        (b"http://:80/health", 400, b"no host"),
        (b"http://me@x/health", 400, b"user's name"),
    ],
)
def test_a_target_may_name_its_host(tokenizer: Tokenizer, target: bytes, status: int, mark: bytes) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server, server.connect() as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nhost: y\r\nconnection: close\r\n\r\n" % target)
        said = everything(sock)
        assert said.startswith(b"HTTP/1.1 %d " % status) and mark in said, said[:500]


def test_the_host_of_a_target_is_what_counts(tokenizer: Tokenizer) -> None:
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        for named, host, status in ((b"evil.example", b"127.0.0.1", 403), (b"127.0.0.1", b"evil.example", 200)):
            with server.connect() as sock:
                sock.sendall(b"GET http://%s/v1/models HTTP/1.1\r\nhost: %s\r\n" % (named, host))
                sock.sendall(b"origin: http://%s\r\nconnection: close\r\n\r\n" % named)
                assert everything(sock).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("ahead", ["connection: close\r\n", "", "connection: close\r\nexpect: 100-continue\r\n"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_is_refused_before_his_body_is_read_hears_why(tokenizer: Tokenizer, version: str, ahead: str) -> None:
    size = 30_000_000  # more than a socket's buffers hold
    with running(tokenizer, FakeEngine(tokenizer), api_keys=("k",), max_body=1000) as server:
        for request, key, status in (
            ("POST /v1/completions", "wrong", 401),
            ("POST /nowhere", "k", 404),
            ("POST /v1/models", "k", 405),
            ("POST /v1/completions", "k", 413),
        ):
            with server.connect() as sock:
                head = f"{request} HTTP/{version}\r\nhost: x\r\nauthorization: Bearer {key}\r\n{ahead}"
                sock.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + b"x" * size)
                assert sock.recv(13) == b"HTTP/1.1 %d " % status


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_goes_on_sending_behind_his_last_answer_hears_it(tokenizer: Tokenizer, version: str) -> None:
    with running(tokenizer, talkative(tokenizer)) as server, server.connect() as sock:
        raw = json.dumps({**BODY, "max_tokens": 3000, "stream": False}).encode()
        head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(raw)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        assert sock.recv(1) == b"H"  # all of it has been written
        for _ in range(100):
            sock.sendall(b"x" * 100_000)
        assert LONG[:3000].encode() in everything(sock)


@pytest.mark.parametrize("sends", [True, False])
def test_a_connection_is_over_in_the_end(
    tokenizer: Tokenizer, sends: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a client sends behind its last answer, or if it never ends the connection itself."""
    monkeypatch.setattr(lingering, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(lingering, "LONGEST_SECONDS", 0.5 if sends else PATIENCE)
    with running(tokenizer, FakeEngine(tokenizer)) as server, server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert everything(sock).endswith(b'{"status":"ready"}')
        assert len(server.server.server_state.connections) == 1  # type: ignore[union-attr]
        with suppress(ConnectionError) if sends else nullcontext():
            deadline = time.monotonic() + PATIENCE
            while sends and time.monotonic() < deadline:
                sock.sendall(b"x")
                time.sleep(0.01)
            assert not sends, "what is sent is taken for ever"
        until(lambda: not server.server.server_state.connections)  # type: ignore[union-attr]
    assert capfd.readouterr().err == ""


def test_a_hang_up_leaves_nothing_to_collect(tokenizer: Tokenizer) -> None:
    """The server's collections are rare, and thousands hang up between two of them."""

    def left() -> list[str]:
        kinds = (Generation, TextStream, H11Protocol, RequestResponseCycle)
        return [type(one).__qualname__ for one in gc.get_objects() if isinstance(one, kinds)]

    engine = talkative(tokenizer)
    with running(tokenizer, engine) as server:
        gc.collect()
        gc.disable()
        try:
            for number in range(12):
                sock = server.ask("/v1/completions", {**BODY, "stream": number % 2 == 0})
                until(lambda: len(engine.open) == 1)
                sock.close()
                until(lambda: not engine.open)
            until(lambda: len(left()) <= 4)
        finally:
            gc.enable()
