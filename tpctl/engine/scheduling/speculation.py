"""Speculation that changes nothing: tokens are proposed, computed in one step, and kept as far as they are the answer.

A step computes a sequence's last token and ``drafts`` behind it, as a chunk, and each of these rows samples the token
that follows it as if the tokens before were the answer. They are as far as each draft is the token that the row before
has sampled; the first token that differs is the answer's, and what stands behind it is thrown away: its keys are
overwritten, and nobody finds its blocks.

Nothing else is needed for the distribution: a row's sample is drawn as it is without speculation, from the same logits
with the same filters, penalties and noise, so a draft stays with the probability that it has, and otherwise a token
comes that is drawn from the others. That is the rule of rejection sampling for drafts that are certain of themselves
(Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023). Since the noise is a function of
seed, position and token, even the tokens are those that come without.

How many tokens to draft follows from how often drafts held so far. n drafts of a sequence give it
1 + a_1 + a_1 a_2 + ... + a_1 ... a_n tokens, a_i being the chance of draft i if those before it hold, the other
sequences of the step get one each, and it takes the time that ``RowCost`` says. The n that gives the step the most
tokens for its time is taken, often 0. What would have been proposed is compared with what comes all the same, so
drafting begins again when it would help.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from math import exp2
from typing import NamedTuple, Protocol

from tpctl.engine.scheduling.ngram import MOST_COMPARED, Match, NgramIndex
from tpctl.engine.scheduling.sequence import Sequence

MOST_DRAFTS = 12
"""Drafts of a sequence in a step."""
_WEIGHT = 1 / 8
"""Of the newest draft in the share of those that held."""
_OF_ALL = 1 / 64
"""The same in the share of all sequences, which a new one begins with."""
_FIRST = (0.0, 0.0, 0.35, 0.45, 0.55, 0.65, 0.7, 0.75, 0.85)
"""What that share is taken for at first, by the length of the match."""


MOST_PREDICTED = 4
"""The same, of those that a predictor makes: it was trained for the first of them, and each takes a pass."""
PREDICTED = (0.8, 0.65, 0.55, 0.45, *(0.0,) * (MOST_COMPARED - 3))
"""As ``_FIRST``, of drafts of a predictor, by their place."""
_EACH = 8
"""At one of so many tokens one more is predicted than is worth it, which tells whether that would hold."""


class RowCost(NamedTuple):
    """What a step takes, in the time of one without any rows: ``row`` for each row, and up to ``few`` more where there
    are several, half of it from the third; ``first`` more for a sequence that has drafts, which are computed as a chunk
    of a prompt is, or for a step that has; ``draft`` for each draft that a predictor makes."""

    first: float
    row: float
    draft: float = 0.0
    few: float = 0.0

    def time(self, rows: int, drafts: bool) -> float:
        return 1 + self.row * rows + self.few * (1 - exp2((1 - rows) / 2)) + self.first * drafts


class Drafter(Protocol):
    """Proposes what follows a sequence, on every rank the same."""

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        """At most ``most`` tokens that may follow ``sequence.token_ids``, all of which are known."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""


class NgramDrafter:
    """Prompt lookup (``engine.scheduling.ngram``)."""

    def __init__(self) -> None:
        self._indices: dict[str, NgramIndex] = {}

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        return self._indices.setdefault(sequence.id, NgramIndex()).find(sequence.token_ids, most)

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.id, None)


class PredictedDrafter:
    """Proposes what the model's own predictor has drafted at the end of the step before (``engine.runners``)."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, list[int]]] = {}

    def keep(self, sequence: Sequence, length: int, drafts: list[int]) -> None:
        """These tokens may follow the first ``length`` of ``sequence``."""
        self._kept[sequence.id] = length, drafts

    def propose(self, sequence: Sequence, most: int) -> Match | None:
        """A match of no length: drafts are told apart by their places alone."""
        length, drafts = self._kept.get(sequence.id, (0, []))
        return Match(drafts[:most], 0) if drafts and length == len(sequence.token_ids) else None

    def forget(self, sequence: Sequence) -> None:
        self._kept.pop(sequence.id, None)


@dataclass
class _Past:
    """How often a sequence's drafts held, by the length of the match, and what was proposed last."""

    shares: list[float]
    proposed: Match | None = None


class Speculation:
    """What is proposed for each sequence, and how much of it is computed.

    Args:
        cost: what a step takes.
        most_rows: of a step that are sampled; ``None``: any number.
        shares: what the shares of drafts that held are taken for at first; later sequences begin with those of the
            sequences before them.
        together: ``RowCost.first`` and ``draft`` are those of a step, whose sequences all have drafts, and not of each.

    Attributes:
        kind: what proposes, by its name in ``EngineSettings.speculate``.
        ahead: slots behind a step's tokens that the drafter writes to, if a sequence has them.
    """

    def __init__(
        self,
        drafter: Drafter,
        cost: RowCost,
        most_rows: int | None = None,
        shares: SequenceType[float] = _FIRST,
        *,
        together: bool = False,
    ) -> None:
        self._drafter, self._together = drafter, together
        self.most_rows = most_rows
        self._cost, self._shares = cost, list(shares)
        predicts = isinstance(drafter, PredictedDrafter)
        self.kind, self.ahead = ("mtp", MOST_PREDICTED - 1) if predicts else ("ngram", 0)
        self._pasts: dict[str, _Past] = {}
        self.drafted = 0
        self.accepted = 0

    def propose(self, sequence: Sequence, most: int, rows: int) -> tuple[int, ...]:
        """What to compute behind the last token of ``sequence``: at most ``most`` tokens. What was proposed, also of
        what is not worth computing, is learned from when the tokens have come.

        Args:
            rows: those of the step without drafts: one a sequence.
        """
        match, count = self._propose(sequence, rows, most)
        return () if match is None else tuple(match.tokens[:count])

    def propose_ahead(self, sequence: Sequence, rows: int) -> bool:
        """Propose behind the known tokens, of which the next is already being computed, to learn from it; whether more
        than that would be drafted: if it is the one that is proposed, the others may still be."""
        return self._propose(sequence, rows, MOST_DRAFTS)[1] > 1

    def _propose(self, sequence: Sequence, rows: int, most: int) -> tuple[Match | None, int]:
        """What may follow a sequence, kept for ``learn``, and how much of it is worth computing."""
        past = self._past(sequence)
        past.proposed = match = self._drafter.propose(sequence, MOST_DRAFTS)
        if match is None:
            return None, 0
        drafting = rows if self._together else 1
        return match, best_count(_chances(past.shares, match), self._cost, rows, most, drafting)

    def wanted(self, sequence: Sequence, length: int, rows: int) -> int:
        """How many tokens a predictor should draft behind the first ``length`` of a sequence, in steps of so many
        ``rows`` without drafts: those that would be worth their pass and their row, and now and then one more."""
        shares = self._past(sequence).shares[:MOST_PREDICTED]
        count = best_count(
            shares, self._cost, rows, MOST_PREDICTED, rows if self._together else 1, draft=self._cost.draft
        )
        return min(count + (length % _EACH == 0), MOST_PREDICTED)

    def _past(self, sequence: Sequence) -> _Past:
        return self._pasts.setdefault(sequence.id, _Past(list(self._shares)))

    def learn(self, sequence: Sequence, drafts: SequenceType[int], came: SequenceType[int]) -> None:
        """A step has computed these drafts, and these tokens came."""
        self.drafted += len(drafts)
        self.accepted += sum(draft == token for draft, token in zip(drafts, came, strict=False))
        past = self._pasts.get(sequence.id)
        if past is None or past.proposed is None:
            return
        match, past.proposed = past.proposed, None
        for place, (draft, token) in enumerate(zip(match.tokens, came, strict=False)):
            at = min(match.length + place, MOST_COMPARED)
            for shares, weight in ((past.shares, _WEIGHT), (self._shares, _OF_ALL)):
                shares[at] += weight * ((draft == token) - shares[at])
            if draft != token:
                return

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._pasts.pop(sequence.id, None)
        self._drafter.forget(sequence)


def verified(drafts: SequenceType[int], sampled: SequenceType[int]) -> SequenceType[int]:
    """The tokens that come, at least one: of ``sampled``, one row more than ``drafts``, those whose tokens before are
    the answer."""
    count = 1
    while count < len(sampled) and sampled[count - 1] == drafts[count - 1]:
        count += 1
    return sampled[:count]


def best_count(
    chances: SequenceType[float], cost: RowCost, rows: int, most: int, drafting: int = 1, draft: float = 0.0
) -> int:
    """How many drafts of a sequence, at most ``most``, give the step the most tokens for its time.

    Args:
        chances: that each draft holds if those before it do.
        rows: of the step without drafts, each of which gives one token.
        drafting: sequences that have as many drafts, and the same chances.
        draft: what it takes to make one of each of them.
    """
    best, best_rate = 0, rows / cost.time(rows, False)
    tokens, reached = float(rows), 1.0
    for count, chance in enumerate(chances[:most], 1):
        reached *= chance
        tokens += reached * drafting
        rate = tokens / (cost.time(rows + count * drafting, True) + draft * count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def _chances(shares: SequenceType[float], match: Match) -> list[float]:
    """A draft whose predecessors hold ends a match that is longer by them."""
    return [shares[min(match.length + place, MOST_COMPARED)] for place in range(len(match.tokens))]
