"""Several processes for a chat template, so that one conversation that takes long holds up no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tpctl.client.template_process import TemplateProcess
from tpctl.errors import BusyError

_MOST = 4  # processes, some 30 MB each
_SOON = 0.25  # seconds that somebody waits before another is started, which takes a tenth of a second
_PATIENCE = 30.0  # seconds that somebody waits


class TemplateProcesses:
    """In the place of one ``TemplateProcess``: the first is started at once, others when threads wait for it."""

    def __init__(self, most: int = _MOST, patience: float = _PATIENCE) -> None:
        self._most = most
        self._patience = patience
        self._changed = threading.Condition()
        self._all = [TemplateProcess()]
        self._free = list(self._all)
        self._interrupts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compile(self, source: str) -> dict[str, Any]:
        """As ``TemplateProcess.compile``. Raises ``BusyError`` if all are at work for too long."""
        with self._one() as process:
            return process.compile(source)

    def render(
        self, source: str, variables: Mapping[str, Any], each: Sequence[Mapping[str, Any]] = ({},)
    ) -> dict[str, Any]:
        """As ``TemplateProcess.render``. Raises ``BusyError`` if all are at work for too long."""
        with self._one() as process:
            return process.render(source, variables, each)

    def close(self) -> None:
        """End the processes, as ``TemplateProcess.close``; nobody may be using one."""
        for process in self._all:
            process.close()

    def interrupt(self) -> None:
        """End what other threads have done, and what they wait for; they get a ``BusyError``."""
        with self._changed:
            self._interrupts += 1
            self._changed.notify_all()
            for process in self._all:
                process.interrupt()

    @contextmanager
    def _one(self) -> Iterator[TemplateProcess]:
        with self._changed:
            self._wait()
            process = self._free.pop()  # the one that was used last has the template compiled
        try:
            yield process
        finally:
            with self._changed:
                self._free.append(process)
                self._changed.notify()

    def _wait(self) -> None:
        deadline, before = time.monotonic() + self._patience, self._interrupts

        def over() -> bool:
            return bool(self._free) or self._interrupts > before

        while not over():
            left = deadline - time.monotonic()
            if left <= 0:
                raise BusyError(
                    f"the chat template has been at work for others for {self._patience:.0f} s; try again later"
                )
            more = len(self._all) < self._most
            if not self._changed.wait_for(over, min(left, _SOON) if more else left) and more:
                self._all.append(TemplateProcess())
                self._free.append(self._all[-1])
        if self._interrupts > before:
            raise BusyError("the chat template is not run any more, since this process is ending")
