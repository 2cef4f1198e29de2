"""Lock files: one holder at a time, none left behind, and file systems that keep no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tpctl.checkpoint import locks
from tpctl.checkpoint.cache import locked
from tpctl.checkpoint.locks import exclusive
from tpctl.errors import OutputError


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with an error number, and ``flock`` fails with that."""

    def failing(code: int) -> None:
        def refuse(fd: int, how: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", refuse)

    return failing


@pytest.mark.parametrize("hold", [exclusive, locked])
def test_one_at_a_time_however_often_the_file_is_removed(tmp_path: Path, hold: Callable[[Path], object]) -> None:
    inside, most = [0], []

    def work() -> None:
        for _ in range(20):
            with hold(tmp_path / "lock"):  # type: ignore[attr-defined]
                inside[0] += 1
                most.append(inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_long_wait_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, taken, told = tmp_path / "lock", threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(path):
            taken.set()
            told.wait(60)

    def blocked(fd: int, how: int) -> None:
        if not how & fcntl.LOCK_NB:
            told.set()  # who waits for good has said so
        return flock(fd, how)

    flock = fcntl.flock
    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    monkeypatch.setattr(fcntl, "flock", blocked)
    monkeypatch.setattr(locks, "SILENT", 0.1)
    with exclusive(path):
        thread.join()
    assert capsys.readouterr().err == f"waiting for another process, which holds {path}\n"
    with exclusive(path):
        pass
    assert capsys.readouterr().err == ""


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tpctl.checkpoint.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        child.kill()
    assert path.exists()
    with exclusive(path):
        pass
    assert not path.exists()


def test_who_does_not_wait_is_told_at_once(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), exclusive(tmp_path / "lock", wait=False):
            pass
        assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", wait=False):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_file_is_the_lock(tmp_path: Path, no_locks: Callable[[int], None], code: int) -> None:
    no_locks(code)
    path = tmp_path / "lock"
    with exclusive(path):
        said = rf"lock says that process {os.getpid()} on .* keeps no locks"
        with pytest.raises(OutputError, match=said) as caught, exclusive(path):
            pass
        assert "\n" not in str(caught.value) and "remove the file if it has" in str(caught.value)
        assert path.exists()
    with exclusive(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_lock_are_told(tmp_path: Path, no_locks: Callable[[int], None]) -> None:
    no_locks(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="No such file"), exclusive(tmp_path / "none" / "lock"):
        pass
