"""A server under load and under abuse, with the demo model on this machine: figures for docs/serve.md.

    python -m tests.distributed.serve_soak [--layers 2] [--count N] [NAME]...

``streams``: 500 at once, none lost, in rounds, and what memory every process holds after each. ``aborts``: 10,000
requests, or more, whose clients hang up at any point, in rounds as well. ``garbage``: long bodies, broken ones,
half-open connections; each has its status. ``forms``: schemas, regexes, choices and grammars, slow and malformed ones
among them, and clients of them that hang up. ``tools``: calls that the model may make and that it must, likewise.
``wire``: requests that come late, bytes behind them, clients that end their sending side. ``ends``: SIGTERM while there
is work that no engine has been given yet. ``start``: seconds from the command to the first streamed token, in turns
with ``chat``'s.

After each the engine's books are checked. It ends with an exit code other than 0 where a stream is lost, a status is
another one, an answer has not its form, memory or the number of threads goes on growing, something is at work when
nothing is under way, the first token comes later than ``chat``'s, somebody complains or a process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pty
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.distributed.real_forms import shallow
from tests.distributed.server_process import PATIENCE, ServerProcess
from tests.distributed.soak_checks import MOST_ROUNDS, Memory, check, check_start, children, is_whole
from tests.distributed.soak_client import answer, free, request
from tests.distributed.soak_ends import ends
from tests.distributed.soak_forms import forms, tools
from tests.distributed.soak_wire import wire
from tpctl.checkpoint.sources import resolve

TEMPLATE = Path(__file__).parents[2] / "examples" / "tools.jinja"
SETTINGS = ("--device", "cpu", "--max-model-len", "2048")
CACHE = 512 << 20
"""Bytes of the KV cache, of which the engine has touched all only after a while."""


async def streams(server: ServerProcess, count: int = 500, tokens: int = 32) -> None:
    memory = Memory(server, CACHE)
    for round in range(MOST_ROUNDS):
        started = time.monotonic()
        asked = {"max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        raw = [request({"prompt": f"Story {n}:", **asked}) for n in range(count)]
        found = await asyncio.gather(*(answer(server, one) for one in raw))
        lost = [one for one in found if not is_whole(one, tokens)]
        whole = count - len(lost)
        free(server)
        seconds = time.monotonic() - started
        print(
            f"round {round + 1}: {whole} of {count} streams whole, {count * tokens / seconds:.0f} tokens/s, "
            f"{memory.look()}",
            flush=True,
        )
        check(not lost, f"{len(lost)} streams were lost: {[one[-600:] for one in lost[:3]]}")
        if memory.steady():
            break
    memory.check()


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
                if number % 7 == 0:
                    writer.write(b"GET /health HT")  # of another request, behind it
                await writer.drain()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(100), draw.choice([0.001, 0.02, 0.2]))
                writer.transport.abort()

    memory = Memory(server, CACHE)
    for round in range(MOST_ROUNDS):
        started = time.monotonic()
        await asyncio.gather(*(one(round * count // 8 + n) for n in range(count // 8)))
        free(server)
        seconds = time.monotonic() - started
        print(f"{count // 8} aborted in {seconds:.1f} s, {memory.look()}", flush=True)
        if round >= 7 and memory.steady():
            break
    memory.check()


LONG: Any = {"role": "user", "content": "x" * 10_000_000}
GARBAGE: dict[str, tuple[str, Any, int, str]] = {
    "10 MB of text": ("/v1/completions", {"prompt": "word " * 2_000_000}, 400, "the text has 10,000,000 characters"),
    "10 MB of tokens": ("/v1/completions", {"prompt": [1] * 3_300_000}, 400, "the prompt has 3300000 tokens"),
    "10 MB of a model": ("/v1/completions", {"model": [1] * 3_300_000, "prompt": "a"}, 400, "model is [1, 1, 1"),
    "10 MB of a message": ("/v1/chat/completions", {"messages": [LONG]}, 400, "characters"),
    "3,000 messages": ("/v1/chat/completions", {"messages": [{**LONG, "content": "x"}] * 3000}, 400, "at most 2048"),
    "10 MB of brackets": ("/v1/completions", b"[" * 10_000_000, 413, "strings, arrays and objects"),
    "200,000 brackets": ("/v1/completions", b"[" * 200_000, 400, "nested too deeply"),
    "5,000,000 lists": ("/v1/completions", b'{"prompt":"a","user":[' + b"[]," * 5_000_000 + b"0]}", 413, "and objects"),
    "260,000 lists": (
        "/v1/completions",
        b'{"best_of":[' + b"[]," * 260_000 + b'0],"prompt":"a"}',
        400,
        "best_of is [[",
    ),
    "800,000 tools": ("/v1/responses", b'{"tools":[' + b'{"type":"a"},' * 800_000 + b"0]}", 413, "and objects"),
    "80,000 tools": ("/v1/responses", {"input": "a", "tools": [{"type": "a"}] * 80_000}, 400, "at most 1024"),
    "40,000 items": ("/v1/responses", {"input": [{**LONG, "content": "x"}] * 40_000}, 400, "at most 8192 are taken"),
    "80,000 parts": (
        "/v1/responses",
        {"input": [{**LONG, "content": [{"type": "text", "text": ""}] * 80_000}]},
        413,
        "and objects",
    ),
    "50,000 parts": (
        "/v1/responses",
        {"input": [{**LONG, "content": [{"type": "text", "text": "a b"}] * 50_000}]},
        400,
        "characters",
    ),
    "20 MB": ("/v1/completions", {"prompt": "word " * 4_000_000}, 413, "--max-body"),
    "no UTF-8": ("/v1/completions", b'{"prompt": "\xff\xfe"}', 400, "Invalid UTF-8"),
    "half a body": ("/v1/completions", b'{"prompt": "a', 400, "not valid JSON"),
    "half a surrogate pair": ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "not valid JSON"),
    "200,000 stops": ("/v1/completions", {"prompt": "a", "stop": ["ab"] * 200_000}, 400, "at most 16 are taken"),
    "a stop of 1 MB": ("/v1/completions", {"prompt": "a", "stop": "ab" * 500_000}, 400, "at most 4096 are taken"),
    "200,000 biases": (
        "/v1/completions",
        {"prompt": "a", "logit_bias": {str(token): 1 for token in range(200_000)}},
        400,
        "at most 1024 are taken",
    ),
    "10 MB to tokenise": ("/tokenize", {"prompt": "word " * 2_000_000}, 400, "at most 1048576 are tokenised"),
    "1 MB to tokenise": ("/tokenize", {"prompt": "word " * 200_000, "return_token_strs": True}, 200, '"count":200'),
    "a long message to tokenise": ("/tokenize", {"messages": [LONG]}, 400, "are tokenised"),
    "no UTF-8 to tokenise": ("/tokenize", b'{"prompt": "\xff"}', 400, "Invalid UTF-8"),
    "3,300,000 tokens to make a text": ("/detokenize", {"tokens": [1] * 3_300_000}, 400, "at most 262144 are taken"),
    "no known token": ("/detokenize", {"tokens": [10**9]}, 400, "holds token 1000000000"),
}
"""Bodies by name: where they go, and the status and some words of what they are answered with."""


async def garbage(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(200)]  # that say half of something
    for number, (_, writer) in enumerate(held):
        writer.write([b"", b"POST /v1/comp", request({"prompt": "a"})[:-3]][number % 3])
    for name, (path, body, status, words) in GARBAGE.items():
        slowest = 0.0
        asked = asyncio.create_task(answer(server, request(body, path)))
        started = time.monotonic()
        while not asked.done():  # the server answers others meanwhile
            begun = time.monotonic()
            await answer(server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            slowest = max(slowest, time.monotonic() - begun)
        head, _, said = (await asked).partition(b"\r\n\r\n")
        found, text = int(head.split()[1]), said[:300].decode()
        seconds = time.monotonic() - started
        print(f"{name}: {found} in {seconds:.2f} s, others waited {slowest:.2f} s: {text[:130]}", flush=True)
        check(found == status and words in text, f"{name}: {found}, not {status}, or other words: {text}")
        check(slowest < PATIENCE / 60, f"{name}: others waited {slowest:.1f} s")
    for _, writer in held:
        writer.transport.abort()
    free(server)


def first_token_of_chat(model: str) -> float:
    """Seconds from the command to the answer's first character, at a terminal, where it streams."""
    command = [
        sys.executable,
        "-m",
        "tpctl",
        "chat",
        model,
        *SETTINGS,
        "--kv-cache-memory",
        "1GiB",
        "--max-tokens",
        "4",
        "-m",
        "Hi",
    ]
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
    with ServerProcess(model, *SETTINGS, "--kv-cache-memory", "1GiB") as server:
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
    print(check_start(pairs))


def with_layers(count: int, folder: Path) -> str:
    """The demo model with so many of its layers, where it does not matter what is answered."""
    demo = resolve("demo").folder
    made = shallow(demo, folder / "shallow", count)
    for file in demo.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, made)
    return str(made)


KINDS: Mapping[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "streams": streams,
    "aborts": aborts,
    "garbage": garbage,
    "forms": lambda server: forms(server, CACHE),
    "tools": lambda server: tools(server, CACHE),
    "wire": lambda server: wire(server, CACHE),
}


FEW_SHAPES = ("--max-num-seqs", "8", "--max-num-batched-tokens", "32")
"""Options for kinds whose prompts have all lengths: they leave little of what torch keeps for each number of tokens
(``soak_checks.KEPT``)."""


def main(names: Sequence[str], model: str, count: int | None) -> None:
    for name in names:
        print(f"== {name}", flush=True)
        memory = ("--kv-cache-memory", str(CACHE))
        if name in ("start", "ends"):
            start(model) if name == "start" else ends(model, *SETTINGS, *memory)
            continue
        template = ("--chat-template", str(TEMPLATE)) if name == "tools" else ()
        few = FEW_SHAPES if name in ("forms", "tools", "wire") else ()
        with ServerProcess(model, *SETTINGS, *memory, "--max-waiting", "10000", *template, *few) as server:
            sizes = [] if count is None or name not in ("streams", "aborts") else [count]
            asyncio.run(KINDS[name](server, *sizes))
            pids = [server.process.pid, *children(server)]
        check(server.process.returncode == 0, f"exit code {server.process.returncode}")
        check(not (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]), f"processes are left: {left}")
        *said, running = server.said[: 1 + next(at for at, line in enumerate(server.said) if "Uvicorn" in line)]
        check(not (more := server.said[len(said) + 1 :]), f"it complains: {more}")
        print(f"exit code 0, {len(pids)} processes gone, nothing said after {running!r}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int)
    parser.add_argument("--count", type=int, help="streams, and requests that are given up")
    parser.add_argument("names", nargs="*", default=[*KINDS, "ends", "start"])
    args = parser.parse_args()
    if args.layers is not None:
        CACHE = (CACHE // 30 * args.layers) & -(1 << 20)  # of the demo model's layers
    with tempfile.TemporaryDirectory() as folder:
        model = "demo" if args.layers is None else with_layers(args.layers, Path(folder))
        if args.layers is not None:
            os.environ["TPCTL_CACHE"] = folder  # its shards go with it
        main(args.names, model, args.count)
