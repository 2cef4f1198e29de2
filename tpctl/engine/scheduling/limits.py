"""How large steps and requests may be, and what a request must be to be served at all."""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.engine.scheduling.sequence import Sequence
from tpctl.errors import shorten
from tpctl.wire.messages import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model and an engine's settings allow.

    Attributes:
        max_num_seqs, max_num_batched_tokens: of a step.
        max_model_len: tokens of prompt and answer at most; a sequence that reaches it ends with "length".
        vocab_size: token ids from this on are refused: no embedding row belongs to them.
        eos_token_ids: tokens that end an answer.
        context_full: what is said of an answer that may have been longer but for ``max_model_len``.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    context_full: str | None = None

    def sequence(self, request: Request) -> Sequence:
        """A request as the engine runs it."""
        longest = min(len(request.token_ids) + request.sampling.max_tokens, self.max_model_len)
        sequence = Sequence(request.id, request.token_ids, request.sampling, longest, request.scoring)
        if not request.sampling.ignore_eos:
            sequence.stop_token_ids |= self.eos_token_ids
        return sequence

    def note(self, sequence: Sequence, reason: str) -> str | None:
        """What is said of a sequence that ended for a ``reason``, where the context, and not ``max_tokens``, did it."""
        cut = sequence.num_prompt_tokens + sequence.params.max_tokens > self.max_model_len
        return self.context_full if reason == "length" and cut else None

    def refusal(self, request: Request) -> str | None:
        """Why a request cannot be served; ``None``: it can."""
        length, sampling = len(request.token_ids), request.sampling
        if not length:
            return "the prompt is empty"
        if length >= self.max_model_len:
            return (
                f"the prompt has {length} tokens, but at most {self.max_model_len - 1} leave room for an answer "
                f"within --max-model-len {self.max_model_len}; shorten it or raise the limit"
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self.vocab_size:
            worst = max(request.token_ids, key=lambda token: abs(token - self.vocab_size // 2))
            return (
                f"the prompt holds token id {worst}, but the model knows ids 0 to {self.vocab_size - 1}; "
                "its tokenizer does not belong to it"
            )
        if unknown := [token for token in sampling.stop_token_ids if not 0 <= token < self.vocab_size]:
            return (
                f"stop_token_ids holds {shorten(str(unknown[0]))}, but the model knows ids 0 to {self.vocab_size - 1}"
            )
        if unknown := [token for token, _ in sampling.logit_bias if not 0 <= token < self.vocab_size]:
            return f"logit_bias holds token {unknown[0]}, but the model knows ids 0 to {self.vocab_size - 1}"
        return None
