"""Requests wait for their grammars; others do not wait for them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tpctl.engine.guiding import gate
from tpctl.engine.guiding.gate import Gate
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.errors import RequestError
from tpctl.wire.guide import Guide
from tpctl.wire.messages import Abort, Add, Message, Outputs, Request, Stop, from_wire, to_wire
from tpctl.wire.sampling import SamplingParams


@dataclass(frozen=True)
class Made:
    """In the place of a matcher."""

    text: str

    def deep_copy(self) -> Made:
        return self


class Slow:
    """In the place of ``Grammars``: each takes until it is ``let``; "bad" is none, "panic" more than an error.

    Attributes:
        begun: texts of what was to be made, in order.
        held: texts that take until their own event comes.
    """

    def __init__(self) -> None:
        self.let = threading.Semaphore(0)
        self.begun: list[str] = []
        self.held: dict[str, threading.Event] = {}
        self.there: dict[Guide, Made] = {}

    def kept(self, guide: Guide) -> Made | None:
        return self.there.get(guide)

    def make(self, guide: Guide) -> Made:
        self.begun.append(guide.text)
        held = self.held.get(guide.text)
        assert self.let.acquire(timeout=30) if held is None else held.wait(30)
        if guide.text == "bad":
            raise RequestError("regex: it is bad")
        if guide.text == "panic":
            raise KeyboardInterrupt("the library's")
        return self.there.setdefault(guide, Made(guide.text))


class Seen:
    """A gate, and what came through it, in order."""

    def __init__(self) -> None:
        self.grammars, self.opened, self.known = Slow(), dict[str, Any](), dict[str, str]()
        self.events: list[Message] = []
        self.gate = Gate(self, self.passed, self.events.append)  # this is its ``Guides``, too

    def open(self, request: Request, matcher: Made) -> None:
        self.opened[request.id] = matcher.text

    def refused(self, request: Request) -> str | None:
        return self.known.get(request.sampling.regex or "")

    def passed(self, message: Message, text: bytes) -> None:
        assert from_wire(json.loads(text)) == message  # the other ranks get the same
        self.events.append(message)

    def take(self, message: Message) -> None:
        self.gate.take(message, json.dumps(to_wire(message)).encode())

    def wait(self, count: int) -> list[Message]:
        """The first so many events."""
        for _ in range(3000):
            if len(self.events) >= count:
                break
            time.sleep(0.01)
        assert len(self.events) == count
        return self.events


@pytest.fixture
def seen() -> Seen:
    return Seen()


def request(id: str, regex: str | None = None) -> Request:
    return Request(id, [1, 2], SamplingParams(regex=regex))


def test_others_pass_while_a_grammar_is_made_ready(seen: Seen) -> None:
    mixed = Add([request("a"), request("b", "slow"), request("c")])
    seen.take(mixed)
    seen.take(Add([request("d")]))
    assert seen.wait(2) == [Add([mixed.requests[0], mixed.requests[2]]), Add([request("d")])]
    seen.take(Add([request("e", "slow"), request("f", "slow")]))
    seen.grammars.let.release()
    passed = [one.id for event in seen.wait(3 + (len(seen.events) > 3))[2:] for one in event.requests]  # type: ignore[union-attr]
    for _ in range(100):
        if len(passed) == 3:
            break
        time.sleep(0.05)
        passed = [one.id for event in seen.events[2:] for one in event.requests]
    assert passed == ["b", "e", "f"] and seen.opened == dict.fromkeys("bef", "slow")


def test_what_fails_ends_its_request_and_no_other(seen: Seen) -> None:
    seen.take(Add([request("a", "bad"), request("b", "good"), request("c", "panic"), request("d", "good")]))
    for _ in range(3):
        seen.grammars.let.release()
    for _ in range(600):
        if sum(len(event.requests) if isinstance(event, Add) else 1 for event in seen.events) == 4:
            break
        time.sleep(0.05)
    told = {one.id: one for event in seen.events if isinstance(event, Outputs) for one in event.outputs}
    passed = [one.id for event in seen.events if isinstance(event, Add) for one in event.requests]
    assert passed == ["b", "d"] and set(told) == {"a", "c"}
    assert (told["a"].finish_reason, told["a"].message) == ("error", "regex: it is bad")
    assert told["c"].message == "regex: KeyboardInterrupt: the library's"
    assert set(seen.opened) == {"b", "d"}


def test_a_request_given_up_while_it_waits_never_reaches_the_ranks(seen: Seen) -> None:
    seen.take(Add([request("a", "slow"), request("b", "other"), request("c", "bad")]))
    seen.take(Abort(["a", "c", "unknown"]))
    for _ in range(3):
        seen.grammars.let.release()
    seen.wait(4)
    told = {one.id: one.finish_reason for event in seen.events if isinstance(event, Outputs) for one in event.outputs}
    assert told == {"a": "abort", "c": "abort"}
    assert [event for event in seen.events if isinstance(event, Add)] == [Add([request("b", "other")])]
    assert set(seen.opened) == {"b"}
    seen.take(Stop())
    assert seen.events[-1] == Stop()


def passed(seen: Seen) -> list[str]:
    """Requests that came through, in order."""
    return [one.id for event in seen.events if isinstance(event, Add) for one in event.requests]


def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


def test_a_grammar_that_takes_long_holds_up_no_other(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "affinity_cores", lambda: 4)  # two threads make them
    let = seen.grammars.held["long"] = threading.Event()
    seen.grammars.let.release(9)
    seen.take(Add([request("a", "known")]))
    until(lambda: passed(seen) == ["a"])
    seen.take(Add([request("b", "long"), request("c", "known"), request("d", "other")]))
    until(lambda: sorted(passed(seen)) == ["a", "c", "d"])
    again = seen.grammars.held["longer"] = threading.Event()
    seen.take(Add([request("e", "longer"), request("f", "known"), request("g", "long")]))
    until(lambda: passed(seen)[-1] == "f")  # though both threads are at work
    seen.take(Add([request("h", "new")]))
    let.set()
    until(lambda: sorted(passed(seen)) == list("abcdfgh"))
    again.set()
    until(lambda: passed(seen)[-1] == "e")
    assert seen.grammars.begun.count("long") == 1 and not seen.gate._waiting and not seen.gate._pending


def test_a_grammar_that_nobody_wants_any_more_is_not_made(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "affinity_cores", lambda: 2)
    let = seen.grammars.held["long"] = threading.Event()
    seen.grammars.let.release(9)
    seen.take(Add([request("a", "long"), request("b", "unwanted"), request("c", "wanted"), request("d", "wanted")]))
    seen.take(Abort(["b", "c"]))
    let.set()
    until(lambda: passed(seen) == ["a", "d"])
    until(lambda: sum(isinstance(event, Outputs) for event in seen.events) >= 1 and not seen.gate._pending)
    told = {one.id: one.finish_reason for event in seen.events if isinstance(event, Outputs) for one in event.outputs}
    assert told == {"b": "abort", "c": "abort"} and seen.grammars.begun == ["long", "wanted"]


def test_without_room_for_a_thread_its_requests_are_refused(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    seen.take(Add([request("a", "slow"), request("b")]))
    told, passed = seen.wait(2)
    assert isinstance(told, Outputs) and told.outputs[0].finish_reason == "error"
    assert told.outputs[0].message is not None and "raise its limit (ulimit -v)" in told.outputs[0].message
    assert passed == Add([request("b")])
    guides = Guides(Slow())
    guides.open(request("a", "slow"), None)  # type: ignore[arg-type]
    item = ScheduledSequence(Sequence("a", [1], SamplingParams(regex="a"), 9), 0, 1, True)
    assert guides.finish(guides.begin([item], 2))[0, -1] == 1 and "raise its limit" in str(item.sequence.problem)
