"""The command's end of the process in which a chat template runs."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tpctl.client.template_worker import MEMORY, NO_MEMORY, SECONDS
from tpctl.client.worker_process import close, exchange, how, start
from tpctl.errors import BusyError, EngineError

_PATIENCE = 60.0  # seconds beyond a request's own: for the start, and for a machine that is busy


class TemplateProcess:
    """One process, which is started at once and again whenever a template has ended it.

    Make it early: what it takes to start, a tenth of a second, then passes while other things are done. Threads may
    share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source: str | None = None  # what the process has compiled
        self._waited = False  # whether the process has answered, and waited for more
        self._interrupts = self._before = 0  # now, and when what is done was begun
        self._process: subprocess.Popen[bytes] | None = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            self.close()

    def compile(self, source: str) -> dict[str, Any]:
        """What a template uses; the worker's answer."""
        with self._lock:
            return self._again(lambda: self._compile(source))

    def render(
        self, source: str, variables: Mapping[str, Any], each: Sequence[Mapping[str, Any]] = ({},)
    ) -> dict[str, Any]:
        """A template's texts, one for each of ``each``; the worker's answer, which is of all of them or of none."""

        def rendered() -> dict[str, Any]:
            if self._source != source and "failed" in (answer := self._compile(source)):
                return answer
            return self._ask({"render": variables, "each": each})

        with self._lock:
            return self._again(rendered)

    def interrupt(self) -> None:
        """End what another thread has it do; that gets a ``BusyError``."""
        self._interrupts += 1
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process. May be called again; a later request starts another one."""
        process, self._process, self._source, self._waited = self._process, None, None, False
        if process is None:
            return
        close(process)

    def _again(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Work, and what stands for its answer where a template has ended the process.

        One that waits may have been ended by anybody, so that its end says nothing of what it is asked next: a fresh
        process is, once.
        """
        waited, self._before = self._waited, self._interrupts
        try:
            return work()
        except _Ended as ended:
            self._check()
            if not waited or ended.code == -signal.SIGALRM:  # which is not set while it waits
                return _end(ended.code)
        try:
            return work()
        except _Ended as ended:
            self._check()
            return _end(ended.code)

    def _check(self) -> None:
        """Raise ``BusyError`` if there was an interrupt."""
        if self._interrupts > self._before:
            raise BusyError("the chat template is not run any more, since this process is ending")

    def _compile(self, source: str) -> dict[str, Any]:
        self._source = None
        answer = self._ask({"compile": source})
        if "failed" not in answer:
            self._source = source
        return answer

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ``_Ended`` if there is no answer."""
        if self._process is None:
            self._process = self._start()
        self._check()
        answer = ended = None
        try:
            answer = exchange(self._process, request, SECONDS + _PATIENCE)
        finally:
            if answer is None:  # it ended, or Ctrl-C came between a request and its answer
                ended = self._process.poll()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ended = self._process.wait(1.0 if ended is None else None)
                self.close()
        if answer is None:
            raise _Ended(ended)
        self._waited = True
        return answer

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        try:
            return start("tpctl.client.template_worker")
        except OSError as error:
            raise EngineError(f"cannot start {sys.executable} for the chat template: {error.strerror}") from None


class _Ended(Exception):
    """A process has, or says nothing (``None``)."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


def _end(code: int | None) -> dict[str, Any]:
    """What a process that ended without an answer would have said."""
    if code is None or code == -signal.SIGALRM:
        return {"failed": "time", "message": ""}
    if code in (-signal.SIGKILL, NO_MEMORY):  # the first is the kernel's, where a whole machine has none left
        return {"failed": "memory", "message": ""}
    return {"failed": "error", "message": f"its process ended ({how(code)})"}


LIMITS = {"time": f"took more than {SECONDS:.0f} s", "memory": f"took more than {MEMORY >> 20} MB"}
"""How the limits are named in messages."""
