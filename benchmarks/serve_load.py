"""Many streams at once against a server of this host, by several processes, and what its processes take meanwhile.

For ``serve_gpu.py``. The streams are those of ``tpctl bench serve``; a process of its own asks for each share of them,
so that no client is what limits the figures.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import os
import queue
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from tpctl.bench.endpoint import Address, Endpoint
from tpctl.bench.load import Answer, Load, run_load
from tpctl.bench.prompts import Shape, random_prompts
from tpctl.serve.sockets import raise_file_limit

PATH = "/v1/completions"
TICK = os.sysconf("SC_CLK_TCK")
PATIENCE = 300.0
"""Seconds that a round may take."""


@dataclass(frozen=True)
class Asked:
    """A load: ``rounds`` times ``streams`` at once, each of so many tokens."""

    streams: int
    prompt: int
    output: int
    rounds: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """A server at one time: seconds, its processor seconds, and what it says of itself; ``held``, ``late``: of its
    steps, as of ``EngineStats``."""

    at: float
    processor: float
    running: float
    steps: float
    tokens: float
    held: float = 0.0
    late: float = 0.0


@dataclass(frozen=True)
class Round:
    """A round's answers as one load, samples, processor seconds, and the busiest client's share of a core."""

    load: Load
    samples: list[Sample]
    processor: tuple[float, float]
    busiest: float


def processor_seconds(pid: int) -> tuple[float, float]:
    """Of a process, in all its threads: its own, and the system's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICK, int(fields[12]) / TICK


def megabytes(pid: int) -> float:
    """That a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def gpu_megabytes() -> float:
    """Memory in use on the first GPU; 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0.0


class Watch:
    """Looks at a server's process and at its ``/metrics``.

    ``names``: of the counters, as Prometheus has them, by the fields of ``Sample``; a missing one is 0.
    """

    def __init__(self, pid: int, port: int, names: Mapping[str, str]) -> None:
        self.pid = pid
        self._port = port
        self._patterns = {
            name: re.compile(rf"^{re.escape(said)}(?:\{{.*?\}})? (\S+)$", re.M) for name, said in names.items()
        }

    def sample(self) -> Sample:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        values = {name: sum(map(float, pattern.findall(text))) for name, pattern in self._patterns.items()}
        return Sample(time.perf_counter(), sum(processor_seconds(self.pid)), **values)


def rounds(asked: Asked, watch: Watch, port: int, processes: int, every: float) -> Iterator[Round]:
    """Ask, and tell of each round as it is over.

    Args:
        every: seconds between two samples.

    Raises:
        RuntimeError: a client failed.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes + 1), context.Queue()
    shares = [asked.streams // processes + (number < asked.streams % processes) for number in range(processes)]
    clients = [
        context.Process(target=_client, args=(number, share, asked, port, barrier, results), daemon=True)
        for number, share in enumerate(shares)
    ]
    for client in clients:
        client.start()
    try:
        for number in range(asked.rounds):
            barrier.wait(PATIENCE)
            loads: list[Load] = []
            before, samples = processor_seconds(watch.pid), [watch.sample()]
            while len(loads) < processes:
                try:
                    of, load = results.get(timeout=every)
                except queue.Empty:
                    samples.append(watch.sample())
                    if not all(client.is_alive() for client in clients):
                        raise RuntimeError("a client has ended") from None
                    continue
                if isinstance(load, str) or of != number:
                    raise RuntimeError(f"a client failed: {load}")
                loads.append(load)
            after = processor_seconds(watch.pid)
            busiest = max(one.processor / one.duration for one in loads)
            yield Round(merged(loads), samples, (after[0] - before[0], after[1] - before[1]), busiest)
    finally:
        for client in clients:
            client.terminate()


def merged(loads: list[Load]) -> Load:
    """Several processes' loads as one; their clock is the same."""
    started = min(one.started for one in loads)
    ended = max(one.started + one.duration for one in loads)
    answers = [answer for one in loads for answer in one.answers]
    return Load(answers, started, ended - started, sum(one.processor for one in loads))


def lost(answers: list[Answer], output: int) -> int:
    """Streams that are not there whole."""
    return sum(one.error is not None or one.output_tokens != output for one in answers)


def _client(number: int, share: int, asked: Asked, port: int, barrier: Barrier, results: Any) -> None:
    """One process: ``share`` streams in each round."""
    try:
        raise_file_limit()
        asyncio.run(_ask(number, share, asked, port, barrier, results))
    except Exception as error:
        barrier.abort()
        results.put((-1, f"{type(error).__name__}: {error}"))


async def _ask(number: int, share: int, asked: Asked, port: int, barrier: Barrier, results: Any) -> None:
    endpoint = Endpoint(Address.of(f"http://127.0.0.1:{port}"))
    fixed = {"model": await endpoint.model(None), "temperature": 0, "ignore_eos": True}
    fixed |= {"stream": True, "stream_options": {"include_usage": True}}
    shape = Shape(asked.prompt, asked.output)
    for at in range(asked.rounds):
        prompts = random_prompts(share, shape, asked.seed + 1000 * at + number)
        requests = [endpoint.post(PATH, json.dumps({**fixed, **fields}).encode()) for fields in prompts]
        barrier.wait(PATIENCE)
        load = await run_load(endpoint, requests, [0.0] * share, seconds=PATIENCE)
        results.put((at, load))
    endpoint.close()
