"""Consumers that share an engine: each hears of its own requests, and none holds up another."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpctl.client.router import Mailbox, Router
from tpctl.errors import EngineError, RequestError
from tpctl.wire.messages import Abort, Add, Output, Request
from tpctl.wire.sampling import SamplingParams


class Engine:
    """Rank 0's side: what it was sent, and whose turn it is to answer."""

    def __init__(self) -> None:
        self.sent: list[Add | Abort] = []
        self.open: list[str] = []
        self.lock = threading.Lock()
        self.ended: EngineError | None = None
        self.router = Router(self.take, lambda: 64)

    def take(self, message: Add | Abort) -> None:
        if self.ended is not None:
            raise self.ended
        with self.lock:
            self.sent.append(message)
            if isinstance(message, Add):
                self.open += [request.id for request in message.requests]

    def say(self, *outputs: Output) -> None:
        self.router.deliver(outputs)

    def die(self) -> None:
        self.ended = EngineError("rank 1 was killed (SIGKILL)")
        self.router.fail(self.ended)


def request(id: str, *token_ids: int) -> Request:
    return Request(id, list(token_ids or (1, 2)), SamplingParams())


def tokens(outputs: Sequence[Output]) -> list[tuple[str, list[int]]]:
    return [(output.id, output.token_ids) for output in outputs]


def test_requests_of_one_name_do_not_meet() -> None:
    engine = Engine()
    one, other = engine.router.mailbox(), engine.router.mailbox()
    one.submit([request("a"), request("b")])
    other.submit([request("a")])
    a, b, others = engine.open
    assert len({a, b, others}) == 3
    engine.say(Output(others, [7]), Output(b, [8]), Output(a, [9], "stop"), Output("nobody's", [1]))
    assert tokens(one.outputs()) == [("b", [8]), ("a", [9])]
    assert tokens(other.outputs()) == [("a", [7])]
    assert one.outputs(timeout=0) == other.outputs(timeout=0) == []
    one.submit([request("a")])  # it has ended, so its name is free
    with pytest.raises(ValueError, match="'b' is under way"):
        one.submit([request("b")])


def test_a_prompt_that_does_not_fit_holds_all_of_them_back() -> None:
    engine = Engine()
    mailbox = engine.router.mailbox()
    with pytest.raises(RequestError, match=r"70 tokens.* 63 "):
        mailbox.submit([request("a"), request("long", *[1] * 70)])
    assert engine.sent == []
    mailbox.submit([request("a")])
    mailbox.submit([])
    mailbox.abort([])
    assert len(engine.sent) == 1


def test_an_abort_is_of_one_s_own_and_is_answered() -> None:
    engine = Engine()
    one, other = engine.router.mailbox(), engine.router.mailbox()
    for mailbox in (one, other):
        mailbox.submit([request("a")])
    one.abort(["a"])
    assert engine.sent[-1] == Abort([engine.open[0]])
    engine.say(Output(engine.open[0], [], "abort"), Output(engine.open[1], [5]))
    assert one.outputs() == [Output("a", [], "abort")]
    assert other.outputs() == [Output("a", [5])]


def test_closing_gives_up_what_is_under_way() -> None:
    engine = Engine()
    with engine.router.mailbox() as mailbox:
        mailbox.submit([request("a"), request("b")])
        ended, left = engine.open
        engine.say(Output(ended, [4], "length"), Output(left, [5]))
    assert engine.sent[-1] == Abort([left])
    count = len(engine.sent)
    engine.say(Output(left, [6]), Output(left, [], "abort"))  # nobody's any more
    mailbox.close()
    assert len(engine.sent) == count
    assert tokens(mailbox.outputs()) == [("a", [4]), ("b", [5])]
    assert mailbox.outputs(timeout=0) == []


def test_when_the_engine_dies_all_who_wait_hear_why() -> None:
    engine = Engine()
    mailboxes = [engine.router.mailbox() for _ in range(4)]
    for mailbox in mailboxes:
        mailbox.submit([request("a")])
    engine.say(*(Output(id, [3]) for id in engine.open))

    def read(mailbox: Mailbox) -> list[Output]:
        found: list[Output] = []
        with pytest.raises(EngineError, match="rank 1 was killed"):
            while True:
                found += mailbox.outputs()
        return found

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(read, mailbox) for mailbox in mailboxes]
        engine.die()
        # What was said before comes first.
        assert [tokens(found.result(timeout=30)) for found in waiting] == [[("a", [3])]] * 4
    for mailbox in [*mailboxes, engine.router.mailbox()]:  # and so do those that ask again, or come late
        with pytest.raises(EngineError, match="rank 1 was killed"):
            mailbox.outputs()
        mailbox.close()  # says nothing of what it cannot abort


def test_a_consumer_that_does_not_read_holds_up_nobody() -> None:
    engine = Engine()
    lazy, eager = engine.router.mailbox(), engine.router.mailbox()
    for mailbox in (lazy, eager):
        mailbox.submit([request("a")])
    for step in range(10_000):
        engine.say(*(Output(id, [step]) for id in engine.open))
        assert tokens(eager.outputs(timeout=30)) == [("a", [step])]
    assert [lazy.outputs()[0].token_ids[0] for _ in range(10_000)] == list(range(10_000))


def test_interleaved_requests_of_many_threads() -> None:
    """Each consumer asks for sequences that count up from a number; the engine answers all, mixed at random."""
    engine, consumers, each, length = Engine(), 6, 40, 7
    rng = random.Random(0)
    stop = threading.Event()

    def compute() -> None:
        left: dict[str, list[int]] = {}
        seen = 0
        while not stop.is_set():
            with engine.lock:
                added, seen = engine.sent[seen:], len(engine.sent)
            for message in added:
                assert isinstance(message, Add)
                left |= {r.id: [r.token_ids[0] + n for n in range(length)] for r in message.requests}
            chosen = rng.sample(sorted(left), len(left) // 2 + (len(left) == 1))
            outputs = [Output(id, [left[id].pop(0)], None if left[id] else "length") for id in chosen]
            left = {id: rest for id, rest in left.items() if rest}
            engine.say(*outputs)

    def consume(number: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        with engine.router.mailbox() as mailbox:
            for n in range(0, each, 4):
                mailbox.submit([request(str(m), 1000 * number + m) for m in range(n, n + 4)])
            open_requests = each
            while open_requests:
                for output in mailbox.outputs(timeout=30):
                    found.setdefault(output.id, []).extend(output.token_ids)
                    open_requests -= output.finish_reason is not None
        return found

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    with ThreadPoolExecutor(consumers) as pool:
        results = list(pool.map(consume, range(consumers)))
    stop.set()
    thread.join(30)
    for number, found in enumerate(results):
        assert found == {str(m): [1000 * number + m + n for n in range(length)] for m in range(each)}
