"""``tpctl serve --replicas 2``: two engines of their own processes behind one server, and what comes of a dead one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from tests.distributed.server_process import PATIENCE, ServerProcess

pytestmark = pytest.mark.slow
ENGINES = ("0", "1")


@pytest.fixture
def server(small: str) -> Iterator[ServerProcess]:
    options = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "64MiB", "--replicas", "2")
    with ServerProcess(small, *options) as process:
        yield process


def by_engine(server: ServerProcess, name: str) -> dict[str, float]:
    """A counter of each engine."""
    counters = server.counters()
    return {number: counters[f'tpctl_{name}{{engine="{number}"}}'] for number in ENGINES}


def test_both_answer_and_the_death_of_one_is_the_servers(server: ServerProcess) -> None:
    assert any("2 engines, each tp 1" in line for line in server.said)
    url, prompts = f"{server.url}/v1/completions", [f"Number {at} is" for at in range(12)]
    body: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}

    def answer(prompt: str) -> str:
        found = httpx2.post(url, json={**body, "prompt": prompt}, timeout=PATIENCE)
        assert found.status_code == 200, found.text
        return str(found.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(answer, prompts))
    assert all(texts) and all(steps >= 8 for steps in by_engine(server, "steps_total").values())
    assert sum(by_engine(server, "prefix_cache_queried_tokens_total").values()) > 0

    # the same beginning goes where it was, one behind the other
    before, long = by_engine(server, "steps_total"), "Once upon a time there was a small server. " * 6
    assert len({answer(long) for _ in range(3)}) == 1
    after = by_engine(server, "steps_total")
    assert sorted(after[number] > before[number] for number in ENGINES) == [False, True]
    assert sorted(hits > 0 for hits in by_engine(server, "prefix_cache_hit_tokens_total").values()) == [False, True]

    # with one dead, what is under way at either is told, and the server ends
    workers = server.workers()
    assert len(workers) == 2
    with ExitStack() as stack:
        streams = []
        for prompt in prompts:
            asked = {**body, "prompt": prompt, "max_tokens": 2000, "stream": True}
            response = stack.enter_context(httpx2.stream("POST", url, json=asked, timeout=PATIENCE))
            streams.append(response.iter_lines())
            assert next(streams[-1]).startswith("data: {")
        running, waiting = by_engine(server, "requests_running"), by_engine(server, "requests_waiting")
        assert all(running.values()) and sum(running.values()) + sum(waiting.values()) == len(prompts)
        assert server.counters()["tpctl_requests_open"] == len(prompts)
        os.kill(workers[0], signal.SIGKILL)
        for lines in streams:
            *_, last = (line for line in lines if line)
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_ended"
    assert server.process.wait(PATIENCE) == 1
    assert "SIGKILL" in server.told() and not any("Traceback" in line for line in server.said)
    assert not server.workers()
