"""One conversation that takes a chat template long holds up no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tpctl.client import template_pool
from tpctl.client.template_pool import TemplateProcesses
from tpctl.errors import BusyError
from tpctl.serve.errors import ApiError

PATIENCE = 60.0


class Process:
    """In the place of a process; "slow" takes it until it is ``let``."""

    made: list[Process]
    let: threading.Event

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = threading.Event()
        self.closed = False
        Process.made.append(self)

    def render(self, source: str, variables: Any, each: Any) -> dict[str, Any]:
        self.asked.append(source)
        if source == "slow":
            self.begun.set()
            assert Process.let.wait(PATIENCE)
        return {"texts": [source]}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def let(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    Process.made, Process.let = [], threading.Event()
    monkeypatch.setattr(template_pool, "TemplateProcess", Process)
    monkeypatch.setattr(template_pool, "_SOON", 0.01)
    yield Process.let
    Process.let.set()


def test_another_is_started_for_whoever_waits_and_no_other(let: threading.Event) -> None:
    with TemplateProcesses() as pool, ThreadPoolExecutor(1) as others:
        assert [pool.render("quick", {}) for _ in range(3)] == [{"texts": ["quick"]}] * 3
        assert len(Process.made) == 1
        slow = others.submit(pool.render, "slow", {})
        assert Process.made[0].begun.wait(PATIENCE)
        for text in ("quick", "again"):
            assert pool.render(text, {}) == {"texts": [text]}
        assert [one.asked for one in Process.made] == [["quick"] * 3 + ["slow"], ["quick", "again"]]
        let.set()
        assert slow.result(PATIENCE) == {"texts": ["slow"]}
    assert all(one.closed for one in Process.made)


def test_nobody_waits_for_ever(let: threading.Event) -> None:
    with TemplateProcesses(most=2, patience=0.1) as pool, ThreadPoolExecutor(2) as others:
        slow = []
        for number in range(2):
            slow.append(others.submit(pool.render, "slow", {}))
            while len(Process.made) <= number:
                pass
            assert Process.made[number].begun.wait(PATIENCE)
        with pytest.raises(BusyError, match="at work for others for 0 s; try again later") as busy:
            pool.render("quick", {})
        assert len(Process.made) == 2
        told = ApiError.of(busy.value)
        assert (told.status, told.code, told.retry_after) == (503, "busy", 1)
        let.set()
        assert [one.result(PATIENCE)["texts"] for one in slow] == [["slow"]] * 2
        assert pool.render("quick", {}) == {"texts": ["quick"]}
