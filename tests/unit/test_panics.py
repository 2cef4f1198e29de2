"""What a library in Rust writes when it panics is dropped, and no thread waits for another's call."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tpctl.client.panics import guarded
from tpctl.errors import RequestError

FILES = Path("/proc/self/fd")


@pytest.fixture
def _stderr_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command has it (``tpctl.cli.streams``)."""
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(2), "w"))


@pytest.mark.usefixtures("_stderr_of_its_own")
def test_threads_are_kept_quiet_at_the_same_time(capfd: pytest.CaptureFixture[str]) -> None:
    meet = threading.Barrier(3, timeout=60)

    def work() -> None:
        meet.wait()
        os.write(2, b"thread 'main' panicked\n")
        meet.wait()
        raise BaseException("a panic")

    def call(_: int) -> str:
        with pytest.raises(RequestError) as caught:
            guarded(work, RequestError)
        return str(caught.value)

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(call, range(3))) == ["a panic"] * 3
        os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == 2 * "afterwards\n"


@pytest.mark.usefixtures("_stderr_of_its_own")
def test_descriptors_are_given_back() -> None:
    before = len(list(FILES.iterdir()))
    for _ in range(10):
        guarded(lambda: guarded(int, RequestError), RequestError)
    assert len(list(FILES.iterdir())) == before
