"""Workers that fail are named, whatever way they do it: with a fake worker that fails on request."""

from __future__ import annotations

import os
import queue
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.fake_engine import PATIENCE, assert_gone, engine_folders, finish, processes, request, start
from tpctl.errors import EngineError, ShardFolderError, TpctlError
from tpctl.launch import torchrun
from tpctl.wire.channel import Channel


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize(("tp_size", "fault"), [(1, "raise"), (2, "1:raise")])
def test_an_exception_at_the_start_is_one_line(pids: Path, tp_size: int, fault: str, record: bool) -> None:
    rank = tp_size - 1
    with (
        start(tp_size, pids, fault, record=record) as client,
        pytest.raises(EngineError, match=f"rank {rank} .*RuntimeError: the weights are on strike") as caught,
    ):
        client.wait_ready()
        client.outputs()
    assert "\n" not in str(caught.value)
    (folder,) = engine_folders(pids)  # kept, because the message names it
    assert f"{folder}/logs" in str(caught.value)


@pytest.mark.parametrize(("tp_size", "fault"), [(1, "raise-ours"), (2, "1:raise-ours")])
def test_our_own_errors_keep_their_kind(pids: Path, tp_size: int, fault: str) -> None:
    with (
        start(tp_size, pids, fault, record=True) as client,
        pytest.raises(ShardFolderError, match=r"^shard folder is for tp 2, but tp 3 was asked for$"),
    ):
        client.wait_ready()
        client.outputs()
    assert engine_folders(pids) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("exit", "rank 0 ended with exit code 7 and said nothing"),
        ("exit-0", r"the workers ended \(exit code 0\) without saying why"),
        ("import", "rank 0 ended with exit code 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("fatal", "^no room for a KV cache$"),
    ],
)
def test_other_ends_before_ready(pids: Path, fault: str, message: str) -> None:
    with start(1, pids, fault) as client, pytest.raises(EngineError, match=message):
        client.wait_ready()


@pytest.mark.parametrize("fault", ["hang", "deaf"])
def test_never_ready(pids: Path, fault: str) -> None:
    with (
        start(1, pids, fault, timeout=1) as client,
        pytest.raises(EngineError, match="not ready after 1 s"),
    ):
        client.wait_ready()


def test_a_killed_rank_is_named_and_ends_the_others(pids: Path) -> None:
    client = start(2, pids, "1:die-later")
    found = processes(pids, 2)
    with pytest.raises(EngineError, match=r"rank 1 was killed \(SIGKILL\).*memory"):
        client.outputs()
    assert_gone(found)
    with pytest.raises(EngineError, match="rank 1 was killed"):
        client.submit([request("late")])
    client.close()


def test_the_cause_is_named_when_its_consequence_comes_first(pids: Path) -> None:
    """Rank 0 loses its peer within the interval at which the agent looks at its ranks."""
    with (
        start(2, pids, "0:lose-peer,1:killed") as client,
        pytest.raises(EngineError, match=r"rank 1 was killed \(SIGKILL\)"),
    ):
        client.wait_ready()


def test_the_only_rank_dies_during_a_request(pids: Path) -> None:
    with start(1, pids, "die") as client:
        client.submit([request("a")])
        with pytest.raises(EngineError, match=r"rank 0 was killed \(SIGKILL\)"):
            client.outputs()


def test_kill_of_the_agent_ends_the_workers(pids: Path) -> None:
    with start(2, pids) as client:
        client.wait_ready()
        found = processes(pids, 2)
        os.kill(found[-1], signal.SIGKILL)
        with pytest.raises(EngineError, match="the launcher was ended by SIGKILL"):
            client.outputs()
        assert_gone(found)


def test_the_end_of_the_agent_by_another_signal_is_told_as_its_own(pids: Path) -> None:
    with start(2, pids) as client:
        client.wait_ready()
        os.kill(processes(pids, 2)[-1], signal.SIGTERM)  # it ends the ranks, which report that they were ended
        with pytest.raises(EngineError, match="the launcher was ended by SIGTERM"):
            client.outputs()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_end_while_nobody_waits_is_told_at_once(pids: Path, tp_size: int) -> None:
    told: queue.SimpleQueue[TpctlError] = queue.SimpleQueue()
    with start(tp_size, pids) as client:
        client.on_failure(told.put)
        client.wait_ready()
        processes(pids, tp_size)
        assert client.failure_now() is None
        os.kill(int((pids / f"{tp_size - 1}").read_text().split()[0]), signal.SIGKILL)
        reason = told.get(timeout=PATIENCE)
        assert str(reason).startswith(f"rank {tp_size - 1} was killed (SIGKILL)")
        assert client.failure_now() is reason
        client.on_failure(told.put)  # here and now
        assert told.get_nowait() is reason
        with pytest.raises(EngineError) as caught:
            client.submit([request("late")])
            client.outputs()
        assert str(caught.value) == str(reason)
    assert told.empty()


def test_an_end_that_was_asked_for_is_no_failure(pids: Path) -> None:
    told: queue.SimpleQueue[TpctlError] = queue.SimpleQueue()
    with start(1, pids) as client:
        client.on_failure(told.put)
        client.wait_ready()
    assert told.empty()
    assert client.failure_now() is None


def test_tokens_from_before_the_end_are_handed_out_after_it(pids: Path) -> None:
    told: queue.SimpleQueue[TpctlError] = queue.SimpleQueue()
    with start(1, pids, "answer-and-die") as client:
        client.on_failure(told.put)
        client.submit([request("a")])
        told.get(timeout=PATIENCE)
        assert [token for output in finish(client) for token in output.token_ids] == [3, 4, 5]
        with pytest.raises(EngineError, match="rank 0 was killed"):
            client.outputs()


def test_a_reason_that_comes_late_is_waited_for(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine, whose agent gets no time to look at its ranks: here it is stopped meanwhile."""
    monkeypatch.setattr(torchrun, "_PATIENCE", 0.1)
    with start(2, pids) as client:
        client.wait_ready()
        *ranks, agent = processes(pids, 2)
        os.kill(agent, signal.SIGSTOP)
        os.kill(int((pids / "0").read_text().split()[0]), signal.SIGKILL)
        time.sleep(1)
        assert client.failure_now() is None
        os.kill(agent, signal.SIGCONT)
        with pytest.raises(EngineError, match=r"rank 0 was killed \(SIGKILL\)"):
            client.outputs()
        assert_gone([*ranks, agent])


def test_a_garbled_message_is_an_error_and_no_hang(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def garbled(channel: Channel) -> None:
        raise TypeError("fields missing")

    monkeypatch.setattr(Channel, "receive", garbled)
    with start(1, pids) as client, pytest.raises(EngineError):
        client.wait_ready()
