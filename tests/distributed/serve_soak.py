"""A server under load and under abuse, with the demo model on this machine: figures for docs/serve.md.

    python -m tests.distributed.serve_soak [--layers 2] [streams | aborts | garbage | start]...

``streams``: 500 at once, none lost, in rounds, and what memory the server holds after each. ``aborts``: 10,000
requests whose clients hang up at any point. ``garbage``: long bodies, broken ones, half-open connections. ``start``:
seconds from the command to the first streamed token, in turns with ``chat``'s. After each the engine's books are
checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.distributed.real_forms import shallow
from tests.distributed.server_process import PATIENCE, ServerProcess
from tpctl.checkpoint.sources import resolve

SETTINGS = ("--device", "cpu", "--kv-cache-memory", "1GiB", "--max-model-len", "2048")


def request(body: Any, path: str = "/v1/completions") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


async def answer(server: ServerProcess, raw: bytes) -> bytes:
    """What comes until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    writer.write(raw)
    found = await reader.read()
    while piece := await reader.read(1 << 20):
        found += piece
    writer.close()
    return found


def free(server: ServerProcess) -> None:
    """Wait until the engine holds nothing; it checks its books when it is asked while idle."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = server.counters()
        if not found["tpctl_requests_open"] and not found['tpctl_kv_cache_usage_ratio{engine="0"}']:
            return
        time.sleep(0.2)
    raise SystemExit(f"blocks are held: {found}")


async def streams(server: ServerProcess, count: int = 500, tokens: int = 32) -> None:
    for round in range(4):
        started = time.monotonic()
        raw = [
            request({"prompt": f"Story {n}:", "max_tokens": tokens, "ignore_eos": True, "stream": True})
            for n in range(count)
        ]
        found = await asyncio.gather(*(answer(server, one) for one in raw))
        whole = sum(one.startswith(b"HTTP/1.1 200") and b"[DONE]" in one for one in found)
        free(server)
        seconds = time.monotonic() - started
        print(
            f"round {round + 1}: {whole} of {count} streams whole, {count * tokens / seconds:.0f} tokens/s, "
            f"server {server.memory() / 1e6:.1f} MB",
            flush=True,
        )


async def aborts(server: ServerProcess, count: int = 10_000, at_once: int = 200) -> None:
    draw = random.Random(0)
    host, port = server.url.removeprefix("http://").split(":")
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        body = {
            "prompt": f"{number} Once upon a time",
            "max_tokens": 1000,
            "ignore_eos": True,
            "stream": number % 3 > 0,
        }
        raw = request({**body, "n": draw.choice([1, 2])})
        async with gate:
            with suppress(ConnectionError):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(raw[: draw.choice([10, len(raw) - 5, len(raw), len(raw), len(raw)])])
                await writer.drain()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(100), draw.choice([0.001, 0.02, 0.2]))
                writer.transport.abort()

    for part in range(4):
        started = time.monotonic()
        await asyncio.gather(*(one(part * count // 4 + n) for n in range(count // 4)))
        free(server)
        seconds = time.monotonic() - started
        print(f"{count // 4} aborted in {seconds:.1f} s, server {server.memory() / 1e6:.1f} MB", flush=True)


async def garbage(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(200)]  # that say half of something
    for number, (_, writer) in enumerate(held):
        writer.write([b"", b"POST /v1/comp", request({"prompt": "a"})[:-3]][number % 3])
    bodies = {
        "10 MB of text": json.dumps({"prompt": "word " * 2_000_000}).encode(),
        "10 MB of tokens": json.dumps({"prompt": [1] * 3_300_000}).encode(),
        "10 MB of a message": json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode(),
        "10 MB of brackets": b"[" * 10_000_000,
        "20 MB": json.dumps({"prompt": "word " * 4_000_000}).encode(),
        "no UTF-8": b'{"prompt": "\xff\xfe"}',
        "half a body": b'{"prompt": "a',
        "half a surrogate pair": b'{"prompt": "\\ud800"}',
    }
    for name, raw in bodies.items():
        slowest = 0.0
        path = "/v1/chat/completions" if "message" in name else "/v1/completions"
        asked = asyncio.create_task(answer(server, request(raw, path)))
        started = time.monotonic()
        while not asked.done():  # the server answers others meanwhile
            begun = time.monotonic()
            await answer(server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            slowest = max(slowest, time.monotonic() - begun)
        head, _, said = (await asked).partition(b"\r\n\r\n")
        status = head.split()[1].decode()
        seconds = time.monotonic() - started
        print(f"{name}: {status} in {seconds:.2f} s, others waited {slowest:.2f} s: {said[:130].decode()}", flush=True)
    for _, writer in held:
        writer.transport.abort()
    free(server)


def first_token_of_chat(model: str) -> float:
    """Seconds from the command to the answer's first character, at a terminal, where it streams."""
    command = [sys.executable, "-m", "tpctl", "chat", model, *SETTINGS, "--max-tokens", "4", "-m", "Hi"]
    ours, theirs = pty.openpty()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=theirs, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.read(ours, 1)
    seconds = time.monotonic() - started
    with suppress(OSError):
        while os.read(ours, 1000):
            pass
    process.wait()
    os.close(ours)
    return seconds


async def first_token_of_serve(model: str) -> float:
    with ServerProcess(model, *SETTINGS) as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4}
        writer.write(request(body, "/v1/chat/completions"))
        await reader.readuntil(b'"content":"')
        seconds = time.monotonic() - server.started
        writer.transport.abort()
    return seconds


def start(model: str, times: int = 3) -> None:
    pairs = [(asyncio.run(first_token_of_serve(model)), first_token_of_chat(model)) for _ in range(times)]
    for served, chatted in pairs:
        print(f"first token: serve {served:.2f} s, chat {chatted:.2f} s", flush=True)
    medians = [sorted(side)[times // 2] for side in zip(*pairs, strict=True)]
    print(f"medians: serve {medians[0]:.2f} s, chat {medians[1]:.2f} s")


def with_layers(count: int, folder: Path) -> str:
    """The demo model with so many of its layers, where it does not matter what is answered."""
    demo = resolve("demo").folder
    made = shallow(demo, folder / "shallow", count)
    for file in demo.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, made)
    return str(made)


def main(names: Sequence[str], model: str) -> None:
    for name in names:
        print(f"== {name}", flush=True)
        if name == "start":
            start(model)
            continue
        with ServerProcess(model, *SETTINGS, "--max-waiting", "10000") as server:
            asyncio.run({"streams": streams, "aborts": aborts, "garbage": garbage}[name](server))
            pids = [server.process.pid, *server.workers()]
        left = [line for line in server.said if "Traceback" in line or "failed" in line]
        print(f"exit code {server.process.returncode}, {len(pids)} processes gone, complaints: {left}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int)
    parser.add_argument("names", nargs="*", default=["streams", "aborts", "garbage", "start"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = "demo" if args.layers is None else with_layers(args.layers, Path(folder))
        if args.layers is not None:
            os.environ["TPCTL_CACHE"] = folder  # its shards go with it
        main(args.names, model)
