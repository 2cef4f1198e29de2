"""Clients of a server that are odd on the wire: late bytes, bytes behind a request, sending sides that end."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from tests.distributed.server_process import ServerProcess
from tests.distributed.soak_checks import MOST_ROUNDS, Memory, check, is_whole
from tests.distributed.soak_client import connected, free, heard, idle, request

AT_ONCE = 100
COUNT = 400
ROUNDS = 8
TOKENS = 12

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
READY = b'{"status":"ready"}'

Odd = Callable[[ServerProcess, random.Random, int], Awaitable[str]]


def body(number: int, stream: bool = True) -> dict[str, Any]:
    asked = {"prompt": f"Story {number}:", "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
    return {**asked, "stream_options": {"include_usage": True}} if stream else asked


async def late(server: ServerProcess, draw: random.Random, number: int) -> str:
    """A request that comes in pieces."""
    raw = request(body(number))
    reader, writer = await connected(server)
    cuts = sorted(draw.sample(range(1, len(raw)), draw.randrange(1, 6)))
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        writer.write(raw[begin:end])
        await asyncio.sleep(draw.choice([0, 0.001, 0.02, 0.1]))
    found = await _rest(reader)
    writer.close()
    check(is_whole(found, TOKENS), f"a late request is answered with {found[-600:]!r}")
    return "late"


async def stray(server: ServerProcess, draw: random.Random, number: int) -> str:
    """Bytes behind a last request, at once, while its answer comes, and behind that."""
    reader, writer = await connected(server)
    behind = draw.choice([b"\r\n", HEALTH, b"\x16\x03\x01" * 50_000, b"x" * 3_000_000])
    writer.write(request(body(number)))
    if draw.random() < 0.3:
        writer.write(behind)
    await asyncio.sleep(draw.choice([0, 0.02, 0.2]))
    writer.write(behind)
    found = await _rest(reader)
    writer.write(behind)
    await asyncio.wait_for(writer.drain(), 60)  # none of it is refused
    writer.close()
    check(is_whole(found, TOKENS), f"bytes behind a request lose its answer: {found[-600:]!r}")
    return "stray"


async def ahead(server: ServerProcess, draw: random.Random, number: int) -> str:
    """Several requests at once, which are answered in turn."""
    reader, writer = await connected(server)
    writer.write(request(body(number, stream=False), more="") + b"\r\n" * draw.randrange(3) + HEALTH)
    writer.write(request(body(number)))
    found = await _rest(reader)
    writer.close()
    first, _, rest = found.partition(READY)
    whole = rest[rest.find(b"HTTP/1.1 ") :]
    answered = first[: first.rindex(b"HTTP/1.1 ")]
    check(heard(answered).reason == "length" and is_whole(whole, TOKENS), f"requests ahead: {found!r}")
    return "ahead"


async def half(server: ServerProcess, draw: random.Random, number: int) -> str:
    """A client whose sending side ends, within its request or behind it: it has hung up, and is told nothing wrong."""
    raw = request(body(number, stream=number % 2 == 0), more=draw.choice(["", "connection: close\r\n"]))
    reader, writer = await connected(server)
    writer.write(raw[: draw.choice([0, 20, len(raw) - 5, len(raw), len(raw)])])
    await asyncio.sleep(draw.choice([0, 0.01, 0.1]))
    with suppress(OSError):
        writer.write_eof()
    found = b""
    with suppress(ConnectionError):
        found = await asyncio.wait_for(_rest(reader), 60)
    writer.close()
    check(not found or found.startswith(b"HTTP/1.1 200 "), f"whoever ends the sending side hears {found[:300]!r}")
    return "half-closed, and heard all of it" if is_whole(found, TOKENS) else "half-closed"


async def refused(server: ServerProcess, draw: random.Random, number: int) -> str:
    """A body of 20 MB that goes on being sent while it is refused."""
    reader, writer = await connected(server)
    writer.write(request(b"x" * 20_000_000, more=draw.choice(["", "connection: close\r\n"])))
    await asyncio.wait_for(writer.drain(), 60)
    found = await reader.read(1 << 16)
    writer.close()
    check(found.startswith(b"HTTP/1.1 413 "), f"20 MB are answered with {found[:300]!r}")
    return "refused"


async def broken(server: ServerProcess, draw: random.Random, number: int) -> str:
    """No HTTP behind a request whose answer is whole all the same."""
    reader, writer = await connected(server)
    writer.write(request(body(number, stream=False), more="") + b"\x00\x01 no HTTP\r\n\r\n")
    found = await _rest(reader)
    writer.close()
    first, _, second = found.partition(b"HTTP/1.1 400 ")
    check(heard(first).reason == "length" and b"is no HTTP" in second, f"no HTTP behind a request: {found!r}")
    return "broken"


KINDS: list[tuple[Odd, int]] = [(late, 8), (stray, 8), (ahead, 6), (half, 8), (broken, 4), (refused, 1)]


async def wire(server: ServerProcess, cache: int, count: int = COUNT) -> None:
    draw = random.Random(0)
    gate = asyncio.Semaphore(AT_ONCE)
    memory = Memory(server, cache)
    kinds = [kind for kind, _ in KINDS]

    async def one(kind: Odd, number: int) -> str:
        async with gate:
            return await kind(server, draw, number)

    for round in range(MOST_ROUNDS):
        started = time.monotonic()
        chosen = draw.choices(kinds, [share for _, share in KINDS], k=count)
        found = Counter(await asyncio.gather(*(one(kind, round * count + at) for at, kind in enumerate(chosen))))
        free(server)
        idle(server)
        seconds = time.monotonic() - started
        said = ", ".join(f"{number} {name}" for name, number in sorted(found.items()))
        print(f"round {round + 1}: {said}, in {seconds:.1f} s, {memory.look()}", flush=True)
        if round + 1 >= ROUNDS and memory.steady():
            break
    memory.check()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while piece := await reader.read(1 << 20):
        found += piece
    return found
