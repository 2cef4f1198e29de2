"""A server with OpenAI's interface that costs next to nothing: each stream has a token a step. For ``sse_cost.py``.

    python benchmarks/sse_source.py STREAMS STEP_MS

It begins when so many requests are there, or there is one alone (a warm-up), and prints its port.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
OPENED = b'data: {"id":"cmpl-5a0c1c31a4e64df8b5f0a0d4","object":"text_completion","created":1764000000,"model":"demo",'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = chunk(
    OPENED + b'"choices":[{"index":0,"text":" molecules","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)


def end(prompt: int, count: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
    last = OPENED + b'"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\ndata: [DONE]\n\n"
    return chunk(last) + b"0\r\n\r\n"


class Source:
    """What the streams share."""

    def __init__(self, streams: int, step: float) -> None:
        self.streams = streams
        self.step = step
        self.open: list[tuple[asyncio.StreamWriter, int]] = []
        self.warm = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return  # the client has gone
            if head.startswith(b"GET"):
                body = b'{"object":"list","data":[{"id":"demo"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                continue
            found = re.search(rb"content-length: (\d+)", head.lower())
            assert found is not None
            asked = json.loads(await reader.readexactly(int(found[1])))
            writer.write(HEAD)
            self.open.append((writer, asked["max_tokens"]))
            if len(self.open) == self.streams or not self.warm:
                self.warm = True
                await self.generate()

    async def generate(self) -> None:
        streams, self.open = self.open, []
        at = time.perf_counter()
        for _ in range(streams[0][1]):
            for writer, _ in streams:
                writer.write(TOKEN)
            at += self.step
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            if not self.step:
                await asyncio.gather(*(writer.drain() for writer, _ in streams))
        for writer, count in streams:
            writer.write(end(1, count))


async def main() -> None:
    source = Source(int(sys.argv[1]), float(sys.argv[2]) / 1000)
    server = await asyncio.start_server(source.serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main())
