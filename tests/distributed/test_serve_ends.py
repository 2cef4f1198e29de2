"""How ``tpctl serve`` ends: with its engine, at a signal, and before its model is loaded; no process is left."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress

import httpx2
import pytest

from tests.distributed.server_process import PATIENCE, ServerProcess

pytestmark = pytest.mark.slow

WAITED_FOR = "tpctl serve: 1 request is under way, with 60 s to end; a second signal ends it at once"


def test_a_dead_rank_ends_the_server_with_its_reason(small: str) -> None:
    process = ServerProcess(small, "--tp", "2", "--device", "cpu", "--kv-cache-memory", "64MiB")
    with process.ready():
        body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{process.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            for pid in process.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_ended"
        assert process.process.wait(PATIENCE) == 1
    assert process.said[-1].startswith("tpctl: ") and "SIGKILL" in process.said[-1]
    assert not any("Traceback" in line for line in process.said)


def test_signals_end_it_in_order(small: str) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 0)):
        process = ServerProcess(small, "--device", "cpu", "--kv-cache-memory", "64MiB", "--drain", "60")
        with process.ready():
            body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
            with httpx2.stream("POST", f"{process.url}/v1/completions", json=body, timeout=PATIENCE) as response:
                lines = response.iter_lines()
                next(lines)
                process.process.send_signal(number)
                *_, last = (line for line in lines if line)
            assert last == "data: [DONE]"
            assert process.process.wait(PATIENCE) == code
        assert process.told() == WAITED_FOR
        assert not process.workers()


def test_a_signal_while_the_model_loads(small: str) -> None:
    process = ServerProcess(small, "--tp", "2", "--device", "cpu")
    deadline = time.monotonic() + PATIENCE
    while not process.workers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert not process.workers()
