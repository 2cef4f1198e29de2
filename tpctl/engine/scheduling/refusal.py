"""What a request must be to be served at all."""

from __future__ import annotations

from tpctl.errors import shorten
from tpctl.wire.messages import Request


def refusal(request: Request, max_model_len: int, vocab_size: int) -> str | None:
    """Why a model of so many tokens of context and of vocabulary cannot serve a request; ``None``: it can."""
    length, sampling = len(request.token_ids), request.sampling
    if not length:
        return "the prompt is empty"
    if length >= max_model_len:
        return (
            f"the prompt has {length} tokens, but at most {max_model_len - 1} leave room for an answer "
            f"within --max-model-len {max_model_len}; shorten it or raise the limit"
        )
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocab_size:
        worst = max(request.token_ids, key=lambda token: abs(token - vocab_size // 2))
        return (
            f"the prompt holds token id {worst}, but the model knows ids 0 to {vocab_size - 1}; "
            "its tokenizer does not belong to it"
        )
    if unknown := [token for token in sampling.stop_token_ids if not 0 <= token < vocab_size]:
        return f"stop_token_ids holds {shorten(str(unknown[0]))}, but the model knows ids 0 to {vocab_size - 1}"
    if unknown := [token for token, _ in sampling.logit_bias if not 0 <= token < vocab_size]:
        return f"logit_bias holds token {unknown[0]}, but the model knows ids 0 to {vocab_size - 1}"
    return None
