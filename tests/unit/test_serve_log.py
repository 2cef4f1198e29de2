"""A server's lines on stderr, which nobody waits for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from tests.unit.fake_client import write_tokenizer
from tests.unit.running import PATIENCE, until
from tpctl.cli import log as log_module
from tpctl.cli import serve as cli
from tpctl.cli.app import app
from tpctl.cli.log import Log
from tpctl.serve import run as run_module
from tpctl.wire.settings import EngineConfig


def test_what_does_not_fit_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MOST", 3)
    written: list[str] = []
    goes_on = threading.Event()

    def write(text: str) -> None:
        assert goes_on.wait(PATIENCE)
        written.append(text)

    with Log(write) as log:
        log.note("0")
        until(lambda: not log._waiting)  # it is being written
        for number in range(1, 6):
            log.note(str(number))
        goes_on.set()
        until(lambda: len(written) == 5)
        goes_on.clear()
        log.note("6")
        until(lambda: not log._waiting)
        for number in range(7, 11):
            log.note(str(number))
        goes_on.set()
    lost = "tpctl serve: {} dropped here, since stderr took none meanwhile"
    assert written == [*"0123", lost.format("2 lines were"), *"6789", lost.format("1 line was")]


def test_an_end_does_not_wait_for_a_reader_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LAST_SECONDS", 0.1)
    goes_on, since = threading.Event(), time.monotonic()
    with Log(lambda text: goes_on.wait(PATIENCE)) as log:
        log.note("a")
    assert time.monotonic() - since < PATIENCE / 2
    goes_on.set()
    log._thread.join(PATIENCE)


def test_a_line_is_printable_and_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with Log() as log:
        log.note("a\x1b[2J\nb\udc80")
    assert capfd.readouterr().err == "a\\x1b[2J\nb\\udc80\n"


@pytest.mark.parametrize("early", [None, signal.SIGTERM])
def test_the_command_has_one(monkeypatch: pytest.MonkeyPatch, early: signal.Signals | None) -> None:
    def ran(*arguments: Any, note: Any, **rest: Any) -> signal.Signals | None:
        assert isinstance(note.__self__, Log)
        note("a line")
        return early

    monkeypatch.setattr(cli, "_configured", lambda *_: EngineConfig(Path("model"), 1))
    monkeypatch.setattr(cli, "_started", lambda *_: [])
    monkeypatch.setattr(cli, "_settings", lambda *_: None)
    monkeypatch.setattr("tpctl.cli.template.TemplateAtHand.tokenizer", lambda *_: None)
    monkeypatch.setattr(run_module, "serve", ran)
    result = CliRunner().invoke(app, ["serve", "model", "--port", "0"])
    assert result.stderr.splitlines() == ["a line", *(["tpctl: interrupted before model was ready"] if early else [])]


def test_a_server_goes_on_while_nobody_reads_its_log(tmp_path: Path) -> None:
    """Of the command's own log, at a pipe that is full; and ends, with its own exit code."""
    write_tokenizer(tmp_path)
    code = f"""
from pathlib import Path
from tests.unit.fake_engine import FakeEngine
from tpctl.cli.log import Log
from tpctl.client.tokenizer import Tokenizer
from tpctl.serve.run import ServeSettings, serve
from tpctl.serve.sockets import listen, url_of

tokenizer, sock = Tokenizer(Path({str(tmp_path)!r})), listen("127.0.0.1", 0)
settings = ServeSettings(("demo",), {{"temperature": 1.0}}, access_log=True)
with Log() as log:
    serve([FakeEngine(tokenizer)], tokenizer, sock, settings, at_once=8, note=log.note,
          ready=lambda info: print(url_of(sock), flush=True))
"""
    argv = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().decode().strip()
        with httpx2.Client(base_url=url, timeout=PATIENCE) as client:
            for _ in range(300):
                assert client.get(f"/health?{'a' * 490}").status_code == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read().count(b'"GET /health') > 50  # what the pipe holds
    finally:
        process.kill()
        process.communicate()
