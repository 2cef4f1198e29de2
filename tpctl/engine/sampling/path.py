"""Where and how a step's tokens are sampled."""

from __future__ import annotations

from enum import Enum

from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.wire.sampling import SamplingParams


class SamplingPath(Enum):
    """What a GPU's step does for the rows that need most. Each has captured graphs of its own."""

    DIRECT = "direct"
    """The best score of all tokens, with noise or without."""
    ONE_FLOOR = "one floor"
    """One search for the least logit that may be sampled: top-k, top-p or min-p."""
    TWO_FLOORS = "two floors"
    """A second search within what the first one leaves: top-k with top-p."""
    HOST = "host"
    """The general sampler: penalties need the tokens so far, biases are each request's own, log-probabilities go to the
    host, grammars mask tokens by those before, and where an answer may not end yet some are banned. The next step waits
    for it."""

    @classmethod
    def of(cls, batch: ScheduledBatch) -> SamplingPath:
        """The path for all of the batch's ``sampled`` together."""
        paths = {cls._of(item.sequence.params, item.num_generated) for item in batch.sampled}
        return next((path for path in (cls.HOST, cls.TWO_FLOORS, cls.ONE_FLOOR) if path in paths), cls.DIRECT)

    @classmethod
    def _of(cls, params: SamplingParams, num_generated: int) -> SamplingPath:
        asks_host = params.penalizes or params.logit_bias or params.logprobs is not None or params.guide
        if asks_host or num_generated < params.min_tokens:
            return cls.HOST
        if params.greedy or not (params.top_k or params.top_p < 1 or params.min_p):
            return cls.DIRECT
        return cls.TWO_FLOORS if params.top_k and params.top_p < 1 else cls.ONE_FLOOR
