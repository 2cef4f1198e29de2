"""How fast to compute waiting prompts when all requests of a job are known: beside the decodes, no faster than needed.

A GPU reads all weights for a step of any size, and multiplies a few hundred rows in the time that the reading takes. A
decode step has one row per sequence, so prompt tokens ride along for little until the rows are full; computed by
themselves they cost what their arithmetic costs. On the other hand, a request that starts late may end last.

So the requests with the most tokens still to generate start first, and a step computes as many prompt tokens as bring
it to ``Pace.rows``, or more where a request would otherwise start so late that it ends after all others: its prompt
must be computed while the steps that are left until the end of the job are as many as its answer takes.

Where that is more than a step of ``Pace.limit`` holds, waiting gains nothing, and prompts are computed as fast as they
can, in the order of arrival. The number of tokens still to generate is taken from ``max_tokens``: a request may end
earlier. Prompts are counted whole, though a prefix of theirs may be cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Pace(NamedTuple):
    """What a device computes beside decodes: ``rows`` tokens of a step cost little more than a few, and more than
    ``limit`` are not worth spreading prompts for. ``chunks``: parts of prompts in a step at most."""

    rows: int
    limit: int
    chunks: int


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
    budget, tokens = max(pace.rows - decodes, 0), 0
    for count, (prompt, answer) in enumerate(pending, 1):
        tokens += prompt
        steps = max(horizon - answer, 1)
        if count > pace.chunks * steps:
            return None
        budget = max(budget, -(-tokens // steps))
    return None if decodes + budget > pace.limit else budget
