"""How likely a prompt's own tokens are: asked with a ``Request``, told with its last ``Output``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Scoring:
    """Tell what the model makes of a prompt's tokens from ``first`` on, each given those before it.

    Two files on the engine's host hold distributions, float32 [rows, vocabulary], natural logarithms: the ranks write
    theirs into ``keep``, each its own slice of the vocabulary, or compare theirs with those of ``against``.

    Attributes:
        first: at least 1, since nothing stands before the token 0.
        row: that of the token ``first`` in the files.
        rows: of the files.
    """

    first: int
    row: int = 0
    rows: int = 0
    keep: str | None = None
    against: str | None = None


class TokenScore(NamedTuple):
    """What a model makes of a token.

    Attributes:
        logprob: its log-probability.
        divergence: the Kullback-Leibler divergence of the model's distribution at its place from that of ``against``,
            sum of p (log p - log q) with p that of ``against``, in nats; ``None`` without one.
        same_top: whether both have the same likeliest token.
    """

    logprob: float
    divergence: float | None = None
    same_top: bool | None = None
