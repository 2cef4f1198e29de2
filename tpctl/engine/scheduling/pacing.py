"""How fast to compute waiting prompts when all requests of a job are known: beside the decodes, no faster than needed.

A GPU reads all weights for a step of any size, and multiplies a few hundred rows in the time that the reading takes. A
decode step has one row per sequence, so prompt tokens ride along for little until the rows are full; computed by
themselves they cost what their arithmetic costs. On the other hand, a request that starts late may end last.

So the requests with the most tokens still to generate start first, and a step computes as many prompt tokens as bring
it to ``Pace.rows``, or more where a request would otherwise start so late that it ends after all others: its prompt
must be computed while the steps that are left until the end of the job are as many as its answer takes. Such a step is
filled to twice ``Pace.rows``: linears take tiles of rows, and a few rows beyond full tiles cost as much as many.

Where that is more than a step of ``Pace.limit`` holds, waiting gains nothing, and prompts are computed as fast as they
can, in the order of arrival. The number of tokens still to generate is taken from ``max_tokens``: a request may end
earlier. Prompts are counted whole, though a prefix of theirs may be cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tpctl.engine.scheduling.sequence import Sequence

_LEAST_LAYER = 24 << 20
"""Bytes of a rank's layer below which its weights are read too soon to hide prompts behind: Qwen3-0.6B on two H200s (16
MB) was 2 to 3% slower paced, on one (31 MB) as fast, Llama-8B on two (218 MB) 5% faster (docs/performance.md)."""
_FEW = 32  # answers that must have ended before their lengths say anything


class Pace(NamedTuple):
    """What a device computes beside decodes: ``rows`` tokens of a step, which fill its tiles, cost little more than a
    few, and more than ``limit`` are not worth spreading prompts for. ``chunks``: parts of prompts in a step at most."""

    rows: int
    limit: int
    chunks: int


def pays(policy: str, layer_bytes: int) -> bool:
    """Whether a policy of ``wire.settings.POLICIES`` paces a model of such layers."""
    return policy == "makespan" or (policy == "auto" and layer_bytes >= _LEAST_LAYER)


def leeway(answer: int) -> int:
    """Steps that a job may take longer than its longest answer."""
    return 1 + answer // 64


def prefill_budget(pace: Pace, decodes: int, work: int, horizon: int, pending: Iterable[tuple[int, int]]) -> int | None:
    """Prompt tokens to compute in this step beside ``decodes``; ``None``: as many as possible.

    Args:
        work: tokens that all requests have still to compute, answers included.
        horizon: steps until the end of the job.
        pending: (prompt tokens left, answer tokens left) of each request whose prompt is not computed yet, those with
            the longest answers first.
    """
    if work > pace.limit * horizon:
        return None
    budget = tokens = 0
    for count, (prompt, answer) in enumerate(pending, 1):
        tokens += prompt
        steps = max(horizon - answer, 1)
        if count > pace.chunks * steps:
            return None
        budget = max(budget, -(-tokens // steps))
    if decodes + budget > pace.limit:
        return None
    full = max(1, -(-(decodes + budget) // pace.rows)) * pace.rows
    return min(full, pace.limit) - decodes


class Pacer:
    """Knows what is left of a job, and paces it. Deterministic: every rank has its own.

    Args:
        room: tokens that the KV cache holds. A larger job is not paced: its longest answers, started first, would have
            to be preempted.
    """

    def __init__(self, pace: Pace, room: int) -> None:
        self.pace = pace
        self.room = room
        self._end = 0  # the step by which all requests so far may have ended, had each started as it came
        self._num_ended = 0
        self._promised = self._given = 0  # tokens that the answers which have ended could have had, and had

    def arrived(self, now: int, answer: int) -> None:
        """A request came before step ``now`` that may generate ``answer`` tokens."""
        self._end = max(self._end, now + answer + leeway(answer))

    def ended(self, sequence: Sequence) -> None:
        """An answer has come to its end."""
        self._num_ended += 1
        self._promised += sequence.max_num_tokens - sequence.num_prompt_tokens
        self._given += len(sequence.token_ids) - sequence.num_prompt_tokens

    def order(self, now: int, running: Iterable[Sequence], waiting: list[Sequence]) -> tuple[int, int] | None:
        """Bring ``waiting`` into the order in which its sequences should be admitted.

        Returns:
            (prompt tokens, chunks of prompts) that step ``now`` may compute; ``None``: as many as possible.
        """
        everyone = [*running, *waiting]
        left = [(s.num_uncomputed_tokens, s.max_num_tokens - s.num_tokens) for s in everyone]
        started = left[: len(everyone) - len(waiting)]
        pending = [(prompt, answer) for prompt, answer in started if prompt > 1] + left[len(started) :]
        if not pending:
            return None
        tokens = None
        if sum(s.max_num_tokens for s in everyone) <= self.room and self._keeps_promises():
            decodes = sum(prompt == 1 and answer > 0 for prompt, answer in started)
            work = sum(prompt + answer for prompt, answer in left)
            longest = max(answer for _, answer in left)
            horizon = min(self._end - now, longest + leeway(longest))
            pending.sort(key=lambda left: -left[1])
            tokens = prefill_budget(self.pace, decodes, work, horizon, pending)
        waiting.sort(key=_arrival if tokens is None else _longest_first)
        return None if tokens is None else (tokens, self.pace.chunks)

    def _keeps_promises(self) -> bool:
        """Whether answers become as long as they may, by a quarter at least; taken for granted of the first few."""
        return self._num_ended < _FEW or self._promised <= 4 * self._given


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _longest_first(sequence: Sequence) -> tuple[bool, int, int]:
    """Preempted ones before all: their blocks may still be in the prefix cache."""
    return not sequence.admissions, sequence.num_tokens - sequence.max_num_tokens, sequence.arrival
