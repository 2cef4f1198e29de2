"""What is told of requests, in messages that keep nobody's tokens waiting.

The log-probabilities of a long prompt are some 10 MB: half a second in which rank 0 starts no step, or the front, which
has to read them, hears of no other token. They go in pieces, one beside each step's tokens; what else there is to tell
of their request waits behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tpctl.wire.messages import Output

TOGETHER = 4096
"""Log-probabilities of prompts in a message, of tokens and of the likeliest beside them: about 100 kB, and 10 ms of
each side's time."""


class Outbox:
    """True while there is more to tell than was told."""

    def __init__(self) -> None:
        self._left: dict[str, deque[Output]] = {}  # by request, the longest waiting first

    def __bool__(self) -> bool:
        return bool(self._left)

    def told(self, outputs: Iterable[Output]) -> list[Output]:
        """What is to be told now, of what has come and what was left before."""
        told = []
        for output in outputs:
            if (behind := self._left.get(output.id)) is not None:
                behind.append(output)
            elif output.prompt_logprobs is not None and _size(output) > 0:
                self._left[output.id] = deque([output])
            else:
                told.append(output)
        room = TOGETHER
        while self._left and room > 0:
            id, behind = next(iter(self._left.items()))
            size = _size(behind[0])
            if size > room:
                behind[0], piece = _split(behind[0], room)
                told.append(piece)
                break
            room -= size
            told.append(behind.popleft())
            if not behind:
                del self._left[id]
        return told

    def abort(self, ids: Iterable[str]) -> list[Output]:
        """Nobody wants what is left of these requests: the ends of those that had ended."""
        ended = []
        for id in ids:
            left = self._left.pop(id, ())
            if left and left[-1].finish_reason is not None:
                ended.append(Output(id, [], "abort"))
        return ended


def _size(output: Output) -> int:
    """Its log-probabilities of a prompt. All tokens have as many likeliest ones."""
    rows = output.prompt_logprobs
    return len(rows) * (1 + len(rows[0].top)) if rows else 0


def _split(output: Output, room: int) -> tuple[Output, Output]:
    """What is left of an output, and of its first log-probabilities as many as there is room for, at least one."""
    rows = output.prompt_logprobs or []
    count = max(1, room // (1 + len(rows[0].top)))
    return output._replace(prompt_logprobs=rows[count:]), Output(output.id, [], prompt_logprobs=rows[:count])
