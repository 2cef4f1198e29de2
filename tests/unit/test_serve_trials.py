"""Grammars that nobody has tried: whose turn it is, and how long anybody waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.fake_engine import FakeEngine
from tests.unit.running import PATIENCE, everything, running, until
from tpctl.client import guides
from tpctl.client.grammar_process import GrammarProcesses
from tpctl.client.guides import Untried, without_trials
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import BusyError, RequestError
from tpctl.serve import threads as threads_module
from tpctl.serve import trials as trials_module
from tpctl.serve.trials import Trials
from tpctl.wire.guide import Guide


class Trying:
    """In the place of processes: each grammar is at work until it is ``let``."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.let: dict[str, threading.Event] = {}

    def __call__(self, guide: Guide) -> None:
        event = self.let.setdefault(guide.text, threading.Event())
        self.begun.append(guide.text)
        assert event.wait(PATIENCE)
        if guide.text.startswith("broken"):
            raise ZeroDivisionError(guide.text)

    def end(self, text: str) -> None:
        self.let.setdefault(text, threading.Event()).set()


def guide(text: str) -> Guide:
    return Guide("regex", text, "regex")


@pytest.fixture
def trying() -> Iterator[Trying]:
    made = Trying()
    yield made
    for event in made.let.values():
        event.set()


def run(trying: Trying, scene: Callable[[Trials], Awaitable[None]], **settings: Any) -> None:
    async def all_of_it() -> None:
        with ThreadPoolExecutor(4) as executor:
            try:
                await scene(Trials(executor, work=trying, **settings))
            finally:
                for event in trying.let.values():
                    event.set()

    asyncio.run(asyncio.wait_for(all_of_it(), PATIENCE))


async def seen(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_clients_take_turns_and_none_has_all_processes(trying: Trying) -> None:
    async def scene(trials: Trials) -> None:
        many = [asyncio.create_task(trials.tried(guide(f"a{n}"), "a")) for n in range(8)]
        await seen(lambda: len(trying.begun) == 2)
        other = [asyncio.create_task(trials.tried(guide(f"b{n}"), "b")) for n in range(2)]
        await seen(lambda: len(trying.begun) == 4)  # though six of the first one's wait
        assert sorted(trying.begun) == ["a0", "a1", "b0", "b1"]
        third = asyncio.create_task(trials.tried(guide("c"), "c"))
        await seen(lambda: "c" in trials._waiting)
        trying.end("b0")
        await seen(lambda: len(trying.begun) == 5)
        assert trying.begun[-1] == "c"
        for task, text in zip((*other, third), ("b0", "b1", "c"), strict=True):
            trying.end(text)
            assert await task is None
        for number in range(8):
            trying.end(f"a{number}")
        assert await asyncio.gather(*many) == [None] * 8
        assert not (trials._open or trials._waiting or trials._at_work)

    run(trying, scene)


def test_the_same_grammar_is_tried_once_and_for_whoever_is_left(trying: Trying) -> None:
    async def scene(trials: Trials) -> None:
        first = [asyncio.create_task(trials.tried(guide(text), "a")) for text in ("x", "y", "same")]
        await seen(lambda: len(trying.begun) == 2)
        again = [asyncio.create_task(trials.tried(guide("same"), client)) for client in ("a", "b")]
        await seen(lambda: "same" in trying.begun)  # by the turn of the second client
        first[2].cancel()
        for text in ("x", "y", "same"):
            trying.end(text)
        assert await asyncio.gather(*again, *first[:2]) == [None] * 4
        assert sorted(trying.begun) == ["same", "x", "y"]
        assert not (trials._open or trials._waiting or trials._at_work)

    run(trying, scene)


def test_what_nobody_waits_for_any_more_is_not_tried(trying: Trying) -> None:
    async def scene(trials: Trials) -> None:
        tasks = [asyncio.create_task(trials.tried(guide(str(n)), "a")) for n in range(6)]
        await seen(lambda: len(trying.begun) == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(trials._open) == 2 and not trials._waiting
        for text in ("0", "1"):
            trying.end(text)
        await seen(lambda: not trials._open)
        assert trying.begun == ["0", "1"]

    run(trying, scene)


def test_nobody_waits_for_ever_and_a_bug_is_told(trying: Trying) -> None:
    async def scene(trials: Trials) -> None:
        tasks = [asyncio.create_task(trials.tried(guide(f"broken{n}"), "a")) for n in range(2)]
        await seen(lambda: len(trying.begun) == 2)
        with pytest.raises(BusyError, match="grammars of others have been compiled for 0 s; try again later"):
            await trials.tried(guide("late"), "a")
        for number in range(2):
            trying.end(f"broken{number}")
        assert [type(one) for one in await asyncio.gather(*tasks, return_exceptions=True)] == [ZeroDivisionError] * 2
        assert trying.begun == ["broken0", "broken1"] and not trials._open

    run(trying, scene, wait=0.05)


def test_work_is_left_for_a_grammar_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, new = GrammarProcesses(), guide("left")
    monkeypatch.setattr(guides, "_processes", processes)
    with pytest.raises(Untried) as left:
        without_trials({}, guides.check_guide, new)
    assert left.value.guide == new and not processes._free
    without_trials({new: None}, guides.check_guide, new)
    for found in ("no", BusyError("later"), RequestError("regex: no")):
        with pytest.raises(type(found) if isinstance(found, Exception) else RequestError, match=r"^(regex: no|later)$"):
            without_trials({new: found}, guides.check_guide, new)
    monkeypatch.setattr(guides, "_tried", lambda guide: None)
    assert guides.tried(new) is None
    without_trials({}, guides.check_guide, new)


def test_a_server_says_that_it_is_busy_with_others_grammars(
    tmp_path_factory: pytest.TempPathFactory, trying: Trying, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    monkeypatch.setattr(guides, "_tried", trying)
    monkeypatch.setattr(threads_module, "Trials", lambda executor: trials_module.Trials(executor, wait=0.2))
    with running(tokenizer, FakeEngine(tokenizer)) as server:
        path = "/v1/completions"
        asked = [server.ask(path, {"prompt": "ab", "regex": f"busy{n}"}) for n in range(2)]
        until(lambda: len(trying.begun) == 2)
        late = server.ask(path, {"prompt": "ab", "regex": "busy"})
        said = everything(late, until=b"}")
        assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in said and b'"code":"busy"' in said
        for number in range(2):
            trying.end(f"busy{number}")
        assert all(everything(sock, until=b"}").startswith(b"HTTP/1.1 200 ") for sock in asked)
