"""How fast to compute waiting prompts when all requests of a job are known: beside the decodes, no faster than needed.

A GPU reads all weights for a step of any size, and multiplies a few hundred rows in the time that the reading takes. A
decode step has one row per sequence, so prompt tokens ride along for little until the rows are full; computed by
themselves they cost what their arithmetic costs. On the other hand, a request that starts late may end last.

So the requests with the most tokens still to generate start first, and the others are computed at the least of these
paces that lets all end together:

    - as many rows as are free in a step of ``Pace.rows``;
    - the tokens of all requests, spread evenly over the steps that the longest still takes;
    - what brings each request in before the longest has only as much left as it: started later, it would end last.

Where that is more than ``Pace.limit`` rows, nothing is gained by waiting, and prompts are computed as fast as they can.
The number of tokens still to generate is taken from ``max_tokens``: a request may end earlier, and then the pace rises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_LEEWAY = 16  # steps by which a request may start late: a step has room for part of a prompt only


class Pace(NamedTuple):
    """What a device computes beside decodes.

    rows: tokens of a step that cost little more than a few. limit: from how many tokens a step on there is no point in
    spreading prompts.
    """

    rows: int
    limit: int


def prefill_budget(pace: Pace, decodes: int, work: int, horizon: int, pending: Iterable[tuple[int, int]]) -> int | None:
    """Prompt tokens to compute in this step beside ``decodes``; ``None``: as many as possible.

    Args:
        work: tokens that all requests have still to compute, answers included.
        horizon: steps that the longest answer still takes.
        pending: (prompt tokens left, answer tokens left) of each request whose prompt is not computed yet, those with
            the longest answers first.
    """
    horizon = max(horizon, 1)
    rows = max(pace.rows, -(-work // horizon))
    if rows > pace.limit:
        return None
    budget, tokens = rows - decodes, 0
    for prompt, answer in pending:
        tokens += prompt
        budget = max(budget, -(-tokens // (max(horizon - answer, 0) + _LEEWAY)))
    return None if decodes + budget > pace.limit else max(budget, 0)
