"""The worker of ``first_token.py --times``: the engine's own, which notes what becomes of each request until its first
token is sent on, and what late launches go by.

``FIRST_TOKEN_TIMES`` names the file that rank 0 writes as it ends, JSON. By a request's id: when it was heard, taken
in, launched, begun by the device, ended, and its token sent on, in seconds of the host's monotonic clock, and how many
other steps began since it was heard. Of each hold: the margin, and what of it is slack and what other ranks are given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from bisect import bisect
from pathlib import Path

from tpctl.launch import lifeline

if __name__ == "__main__":
    lifeline.tie_to_parent()

from tpctl.engine import feed, worker
from tpctl.engine.engine import Engine
from tpctl.engine.feed import Leader
from tpctl.engine.guiding.gate import Gate
from tpctl.wire.messages import Add, Message, Output, Outputs

preload = worker.preload
HEARD: dict[str, float] = {}
TAKEN: dict[str, float] = {}
SENT: dict[str, float] = {}
STEPS: list[tuple[float, float, list[str]]] = []  # when launched and ended, and whose first token it samples
HOLDS: list[tuple[float, float, float]] = []


class NotingGate(Gate):
    def take(self, message: Message, text: bytes) -> None:
        if isinstance(message, Add):
            now = time.perf_counter()
            HEARD.update((request.id, now) for request in message.requests)
        super().take(message, text)


class NotingLeader(Leader):
    def send(self, message: Message) -> None:
        if isinstance(message, Outputs):
            now = time.perf_counter()
            for output in message.outputs:
                SENT.setdefault(output.id, now)
        super().send(message)


class NotingEngine(Engine):
    def apply(self, message: Message) -> list[Output]:
        if isinstance(message, Add):
            now = time.perf_counter()
            TAKEN.update((request.id, now) for request in message.requests)
        return super().apply(message)

    def patience(self) -> float:
        left = super().patience()
        times = self._launch_time
        if left > 0 and times is not None:
            HOLDS.append((times._margin(), times._slack, times._others))
        return left

    def _collect(self) -> list[Output]:
        launched = self._pending
        outputs = super()._collect()
        if launched is not None:
            items = launched.batch.items if launched.batch.num_prefills else []
            first = [item.sequence.id for item in items if item.samples and item.num_generated == 0]
            STEPS.append((launched.launched_at, launched.ended_at or time.perf_counter(), first))
        return outputs


def noted() -> dict[str, object]:
    """What the file holds."""
    begun = [max(now[0], before[1]) for before, now in zip([(0.0, 0.0, []), *STEPS], STEPS, strict=False)]
    requests = {}
    for at, (launched, ended, ids) in enumerate(STEPS):
        for id in ids:
            other = max(0, at - bisect(begun, HEARD[id]))
            requests[id] = [HEARD[id], TAKEN[id], launched, begun[at], ended, SENT[id], other]
    return {"requests": requests, "holds": HOLDS}


def main() -> None:
    vars(feed).update(Gate=NotingGate)
    vars(worker).update(Engine=NotingEngine, Leader=NotingLeader)
    worker.main()
    if SENT:
        Path(os.environ["FIRST_TOKEN_TIMES"]).write_text(json.dumps(noted()))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
