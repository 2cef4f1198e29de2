"""One replica: an engine of its own that answers what the folder offers, until the batch is over."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.place import Formats
from tpctl.batch.leases import Leases
from tpctl.batch.signs import Signs, Watch, lock
from tpctl.batch.watchdog import Watchdog, step_timeout
from tpctl.client.batch import Batch, Tally
from tpctl.client.disk import writing
from tpctl.client.engine_client import EngineClient
from tpctl.client.jobs import JobParser
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import EngineError, OutputError, TpctlError
from tpctl.wire.settings import EngineConfig

POLL = 0.1
"""Seconds between looks at what is offered."""

LOOK = 0.25
"""Seconds between looks at whether the batch goes on."""

TOGETHER = 32
"""Lines that are parsed at once."""


@dataclass(frozen=True)
class Asked:
    """What every line of the batch is answered with, but for what it says itself.

    Attributes:
        step_timeout: seconds without a step after which the engine counts as hung; ``None``: as its model has it.
    """

    formats: Formats
    sampling: dict[str, Any]
    stop: list[str]
    step_timeout: float | None = None


def new_name() -> str:
    """A name that no other replica has."""
    host = re.sub(r"[^\w-]", "-", os.uname().nodename)[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


def await_batch(folder: JobFolder, seconds: float, clock: Callable[[], float] = time.monotonic) -> bool:
    """Wait until somebody runs a batch in a folder: a coordinator that gives signs. False: nobody has in ``seconds``,
    or the batch that is there is done."""
    watch = Watch(folder.state, folder.lock, clock)
    deadline = clock() + seconds
    before = watch.look() and watch.said.get("count")
    while True:
        alive = watch.look()
        state = watch.said.get("state")
        # A count tells where a lock does not; the first one that is seen may be that of a coordinator long gone.
        if alive and state == "running" and (watch.locked or watch.said["count"] != before):
            return True
        if state == "done" or clock() >= deadline:
            return False
        time.sleep(POLL)


def ended(folder: JobFolder) -> str | None:
    """How the last run of a batch ended, if that is certain: one of another machine may only be seen late."""
    watch = Watch(folder.state, folder.lock)
    watch.look()
    state = watch.said.get("state")
    if state == "running":
        return "killed" if watch.gone else None
    return None if state is None else str(state)


class Replica:
    """A replica's place in the folder, from its start on: it is seen before its engine is ready.

    Attributes:
        gpus: that it has, once that is known.
    """

    def __init__(self, folder: JobFolder, name: str, ranks: int) -> None:
        """Appear.

        Raises:
            OutputError: the folder cannot be used.
        """
        self._folder = folder
        self._name = name
        self._ranks = ranks
        self.gpus = 0
        self._life = secrets.token_hex(8)
        self._began = time.monotonic()
        self._state = "starting"
        self._reason: str | None = None
        self._fatal = False
        self._looked = 0.0
        self._stopped = False
        self._tally = Tally()
        self._leases: Leases | None = None
        self._coordinator = Watch(folder.state, folder.lock)
        folder.check_there()
        held: IO[bytes] | None
        with writing(folder.replicas):
            held = lock(folder.replicas / f"{name}.lock")
        if held is None:
            raise OutputError(f"a replica {name} is at work in {folder.root}; give another --name")
        self._lock = held
        self._signs = Signs(folder.replicas / f"{name}.json", self._sign)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave. Whoever leaves in order takes no line with it; an error may be a line's doing."""
        self._signs.stop()
        if self._leases is not None:
            self._leases.close()
        self._state = "ended"
        if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
            self._state = "failed"
            self._reason = str(error) if isinstance(error, TpctlError) else f"{type(error).__name__}: {error}"
            self._fatal = isinstance(error, TpctlError) and not isinstance(error, EngineError)
        with suppress(OutputError):  # whoever watches sees that the lock is free, or that no sign comes
            self._signs.write()
        self._lock.close()

    def begin(self, formats: Formats, enough: int = 1) -> Leases:
        """From here on this replica is at work; so many lines at once keep it busy."""
        self._leases = Leases(self._folder, formats, self._name, enough)
        self._state = "working"
        return self._leases

    def answer(self, client: EngineClient, tokenizer: Tokenizer, asked: Asked, config: EngineConfig) -> Tally:
        """Take lines and answer them until the coordinator says that all are, or is gone.

        Raises:
            EngineError: the engine failed, or makes no steps.
            OutputError: the folder is gone, or takes no more.
            SourceError: the input is not what it was.
        """
        info = client.wait_ready()
        leases = self.begin(asked.formats, config.max_num_seqs)
        parser = JobParser(
            tokenizer,
            sampling=asked.sampling,
            stop=asked.stop,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            repeated=leases.repeated,
            form=lambda: asked.formats.source.form,
        )
        batch = Batch(client, tokenizer, leases, window=2 * config.max_num_seqs)
        self._tally = batch.tally

        def step(tally: Tally) -> None:
            self._tally = tally
            leases.flush()
            if (failure := client.failure_now()) is not None:
                raise failure

        def at_work() -> tuple[int, ...] | None:
            return (batch.tally.lines, batch.tally.completion_tokens) if batch.under_way else None

        longest = step_timeout(info.device, info.weight_bytes, config.max_num_batched_tokens)
        groups = leases.groups(TOGETHER, POLL)
        with Watchdog(client, at_work, asked.step_timeout or longest):
            return batch.run_groups(groups, parser, step=step, should_stop=self.over)

    def over(self) -> bool:
        """Whether there is nothing to do any more; looked at a few times a second.

        Raises:
            OutputError: no signs of life can be written.
        """
        if self._signs.failure is not None:
            raise self._signs.failure
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            self._stopped = self._folder.stop.exists() or not self._coordinator.look()
            if self._stopped and self._leases is not None:
                self._leases.closed.set()  # the thread that takes lines must take no more
        return self._stopped

    def _sign(self) -> dict[str, Any]:
        tally, leases = self._tally, self._leases
        seconds = time.monotonic() - self._began
        return {
            "state": self._state,
            "reason": self._reason,
            "fatal": self._fatal,
            "ranks": self._ranks,
            "gpus": self.gpus,
            "life": self._life,
            "seconds": round(seconds, 3),
            "gpu_seconds": round(seconds * self.gpus, 3),
            "rows": 0 if leases is None else leases.sums.rows,
            "open_rows": 0 if leases is None else leases.open_rows,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
        }
