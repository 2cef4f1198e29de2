"""A text longer than a context, in windows that overlap: each token is scored once, with much before it.

Perplexity of models of a fixed length, as https://huggingface.co/docs/transformers/perplexity has it: windows of
``context`` tokens begin every ``stride`` tokens, and each scores what the one before has not. What a tokenizer puts
before every text (a BOS) stands before every window too, as the model was trained, and counts as context.

    text      0 1 2 3 4 5 6 7 8 9        context 6, stride 2, no BOS
    window 0  . x x x x x                "." context, "x" scored
    window 1      . . . . x x
    window 2          . . . . x x
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpctl.errors import RequestError, UsageError


@dataclass(frozen=True)
class Window:
    """``token_ids``, of which those from ``first`` on are scored; ``row``: how many were scored before."""

    token_ids: list[int]
    first: int
    row: int


@dataclass(frozen=True)
class Windows:
    """All windows of a text.

    Attributes:
        prefix: what stands before each; none of it is scored.
        token_ids: the text.
        context: tokens of a window at most, its prefix included.
        stride: tokens from where a window begins to where the next one does.

    Raises:
        UsageError: the stride leaves a window nothing to score, or a token nothing before it.
        RequestError: the text has no token that stands behind another one.
    """

    prefix: Sequence[int]
    token_ids: Sequence[int]
    context: int
    stride: int

    def __post_init__(self) -> None:
        most = self._room - self._unscored
        if not 1 <= self.stride <= most:
            raise UsageError(
                f"--stride {self.stride} is not between 1 and {most}, so that each token of a window of "
                f"{self.context} (--context) has one before it"
            )
        if self.count < 1:
            raise RequestError(
                f"the text has {len(self.token_ids)} tokens, of which none stands behind another; give a longer one"
            )

    @property
    def count(self) -> int:
        """Tokens that are scored."""
        return len(self.token_ids) - self._unscored

    @property
    def _room(self) -> int:
        return self.context - len(self.prefix)

    @property
    def _unscored(self) -> int:
        """Tokens that nothing stands before."""
        return 0 if self.prefix else 1

    def __iter__(self) -> Iterator[Window]:
        done = self._unscored
        for begin in range(0, len(self.token_ids), self.stride):
            end = min(begin + self._room, len(self.token_ids))
            ids = [*self.prefix, *self.token_ids[begin:end]]
            yield Window(ids, len(self.prefix) + done - begin, done - self._unscored)
            done = end
            if end == len(self.token_ids):
                return
