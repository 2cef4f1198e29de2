"""Several engines behind one server: who is given what, and what becomes of the others when one ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import served
from tpctl.client.fields import FieldError
from tpctl.client.reasoning_stream import Segment
from tpctl.client.router import Router
from tpctl.client.text_stream import TextStream
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, RequestError, again
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation, Gone, Piece
from tpctl.serve.metrics import Metrics
from tpctl.serve.pool import AFFINITY_SLACK, Job, Pool
from tpctl.wire.messages import Output
from tpctl.wire.sampling import SamplingParams

PATIENCE = 30.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_tokenizer(folder))


def job(tokenizer: Tokenizer, text: str, answers: int = 1) -> Job:
    ids = tokenizer.encode(text)
    streams = [TextStream(tokenizer, (), ids) for _ in range(answers)]
    return Job(ids, [SamplingParams(max_tokens=100)] * answers, streams)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def opened(engines: list[FakeEngine], most: int = 1000) -> tuple[Pool, list[str]]:
    failures: list[str] = []
    pool = Pool(engines, Metrics(), most=most, on_failure=lambda reason: failures.append(str(reason)))
    await pool.wait_ready()
    return pool, failures


def closed(*engines: FakeEngine) -> None:
    for engine in engines:
        engine.gate.clear()


def test_what_begins_alike_goes_to_one_engine_until_that_has_more_to_do(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        engines = [FakeEngine(tokenizer) for _ in range(3)]
        closed(*engines)
        pool, _ = await opened(engines)
        begun = "the same beginning of all of them, which is longer than what is looked at, "
        generations = [pool.begin([job(tokenizer, begun + str(number))]) for number in range(AFFINITY_SLACK + 1)]
        await until(lambda: sum(len(engine.open) for engine in engines) == AFFINITY_SLACK + 1)
        assert sorted(len(engine.open) for engine in engines) == [0, 0, AFFINITY_SLACK + 1]
        generations += [pool.begin([job(tokenizer, begun + str(number))]) for number in range(100)]
        await until(lambda: sum(len(engine.requests) for engine in engines) == AFFINITY_SLACK + 101)
        loads = [len(engine.open) for engine in engines]
        assert max(loads) - min(loads) <= AFFINITY_SLACK + 1
        for engine in engines:
            engine.gate.set()
        for generation in generations:
            await generation.finish()
        assert pool.under_way == 0
        await pool.close()

    asyncio.run(run())


def test_different_prompts_are_spread(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        engines = [FakeEngine(tokenizer) for _ in range(2)]
        closed(*engines)
        pool, _ = await opened(engines)
        for number in range(40):
            pool.begin([job(tokenizer, f"{number} prompts")])
        await until(lambda: sum(len(engine.open) for engine in engines) == 40)
        assert min(len(engine.open) for engine in engines) >= 15
        pool.give_up(ApiError(503, "enough"))
        await until(lambda: not any(engine.open for engine in engines))
        await pool.close()

    asyncio.run(run())


def test_one_engine_s_end_is_everybody_s(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        engines = [FakeEngine(tokenizer) for _ in range(2)]
        closed(*engines)
        pool, failures = await opened(engines)
        generations = [pool.begin([job(tokenizer, f"{number} prompts", answers=2)]) for number in range(10)]
        await until(lambda: all(engine.open for engine in engines))
        engines[0].die("rank 0 was killed (SIGKILL)")
        for generation in generations:
            with pytest.raises(ApiError, match=r"the engine has ended: rank 0 was killed \(SIGKILL\)"):
                await asyncio.wait_for(generation.finish(), PATIENCE)
        await until(lambda: not engines[1].open)
        assert failures == ["rank 0 was killed (SIGKILL)"] and pool.under_way == 0
        with pytest.raises(ApiError, match="the engine has ended"):
            pool.check_open()
        await pool.close()
        assert isinstance(pool.failure, EngineError)

    asyncio.run(run())


def test_what_reaches_an_engine_after_its_end_is_told_of_the_end(tokenizer: Tokenizer) -> None:
    """The sender may come to a request before the loop comes to what the client's reader said."""

    async def run() -> None:
        engine = FakeEngine(tokenizer)
        pool, failures = await opened([engine])
        engine.failure = EngineError("rank 0 was killed (SIGKILL)")  # and its reader has not said so
        generation = pool.begin([job(tokenizer, "a prompt", answers=2)])
        with pytest.raises(ApiError, match="the engine has ended: rank 0 was killed") as caught:
            await asyncio.wait_for(generation.finish(), PATIENCE)
        assert caught.value.code == "engine_ended" and failures == ["rank 0 was killed (SIGKILL)"]
        await pool.close()

    asyncio.run(run())


def test_an_engine_that_cannot_start(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        engines = [FakeEngine(tokenizer), FakeEngine(tokenizer, loading=True)]
        failures: list[str] = []
        pool = Pool(engines, Metrics(), most=9, on_failure=lambda reason: failures.append(str(reason)))
        asyncio.get_running_loop().call_later(0.05, engines[1].die, "no room for a KV cache")
        with pytest.raises(EngineError, match="no room for a KV cache"):
            await pool.wait_ready()
        assert failures == ["no room for a KV cache"] and not pool.ready
        await pool.close()

    asyncio.run(run())


def test_what_is_closed_is_told_once_and_wakes_who_waits(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        told: list[int] = []
        generation = Generation([TextStream(tokenizer)], lambda: told.append(1))
        waiting = asyncio.create_task(generation.finish())
        await asyncio.sleep(0)
        generation.close()
        generation.close()
        with pytest.raises(Gone):
            await waiting
        assert told == [1] and generation.done

    asyncio.run(run())


def test_what_takes_an_engine_long_is_told(tokenizer: Tokenizer) -> None:
    async def run() -> list[str]:
        engine, told = FakeEngine(tokenizer, loading=True), []
        pool = Pool([engine], Metrics(), most=9)
        asyncio.get_running_loop().call_later(0.05, engine.ready.set)
        await pool.wait_ready(told.append)
        await pool.close()
        return told

    assert asyncio.run(run()) == ["compiling 113 kernels"]


def test_the_first_token_is_told_at_once_and_others_together(tokenizer: Tokenizer) -> None:
    async def run() -> list[tuple[int, int]]:
        generation = Generation([TextStream(tokenizer)], lambda: None, interval=3)
        sizes: list[tuple[int, int]] = []  # of each piece, and the tokens that had come when it was told

        async def read() -> None:
            while pieces := await generation.next(taken):
                sizes.extend((piece.tokens, len(generation.streams[0].token_ids)) for piece in pieces)

        def taken(pieces: list[Piece]) -> bool:
            sizes.extend((piece.tokens, len(generation.streams[0].token_ids)) for piece in pieces)
            return True

        reading = asyncio.create_task(read())
        for place in range(9):
            await asyncio.sleep(0)
            generation.push(0, Output("0", [5], "length" if place == 8 else None))
            generation.flush()
        await reading
        return sizes

    assert asyncio.run(run()) == [(1, 1), (3, 4), (3, 7), (2, 9)]


@pytest.mark.parametrize("interval", [1, 3])
def test_mere_text_is_told_as_such(tokenizer: Tokenizer, interval: int) -> None:
    """Each token's, half a character for none, until it is not taken: then it is returned, before what comes behind."""

    async def run() -> list[object]:
        stream = TextStream(tokenizer)
        generation, told = Generation([stream], lambda: None, interval=interval), []
        ids = [*tokenizer.encode("ab"), *tokenizer.encode("🙂"), *tokenizer.encode("cdefg")]
        assert len(ids) == 2 + 4 + 5
        takes = True

        def taken(pieces: list[Piece]) -> bool:
            told.append([(piece.first, piece.tokens, *piece.segments) for piece in pieces])
            return takes

        def taken_text(text: str) -> bool:
            told.append(text)
            return takes

        async def read() -> None:
            while pieces := await generation.next(taken, taken_text):
                told.extend(pieces)

        reading = asyncio.create_task(read())
        for place, id in enumerate(ids):
            await asyncio.sleep(0)
            takes = place < 7
            generation.push(0, Output("0", [id], "length" if id == ids[-1] else None))
            generation.flush()
        await reading
        assert stream.text == "ab🙂cdefg" and generation.num_tokens == len(ids)
        assert [one.kind for one in stream.turns] == ["message"]
        return told

    a, d, e, f, g, three = map(Segment, ("a", "d", "e", "f", "g", "def"))
    one_by_one = ["d", Piece(0, [d], 7, 1, None), "e", Piece(0, [e], 8, 1, None), "f", Piece(0, [f], 9, 1, None)]
    told = {1: ["b", "🙂", "c", *one_by_one], 3: ["b", "🙂c", "def", Piece(0, [three], 7, 3, None)]}[interval]
    assert asyncio.run(run()) == [[(0, 1, a)], *told, Piece(0, [g], 10, 1, "length")]


def test_every_answers_first_token_is_told_at_once(tokenizer: Tokenizer) -> None:
    """The second one's, too, which comes while the first is told of eight tokens at a time."""

    async def run() -> list[tuple[int, int]]:
        generation = Generation([TextStream(tokenizer), TextStream(tokenizer)], lambda: None, interval=8)
        told: list[tuple[int, int]] = []

        def taken(pieces: list[Piece]) -> bool:
            told.extend((piece.at, piece.tokens) for piece in pieces)
            return True

        reading = asyncio.create_task(generation.next(taken))
        await asyncio.sleep(0)
        for at in (0, 0, 0, 1, 1):
            generation.push(at, Output(str(at), [5], None))
            generation.flush()
        reading.cancel()
        return told

    assert asyncio.run(run()) == [(0, 1), (0, 2), (1, 1)]


def test_what_one_answer_fails_at_is_no_other_ones(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        cancelled: list[int] = []
        generation = Generation([TextStream(tokenizer)], lambda: cancelled.append(1))

        def broken(pieces: list[Piece]) -> bool:
            raise ValueError("it has no words")

        reading = asyncio.create_task(generation.next(broken))
        await asyncio.sleep(0)
        generation.push(0, Output("0", [5], None))
        generation.flush()  # where the next generation's turn comes after it
        assert [piece.tokens for piece in await reading] == [1] and cancelled == [1]
        with pytest.raises(ValueError, match="it has no words"):
            await generation.next()

    asyncio.run(run())


def test_several_engines_are_counted_one_by_one(tokenizer: Tokenizer) -> None:
    with served(tokenizer, FakeEngine(tokenizer), FakeEngine(tokenizer)) as (client, _):
        lines = client.get("/metrics").text.splitlines()
        assert [line for line in lines if line.startswith("tpctl_preemptions_total{")] == [
            'tpctl_preemptions_total{engine="0"} 3.0',
            'tpctl_preemptions_total{engine="1"} 3.0',
        ]


def test_refusals_keep_nothing_of_those_who_are_refused(tokenizer: Tokenizer) -> None:
    def refused(ask: Callable[[], object]) -> None:
        with pytest.raises(ApiError, match="ending") as told:
            ask()
        assert (told.value.status, told.value.code, told.value.retry_after) == (503, "ending", 5)

    def enter(pool: Pool) -> None:
        with pool.preparing():
            pytest.fail("it was let in")

    async def waiting(pool: Pool) -> None:
        with pool.preparing():
            await asyncio.sleep(PATIENCE)

    async def run() -> None:
        pool, _ = await opened([FakeEngine(tokenizer)])
        reason = pool.closing = ApiError(503, "the server is ending", code="ending", retry_after=5)
        for _ in range(3):
            refused(pool.check_open)
        cut = [asyncio.create_task(waiting(pool)) for _ in range(2)]
        await until(lambda: len(pool._preparing) == 2)
        pool.give_up(reason)
        told = await asyncio.gather(*cut, return_exceptions=True)
        assert [str(one) for one in told] == [str(reason)] * 2
        for _ in range(3):
            refused(lambda: enter(pool))
            refused(lambda: pool.begin([job(tokenizer, "ab")]))
        assert reason.__traceback__ is None and reason.__context__ is None
        await pool.close()

    asyncio.run(run())


def test_an_error_again_is_the_same_without_its_frames() -> None:
    for error in (RequestError("too long"), FieldError("n", "is 0"), ApiError(503, "ending", code="c", retry_after=5)):
        try:
            raise error from ValueError("a")
        except type(error):
            new = again(error)
        assert type(new) is type(error) and str(new) == str(error) and vars(new) == vars(error)
        assert new is not error and new.__traceback__ is new.__cause__ is new.__context__ is None


def test_an_engine_s_end_keeps_nothing_of_those_who_are_told() -> None:
    router = Router(lambda message: None, lambda: 100)
    boxes, reason = [router.mailbox() for _ in range(2)], EngineError("rank 0 was killed")
    router.fail(reason)
    for box in [*boxes, router.mailbox()] * 3:
        with pytest.raises(EngineError, match="rank 0 was killed"):
            box.outputs(timeout=PATIENCE)
    assert reason.__traceback__ is None and reason.__context__ is None
