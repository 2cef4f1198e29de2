"""A grammar that takes more than it may ends a process of its own and no other request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_client import write_tokenizer
from tests.unit.running import until
from tests.unit.serving import served
from tests.unit.test_serve import TEXT
from tests.unit.test_serve_refusals import error
from tpctl.client import grammar_process, guides, worker_process
from tpctl.client.grammar_process import GrammarProcesses
from tpctl.client.template_worker import frame, receive
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import BusyError, RequestError
from tpctl.serve.errors import ApiError
from tpctl.wire.guide import Guide, of_schema

PATIENCE = 60.0


def patterns(count: int) -> dict[str, Any]:
    """A schema that takes nearly twice as much with each more."""
    return {"type": "string", "allOf": [{"pattern": f"a{number}"} for number in range(count)]}


def guide(schema: dict[str, Any]) -> Guide:
    return Guide("json", json.dumps(schema), "response_format")


@pytest.fixture
def processes() -> Any:
    made = GrammarProcesses(most=2, wait=0.1)
    yield made
    for process in made._free:
        grammar_process.close(process)


def smaller(patch: pytest.MonkeyPatch, **limits: float) -> None:
    """Processes with other limits than theirs."""
    code = f"from tpctl.client import grammar_worker as w; w.__dict__.update({limits!r}); w.main()"
    start = subprocess.Popen
    patch.setattr(subprocess, "Popen", lambda argv, **kw: start([sys.executable, "-c", code], **kw))


def test_what_takes_too_long_or_too_much_is_refused_and_others_go_on(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Guide("regex", "a+", "regex")
    with monkeypatch.context() as patch:
        smaller(patch, SECONDS=0.2)
        assert processes.problem(plain) is None
        (first,) = processes._free
        assert processes.problem(guide(patterns(24))) == (
            "it takes more than 2 s to compile, which is as much as it may; make it simpler"
        )
        assert not processes._free and first.returncode is not None
    with monkeypatch.context() as patch:
        smaller(patch, MEMORY=64 << 20)
        assert processes.problem(guide(patterns(24))) == (
            "it takes more than 512 MiB to compile, which is as much as it may; make it simpler"
        )
    assert processes.problem(plain) is None and len(processes._free) == 1
    assert "regex parse error" in str(processes.problem(Guide("regex", "(a", "regex")))
    assert "regex parse error" in str(processes.problem(guide({"type": "string", "pattern": "(a"})))
    assert processes.problem(Guide("choice", '["a", "b"]', "choice")) is None and len(processes._free) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGSTOP])
def test_one_that_ended_while_it_waited_is_no_fault_of_the_next_grammar(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    assert processes.problem(Guide("regex", "a+", "regex")) is None
    (idle,) = processes._free
    os.kill(idle.pid, number)
    if number != signal.SIGSTOP:
        idle.wait()
    started = grammar_process._start

    def other(guide: Guide) -> Any:
        monkeypatch.undo()
        return started(guide)

    monkeypatch.setattr(grammar_process, "_PATIENCE", 0.2 - grammar_process.SECONDS)
    monkeypatch.setattr(grammar_process, "_start", other)
    assert processes.problem(Guide("regex", "b+", "regex")) is None
    assert idle not in processes._free and idle.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_what_somebody_else_did_to_a_fresh_one_is_not_kept(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    started, asked = grammar_process._start, Guide("regex", f"not kept {number}", "regex")

    def ended(guide: Guide) -> Any:
        process = started(guide)
        os.kill(process.pid, number)
        return process

    monkeypatch.setattr(guides, "_processes", processes)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "_PATIENCE", 0.2 - grammar_process.SECONDS)
        patch.setattr(grammar_process, "_start", ended)
        how = "said nothing" if number == signal.SIGSTOP else rf"ended \({number.name}\)"
        with pytest.raises(BusyError, match=rf"^regex: the process that compiled it {how}, .* try again"):
            guides.check_guide(asked)
    guides.check_guide(asked)


@pytest.mark.parametrize(
    ("end", "said"),
    [("os.abort()", "it takes more than 512 MiB"), ("os.kill(os.getpid(), 11)", "the process that compiled it ended")],
)
def test_a_grammar_that_ends_its_process_is_told_so(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    start, code = subprocess.Popen, f"import os, sys; sys.stdin.buffer.read(1); {end}"
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **kw: start([sys.executable, "-c", code], **kw))
    assert str(processes.problem(Guide("regex", "a", "regex"))).startswith(said)


_PARENT = """
import subprocess, sys, threading
from tpctl.client import grammar_process, template_process
start = subprocess.Popen
def popen(argv, **rest):
    code = f"from {argv[-1].rpartition('.')[0]} import {argv[-1].rpartition('.')[2]} as w; w.SECONDS = 600; w.main()"
    process = start([argv[0], "-c", code], **rest)
    print(process.pid, flush=True)
    return process
subprocess.Popen = popen
from tpctl.wire.guide import Guide
schema = '{"type": "string", "allOf": [%s]}' % ", ".join('{"pattern": "a%d"}' % n for n in range(40))
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
processes, template = grammar_process.GrammarProcesses(), template_process.TemplateProcess()
threading.Thread(target=processes.problem, args=(Guide("json", schema, "x"),)).start()
threading.Thread(target=template.render, args=(loop, {}, [{"messages": []}])).start()
"""


def test_what_is_at_work_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        try:
            until(lambda: all(_seconds(pid) > 1 for pid in workers))  # they have started, and do what never ends
        finally:
            parent.kill()
    until(lambda: not any(map(_runs, workers)))


def test_it_is_the_system_that_ends_what_is_at_work() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tpctl.client.grammar_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(frame(guide(patterns(40))._asdict()))
        process.stdin.flush()
        until(lambda: _seconds(process.pid) > 0.7)  # of which it takes less to start; its own limit is 2 more
        process.stdin.close()
        assert process.wait(PATIENCE) in (-signal.SIGIO, 1)  # the second where it was slow to start


def _stat(pid: int) -> list[str]:
    """What /proc says behind a process' name; nothing: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _runs(pid: int) -> bool:
    return bool(found := _stat(pid)) and found[0] != "Z"


def _seconds(pid: int) -> float:
    """Of the processor, that a process has used."""
    found = _stat(pid)
    assert found, "it has ended before its parent"
    return sum(map(int, found[11:13])) / os.sysconf("SC_CLK_TCK")


def test_one_that_has_taken_much_is_not_used_again(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller(monkeypatch, _WORN=-1)
    assert processes.problem(Guide("regex", "a+", "regex")) is None and not processes._free


def test_nobody_waits_for_ever(processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    let, begun = threading.Event(), threading.Semaphore(0)
    asked = grammar_process._asked

    def slow(process: Any, guide: Guide) -> Any:
        begun.release()
        assert let.wait(PATIENCE)
        return asked(process, guide)

    monkeypatch.setattr(grammar_process, "_asked", slow)
    with ThreadPoolExecutor(2) as others:
        waiting = [others.submit(processes.problem, Guide("regex", "a", "regex")) for _ in range(2)]
        assert all(begun.acquire(timeout=PATIENCE) for _ in waiting)
        with pytest.raises(BusyError, match="others have been compiled for 0 s; try again later") as busy:
            processes.problem(Guide("regex", "b", "regex"))
        assert ApiError.of(busy.value).status == 503
        let.set()
        assert [one.result(PATIENCE) for one in waiting] == [None, None]


def test_whoever_is_interrupted_leaves_no_process(processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker_process, "receive", interrupted)
        for _ in range(3):  # more than there are places
            with pytest.raises(KeyboardInterrupt):
                processes.problem(Guide("regex", "a", "regex"))
    assert not processes._free and not processes._at_work
    assert processes.problem(Guide("regex", "a", "regex")) is None


def test_a_child_has_processes_of_its_own(processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.problem(Guide("regex", "a", "regex")) is None
    (ours,) = processes._free
    monkeypatch.setattr(os, "getpid", lambda: 0)
    assert processes.problem(Guide("regex", "a", "regex")) is None
    assert ours not in processes._free and len(processes._free) == 1 and ours.poll() is None
    grammar_process.close(ours)


def test_where_no_process_can_be_started_the_request_is_refused(
    processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    for _ in range(3):  # nor is its place lost
        with pytest.raises(RequestError, match=r"regex: cannot start .* Resource temporarily unavailable"):
            processes.problem(Guide("regex", "a", "regex"))


def test_without_room_for_its_thread_all_are_refused() -> None:
    command = f"ulimit -v 700000; exec {sys.executable} -m tpctl.client.grammar_worker"
    asked = frame(Guide("regex", "a", "regex")._asdict())
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(asked + asked)
        process.stdin.close()
        found = [receive(process.stdout) for _ in range(2)]
    assert all(one is not None and "raise its limit (ulimit -v)" in one["refused"] for one in found)


def test_a_server_refuses_it_and_answers_others(
    tmp_path_factory: pytest.TempPathFactory, processes: GrammarProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides, "_processes", processes)
    smaller(monkeypatch, SECONDS=0.2)
    with served(Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))) as (client, _):
        asked = {"prompt": "ab", "response_format": of_schema(patterns(24))}
        for _ in range(2):
            found = error(client.post(TEXT, json=asked), 400)
            assert found.message.startswith("response_format: it takes more than 2 s to compile")
            assert found.param == "response_format"
        assert client.post(TEXT, json={"prompt": "ab", "regex": "a+"}).status_code == 200
