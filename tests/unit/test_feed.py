"""What rank 0 hears reaches the other ranks step by step, over real connections."""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpctl.engine import feed
from tpctl.engine.feed import Follower, Leader
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.guides import Guides
from tpctl.wire.channel import Channel
from tpctl.wire.messages import Abort, Message, Stop

RANKS = 3
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # ends on purpose


def group(said: queue.SimpleQueue[str]) -> Any:
    """A ``TPGroup`` whose broadcast goes through ``said``, once a rank."""

    def broadcast(text: str) -> str:
        if not text:
            return said.get(timeout=30)
        for _ in range(RANKS - 1):
            said.put(text)
        return text

    return SimpleNamespace(rank=0, size=RANKS, broadcast_text=broadcast)


Ends = tuple[Channel, Leader, list[Follower]]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """The front's end, rank 0's, and the others'; a rank that would end its process ends its thread."""
    monkeypatch.setattr(feed.os, "_exit", sys.exit)
    one, other = socket.socketpair()
    ranks, followers = group(queue.SimpleQueue()), []
    threads = [threading.Thread(target=lambda: followers.append(Follower(ranks))) for _ in range(RANKS - 1)]
    for thread in threads:
        thread.start()
    leader = Leader(ranks, Channel(other), Guides(Grammars(Path("nowhere"))))
    for thread in threads:
        thread.join()
    front = Channel(one)
    yield front, leader, followers
    front.close()
    for thread in threading.enumerate():
        if thread.name == "tpctl-listen":
            thread.join()


def test_every_rank_has_the_same_messages_at_the_same_step(ends: Ends) -> None:
    front, leader, followers = ends
    sent: list[Message] = [Abort(["é"]), Abort(["b" * 3_000_000]), Stop()]
    heard: list[list[Message]] = []
    assert leader.next(wait=False) == []
    assert [follower.next(wait=True) for follower in followers] == [[], []]
    for message in sent:
        front.send(message)
    while sum(map(len, heard)) < len(sent):
        step: list[list[Message]] = []
        listen = threading.Thread(target=lambda into: into.extend(f.next(True) for f in followers), args=(step,))
        listen.start()  # beside rank 0, since a long frame waits to be read
        heard.append(leader.next(wait=True))
        listen.join()
        assert step == [heard[-1]] * 2
    assert [message for step in heard for message in step] == sent


def test_rank_0_waits_as_long_as_it_is_told_and_takes_all_that_comes(ends: Ends) -> None:
    front, leader, _ = ends
    assert leader.next(wait=False, patience=0.01) == []
    for after, name in ((0.05, "a"), (0.3, "b")):
        threading.Timer(after, front.send, (Abort([name]),)).start()
    assert leader.next(wait=False, patience=3.0) == [Abort(["a"]), Abort(["b"])]
    threading.Timer(0.05, front.send, (Stop(),)).start()
    started = time.monotonic()
    assert leader.next(wait=False, patience=60) == [Stop()]
    assert time.monotonic() - started < 30


def test_a_follower_ends_with_rank_0(ends: Ends) -> None:
    _, leader, followers = ends
    for connection in leader._followers:
        connection.close()
    for follower in followers:
        with pytest.raises(SystemExit):
            follower.next(wait=False)
