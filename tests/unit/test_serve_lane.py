"""What goes wrong with one of a server's engines, or with one answer of a step, is nobody else's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tests.unit.test_serve_pool import PATIENCE, closed, job, opened, until
from tpctl.client.reasoning_stream import Segment
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError
from tpctl.serve import endpoints, lane
from tpctl.serve import pool as pool_module
from tpctl.serve.asked import Reader
from tpctl.serve.endpoints import Endpoints
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Piece
from tpctl.serve.lane import Lane
from tpctl.serve.threads import Threads
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineStats


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_what_fails_in_a_step_costs_no_other_answer_its_tokens(tokenizer: Tokenizer) -> None:
    class Broken(TextStream):
        def push(self, output: Output) -> list[Segment]:
            raise ValueError("it has no words")

    async def run() -> None:
        engine = FakeEngine(tokenizer)
        closed(engine)
        pool, _ = await opened([engine])
        bad = job(tokenizer, "bad")
        bad.streams = [Broken(tokenizer)]
        first = pool.begin([job(tokenizer, "first")])
        await until(lambda: first.streams[0].token_ids)  # of a step that it was let into
        broken, last = pool.begin([bad]), pool.begin([job(tokenizer, "last")])
        await until(lambda: len(engine.open) == 3)
        engine.gate.set()  # each step brings something to all of them, in this order
        for generation, text in ((first, "<first>"), (last, "<last>")):
            await asyncio.wait_for(generation.finish(), PATIENCE)
            assert generation.streams[0].text == text
        with pytest.raises(ValueError, match="it has no words"):
            await broken.finish()
        await until(lambda: len(engine.aborted) == 1)
        await pool.close()

    asyncio.run(run())


class Silent(FakeEngine):
    """Says what a test says for it."""

    def _run(self) -> None:
        pass


def test_what_comes_while_the_loop_is_busy_is_told_together(tokenizer: Tokenizer) -> None:
    """One write for what several steps brought an answer, and the engine's end keeps its place behind it."""

    async def run() -> None:
        engine = Silent(tokenizer)
        pool, _ = await opened([engine])
        generation, told = pool.begin([job(tokenizer, "abc")]), []

        def taken(pieces: list[Piece]) -> bool:
            told.append([(piece.tokens, "".join(segment.text for segment in piece.segments)) for piece in pieces])
            return True

        reading = asyncio.create_task(generation.next(taken))
        await until(lambda: len(engine.open) == 1)
        (id,) = engine.open
        for text in ("ab", "c", "d"):  # what comes before the loop has its turn
            for letter in text:
                engine.router.deliver([Output(id, tokenizer.encode(letter))])
            if text != "d":
                await asyncio.sleep(0)
        engine.die("rank 0 was killed (SIGKILL)")
        assert [piece.tokens for piece in await reading] == [1]
        with pytest.raises(ApiError, match="the engine has ended: rank 0 was killed"):
            await generation.next()
        assert told == [[(2, "ab")], [(1, "c")]] and generation.streams[0].text == "abcd"
        await pool.close()

    asyncio.run(run())


def test_an_engine_that_is_never_waited_for_keeps_nothing_from_being_told(tokenizer: Tokenizer) -> None:
    engine, told = Silent(tokenizer), []

    class Fast(TextStream):
        def push(self, output: Output) -> list[Segment]:
            if len(self.token_ids) < 3:
                engine.router.deliver([output])
            return super().push(output)

    async def run() -> None:
        pool, _ = await opened([engine])
        one = job(tokenizer, "abc")
        one.streams = [Fast(tokenizer, ["stop"])]
        generation = pool.begin([one])

        def taken(pieces: list[Piece]) -> bool:
            told.append([piece.tokens for piece in pieces])
            return True

        reading = asyncio.create_task(generation.next(taken))
        await until(lambda: len(engine.open) == 1)
        engine.router.deliver([Output(next(iter(engine.open)), tokenizer.encode("a"))])
        await until(lambda: len(one.streams[0].token_ids) == 4)
        reading.cancel()
        await pool.close()

    asyncio.run(run())
    assert told == [[1]] * 4


@pytest.mark.parametrize("raised", [RequestError("no token"), ValueError("a bug")])
def test_an_answer_that_cannot_be_told_is_counted_once(tokenizer: Tokenizer, raised: Exception) -> None:
    """As an error, and so are the others to the same request, of which nobody had enough."""

    class Broken(TextStream):
        def push(self, output: Output) -> list[Segment]:
            raise raised

    async def run() -> None:
        pool, _ = await opened([FakeEngine(tokenizer)])
        bad = job(tokenizer, "bad", answers=3)
        bad.streams = [TextStream(tokenizer), Broken(tokenizer), TextStream(tokenizer)]
        with pytest.raises((ApiError, ValueError), match=str(raised)):
            await pool.begin([bad]).finish()
        lines = pool.metrics.exposition({}, 0).decode().splitlines()
        ends = {"stop": 0, "length": 0, "tool_calls": 0, "abort": 0, "error": 3}
        assert all(f'tpctl_answers_total{{finish_reason="{reason}"}} {n}.0' in lines for reason, n in ends.items())
        assert not pool.under_way
        await pool.close()

    asyncio.run(run())


def test_what_cannot_be_sent_is_not_waited_for(tokenizer: Tokenizer) -> None:
    def say(tokenizer: Tokenizer, request: Request) -> str:
        raise ValueError("no message can be made of it")

    async def run() -> None:
        pool, failures = await opened([FakeEngine(tokenizer, say=say)])
        generation = pool.begin([job(tokenizer, "a prompt", answers=2)])
        with pytest.raises(ValueError, match="no message can be made of it"):
            await asyncio.wait_for(generation.finish(), PATIENCE)
        assert not pool.under_way and not failures
        await pool.close()

    asyncio.run(run())


class Hung(FakeEngine):
    """Says nothing of itself until it is ``let``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.let = threading.Event()
        self.asked = 0

    def stats(self) -> EngineStats:
        self.asked += 1
        self.let.wait(PATIENCE)
        return super().stats()

    def close(self) -> None:
        super().close()
        self.let.set()


def test_an_engine_that_hangs_keeps_nobody_waiting(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "STATS_SECONDS", 0.005)
    hung = Hung(tokenizer)
    with served(tokenizer, hung, FakeEngine(tokenizer)) as (client, _):
        other = 'tpctl_kv_blocks{engine="1"} 10.0'
        told: list[str] = []
        for _ in range(40):  # more than there are threads for anything
            lines = client.get("/metrics").text.splitlines()
            told += [line for line in lines if line.startswith("tpctl_kv_blocks{")]
        assert hung.asked == 1 and set(told) <= {other}
        while other not in client.get("/metrics").text.splitlines():  # which a busy machine may not tell in time
            pass
        hung.let.set()
        while 'tpctl_kv_blocks{engine="0"} 10.0' not in client.get("/metrics").text.splitlines():
            pass


def test_an_engine_that_says_nothing_is_told_of(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        engine = Hung(tokenizer)
        closed(engine)
        pool, _ = await opened([engine])
        answers = Endpoints(pool, Reader(tokenizer, {}, Threads()), ("demo",))
        monkeypatch.setattr(lane, "_QUIET", 0.0)
        generation = pool.begin([job(tokenizer, "a prompt")])
        await until(lambda: engine.open)
        assert not pool.stalled
        await until(lambda: engine.asked)
        monkeypatch.setattr(pool_module, "STALLED_SECONDS", 0.0)
        await until(lambda: pool.stalled)
        assert answers.health().status == 503 and answers.health().body == b'{"status":"stalled"}'
        engine.let.set()  # it was in a long step: its counters come, and no tokens yet
        await until(lambda: engine.asked > 2 if not pool.stalled else False)
        monkeypatch.setattr(pool_module, "STALLED_SECONDS", PATIENCE)
        assert answers.health().status == 200
        engine.gate.set()
        await asyncio.wait_for(generation.finish(), PATIENCE)
        await pool.close()

    asyncio.run(run())


def test_an_engine_that_hangs_is_closed(tokenizer: Tokenizer) -> None:
    """Though every thread of the loop's own waits for one."""

    async def run() -> None:
        let = threading.Event()
        pool, _ = await opened([Hung(tokenizer)])
        loop = asyncio.get_running_loop()
        waiting = [loop.run_in_executor(None, let.wait, PATIENCE) for _ in range(64)]
        asking = asyncio.create_task(pool.stats())
        await asyncio.wait_for(pool.close(), PATIENCE / 2)
        let.set()
        await asyncio.gather(asking, *waiting)

    asyncio.run(run())


@pytest.mark.parametrize("body", ["chat", "texts", "response"])
def test_what_fails_once_prompts_were_handed_in_leaves_no_request(
    tokenizer: Tokenizer, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of an answer is made when an engine has begun; of the answer there is then nobody to hang up on."""
    path, sent = {
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        "texts": ("/v1/completions", {"prompt": ["ab", "c"], "n": 2}),
        "response": ("/v1/responses", {"input": "Hi"}),
    }[body]

    def broken(*_: object) -> None:
        raise ValueError("it has no words")

    for name in ("ChatWriter", "TextWriter", "ResponseWriter"):
        monkeypatch.setattr(endpoints, name, broken)
    engine = FakeEngine(tokenizer)
    with served(tokenizer, engine) as (client, server):
        closed(engine)
        assert client.post(path, json=sent).status_code == 500
        (note,) = server.notes
        assert "it has no words" in note
        assert server.pool is not None and not server.pool.under_way
        engine.gate.set()
        while len(engine.aborted) < (4 if body == "texts" else 1):
            time.sleep(0.01)


def test_a_prompt_that_cannot_be_handed_in_takes_those_before_it_back(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = FakeEngine(tokenizer)
        closed(engine)
        pool, _ = await opened([engine])
        submit, calls = Lane.submit, []

        def submitted(self: Lane, requests: Sequence[Request]) -> None:
            calls.append(requests)
            if len(calls) == 3:
                raise RuntimeError("cannot schedule new futures after shutdown")
            submit(self, requests)

        monkeypatch.setattr(Lane, "submit", submitted)
        with pytest.raises(RuntimeError, match="cannot schedule"):
            pool.begin([job(tokenizer, text) for text in "abcd"])
        assert not pool.under_way
        engine.gate.set()
        await until(lambda: len(engine.requests) == 2 and {one.id for one in engine.requests} <= set(engine.aborted))
        await pool.close()

    asyncio.run(run())
