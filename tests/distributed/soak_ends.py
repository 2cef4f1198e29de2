"""Servers that are told to end while there is work that no engine has been given yet: whoever asked is told."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.distributed.server_process import PATIENCE, ServerProcess
from tests.distributed.soak_checks import check, children
from tests.distributed.soak_client import connected, heard, request
from tests.distributed.soak_forms import CHAT, TEXT, slow_rules, slow_schema

COUNT = 60
AFTER = (0.0, 0.05, 0.5, 2.0)
"""Seconds from the last request to the signal."""


def _bodies(number: int) -> tuple[str, dict[str, Any]]:
    """Requests that wait for threads, for processes, for the engine, and one that is computed."""
    long = "word " * 20_000
    kinds: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"prompt": f"{number}", "max_tokens": 200, "ignore_eos": True}),
        (TEXT, {"prompt": f"{number}", "max_tokens": 200, "ignore_eos": True, "stream": True}),
        (TEXT, {"prompt": f"{number}", "response_format": slow_schema(number)}),
        (TEXT, {"prompt": f"{number}", "grammar": slow_rules(number), "stream": True}),
        (TEXT, {"prompt": f"{number}", "regex": f"a{{3}}{number}"}),
        (CHAT, {"messages": [{"role": "user", "content": f"{number}"}] * 500, "max_tokens": 1}),
        ("/tokenize", {"prompt": f"{number} {long}"}),
    ]
    return kinds[number % len(kinds)]


async def _ask(server: ServerProcess, number: int, sent: asyncio.Semaphore) -> bytes:
    """What comes until the connection ends, of a request that the server has, or could have."""
    path, body = _bodies(number)
    reader, writer = await connected(server)
    writer.write(request(body, path))
    await writer.drain()
    sent.release()
    found = b""
    with suppress(ConnectionError):
        while piece := await reader.read(1 << 20):
            found += piece
    writer.close()
    return found


async def _ended(server: ServerProcess, after: float, signals: int, count: int) -> Counter[str]:
    sent = asyncio.Semaphore(0)
    asked = [asyncio.create_task(_ask(server, number, sent)) for number in range(count)]
    for _ in range(count):
        await sent.acquire()
    while server.counters()["tpctl_requests_open"] == 0:  # all have been read, and some have come to the engine
        await asyncio.sleep(0.01)
    await asyncio.sleep(after)
    for _ in range(signals):
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
    ends: Counter[str] = Counter()
    for number, found in enumerate(await asyncio.gather(*asked)):
        path, _ = _bodies(number)
        check(bool(found), f"{path} {number} was told nothing")
        if path == "/tokenize" and found.startswith(b"HTTP/1.1 200 "):
            ends["200"] += 1
            continue
        one = heard(found)
        check(one.status in (200, 400, 500, 503), f"{path} {number}: {one}")
        ended = "the server" in one.text
        ends[f"{one.status}{' that it ends' if ended else ''}"] += 1
        check(one.status not in (500, 503) or ended or "try again" in one.text, f"{path} {number}: {one}")
    return ends


def ends(model: str, *settings: str, count: int = COUNT) -> None:
    """With a drain that is too short for all of it, with one that is not, and with a second signal."""
    draw = random.Random(0)
    for drain, signals in (("1", 1), ("120", 1), ("120", 2)):
        for after in AFTER:
            server = ServerProcess(model, *settings, "--drain", drain, "--max-waiting", "10000")
            server.ready()
            pids = [server.process.pid, *children(server)]
            told = asyncio.run(_ended(server, after + draw.random() / 20, signals, count))
            begun = time.monotonic()
            code = server.process.wait(PATIENCE)
            server._reader.join(PATIENCE)
            pids += children(server)
            check(code == 0, f"exit code {code}: {server.said}")
            check(not (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]), f"processes are left: {left}")
            odd = [line for line in server.said if "Traceback" in line or "Exception" in line]
            check(not odd, f"it complains: {server.said}")
            under_way = next((int(line.split()[2]) for line in server.said if "under way, with" in line), 0)
            whole = sum(number for end, number in told.items() if "ends" not in end)
            check(drain == "1" or signals > 1 or whole >= under_way, f"{whole} of {under_way} were answered: {told}")
            said = ", ".join(f"{number} {end}" for end, number in sorted(told.items()))
            print(
                f"--drain {drain}, {signals} signals {after} s behind {count} requests, {under_way} under way: {said}; "
                f"gone {time.monotonic() - begun:.1f} s later",
                flush=True,
            )
