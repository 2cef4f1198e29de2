"""One request inside the engine."""

from __future__ import annotations

from tpctl.engine.scheduling.token_counts import TokenCounts
from tpctl.wire.report import TokenLogprob
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring, TokenScore

NOT_FINITE = -2
"""What stands for the token of a row whose scores are NaN, or whose best one is infinite (``kernels.common.noise``)."""

REFUSED = -3
"""What stands for the token of a row that has a grammar and can be given none; why, rank 0's sequence says."""

LATE = -4
"""What stands for the token of a row that has a grammar which does not say yet what may come."""

GONE = -1
"""In a block table: what no later token sees, of a pool whose layers have a window."""


class Sequence:
    """A prompt and the tokens generated so far.

    Three counts say how far it has come:

        token_ids                 tokens whose ids this process knows: the prompt, then what was sampled
        num_in_flight             tokens sampled by steps whose results have not come back yet
        num_computed_tokens       tokens whose keys and values are in the cache once all started steps end

    ``num_stale`` more tokens are under way that nobody waits for any more.

    Attributes:
        block_tables: of each pool, ids of its KV blocks, in order, or ``GONE``; empty while it holds none.
        num_slots: tokens that there are blocks for.
        num_hashed_blocks: how many of them, from the first, are registered for prefix sharing.
        has_shared: whether, when it was last given blocks, any were found in the prefix cache.
        alone: share no blocks, neither found nor offered.
        admissions: how often it was given blocks anew; tells block tables from those before a preemption.
        borders: behind so many blocks others may go on: where its prompt ends, and where others' blocks were found to.
        arrival: how many sequences came before.
        max_num_tokens: most tokens of prompt and answer together.
        rope_offset: where the rotary table begins that its keys are rotated by (see ``RotaryTable``).
        stop_token_ids: tokens that end it.
        num_cached_tokens: prompt tokens that prefix caching spared when it was first admitted.
        state_slot: where recurrent layers have its state, of a sequence that runs.
        state_source: the slot that its next step goes on from; ``None``: it begins.
        state_digest: the hash under which its state was last kept while it answers.
        scoring: that its prompt's tokens are scored, for which all of them must be computed.
        scores: those there are, by the place of the token.
        prompt_logprobs: those of the prompt's tokens, by their place, where they were asked for and not yet told.
        problem: why it can be given no token, on rank 0.
    """

    def __init__(
        self,
        id: str,
        token_ids: list[int],
        params: SamplingParams,
        max_num_tokens: int,
        scoring: Scoring | None = None,
    ) -> None:
        self.id = id
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.params = params
        self.arrival = 0
        self.max_num_tokens = max_num_tokens
        self.num_in_flight = 0
        self.num_stale = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_tables: tuple[list[int], ...] = ()
        self.num_slots = 0
        self.num_hashed_blocks = 0
        self.has_shared = False
        self.alone = scoring is not None or params.prompt_logprobs is not None
        self.admissions = 0
        self.block_hash = b""
        self.borders: tuple[int, ...] = ()
        self.rope_offset = 0
        self.stop_token_ids: frozenset[int] = frozenset(params.stop_token_ids)
        self.finished = False
        self.state_slot: int | None = None
        self.state_source: int | None = None
        self.state_digest = b""
        self.scoring = scoring
        self.scores: dict[int, TokenScore] = {}
        self.prompt_logprobs: dict[int, TokenLogprob] = {}
        self.problem: str | None = None
        self._counts: TokenCounts | None = None

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {len(self.token_ids)} tokens, {self.num_computed_tokens} computed)"

    def counts(self) -> TokenCounts:
        """Of all tokens that are known; it costs what came since it was last asked for."""
        if self._counts is None:
            self._counts = TokenCounts(self.num_prompt_tokens)
        return self._counts.follow(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens that exist, known or in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def scored_from(self) -> int | None:
        """The first place of the prompt whose token is scored, if any; log-probabilities are told with the first token
        of the answer, and need not be found again after that."""
        if self.scoring is not None:
            return self.scoring.first
        told = len(self.token_ids) > self.num_prompt_tokens
        return None if told or self.params.prompt_logprobs is None else 1

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def awaits_its_end(self) -> bool:
        """Whether a token in flight is known to be its last, so that no further step should be started for it."""
        return self.num_in_flight > 0 and self.num_tokens >= self.max_num_tokens

    def finish_reason(self, token: int) -> str | None:
        """Why it ends with ``token``, its last one so far."""
        if token in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_num_tokens else None

    @property
    def not_finite(self) -> str:
        """What is said of it where its next token cannot be chosen."""
        return (
            f"the model's logits are not finite at position {len(self.token_ids)}: its weights, or what --dtype "
            "computes from them, hold NaN or infinity; check the checkpoint, or try --dtype float32"
        )

    def told_prompt_logprobs(self) -> list[TokenLogprob] | None:
        """What is told with its first token, and is then no longer kept."""
        if len(self.token_ids) != self.num_prompt_tokens + 1:
            return None
        logprobs, self.prompt_logprobs = self.prompt_logprobs, {}
        return [logprobs[place] for place in sorted(logprobs)]
