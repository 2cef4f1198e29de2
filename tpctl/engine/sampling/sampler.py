"""Chooses the next token of each row from logits that are spread over the ranks.

Every rank works on its own slice of the vocabulary: it divides by the temperature, drops what top-k, top-p and min-p
exclude, adds Gumbel noise and takes its best token (the largest of logits plus Gumbel noise is a sample of their
softmax). One small all-gather of (score, token id) then picks the winner, the same on every rank. Whole rows of logits
travel only where a top-p set is so flat that the ranks' best candidates do not hold it.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.accounting import rows_at_once, sampler_bytes
from tpctl.distributed import TPGroup
from tpctl.engine.sampling.bias import add_bias
from tpctl.engine.sampling.filters import min_p_floor, nucleus_floor
from tpctl.engine.sampling.logprobs import report_logprobs
from tpctl.engine.sampling.noise import gumbel_noise, noise_keys
from tpctl.engine.sampling.penalties import penalize
from tpctl.engine.scheduling.sequence import LATE, NOT_FINITE, REFUSED
from tpctl.engine.scheduling.token_counts import TokenCounts
from tpctl.partition.cuts import Range
from tpctl.wire.report import TokenLogprob
from tpctl.wire.sampling import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """What one row needs besides its logits.

    ``position`` is the place in the sequence that the sampled token will take; ``counts`` are of the tokens before it
    but for ``drafts``, the last ones (read only where a penalty is set). ``banned``: tokens that may not come here.
    ``allowed``: int32 [W + 1] on the device: a bit for each token of the vocabulary, the lowest first, that may come
    here, then 0; or 1, where none can be chosen; or 2, where it is not known yet.
    """

    params: SamplingParams
    position: int
    counts: TokenCounts | None = None
    drafts: SequenceType[int] = ()
    banned: Collection[int] = ()
    allowed: Tensor | None = None


class Sampler:
    """Samples from this rank's slice of the vocabulary.

    Args:
        slices: every rank's rows of the padded vocabulary.
        vocab_size: how many of all rows are real tokens.
    """

    def __init__(self, group: TPGroup, slices: SequenceType[Range], vocab_size: int) -> None:
        self.group = group
        self.first = slices[group.rank].start
        reals = [len(piece.clipped(vocab_size)) for piece in slices]
        self.real = reals[group.rank]
        self.widest = max(reals)
        self._vocab = group.size * self.widest
        self._piece = rows_at_once(self._vocab)

    def working_bytes(self, rows: int) -> int:
        """Bytes of a GPU's memory that ``sample`` takes at most, besides the logits, for so many rows."""
        return sampler_bytes(rows, self._vocab)

    def whole_rows(self, logits_RV: Tensor) -> tuple[Tensor, int]:
        """All ranks' logits [ranks, R, V], padding as -inf, and how many of the ranks * V columns are to be read.

        Launches work on the device alone; with one rank nothing is copied.
        """
        if self.group.size == 1:
            return logits_RV.unsqueeze(0), self.real
        mine = logits_RV.new_full((len(logits_RV), self.widest), float("-inf"))
        mine[:, : self.real] = logits_RV[:, : self.real]
        return self.group.all_gather(mine), self.group.size * self.widest

    def sample(
        self, logits_RV: Tensor, rows: SequenceType[SamplingRow]
    ) -> tuple[list[int], list[TokenLogprob | None] | None]:
        """Token ids, one a row, the same on every rank; and log-probabilities where any row wants them.

        A row whose scores hold NaN, or whose best one is infinite, gets ``NOT_FINITE``; one of which ``allowed`` says
        that none can be chosen, ``REFUSED``, or not yet, ``LATE``.

        Args:
            logits_RV: this rank's logits in any float dtype, padding columns included.
        """
        if logits_RV.device.type == "cpu" or len(rows) <= self._piece:
            return self._sample(logits_RV, rows)
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for start in range(0, len(rows), self._piece):
            piece = slice(start, start + self._piece)
            tokens, reported = self._sample(logits_RV[piece], rows[piece])
            token_ids += tokens
            logprobs += [None] * len(tokens) if reported is None else reported
        return token_ids, logprobs if any(entry is not None for entry in logprobs) else None

    def _sample(
        self, logits_RV: Tensor, rows: SequenceType[SamplingRow]
    ) -> tuple[list[int], list[TokenLogprob | None] | None]:
        logits = self._own(logits_RV)
        params = [row.params for row in rows]
        counted = ((index, row.counts) for index, row in enumerate(rows) if row.params.penalizes)
        penalized = {at: counts.with_drafts(rows[at].drafts) for at, counts in counted if counts is not None}
        banned = [index for index, row in enumerate(rows) if row.banned]
        masked = [index for index, row in enumerate(rows) if row.allowed is not None]
        changed = penalized or banned or masked or any(p.logit_bias for p in params)
        if all(p.greedy and p.logprobs is None for p in params) and not changed:
            best, ids = self._local_best(logits)  # float32 would order them alike: spare the copy
            return self._winners(best, ids).tolist(), None
        raw = logits = logits.float()
        refused = None
        if changed:
            logits = logits.clone()
            add_bias(logits, params, self.first, self.real)
            penalize(logits, params, penalized, self.first, self.real)
            self._ban(logits, rows, banned)
            refused = self._mask(logits, rows, masked) if masked else None
        if all(p.greedy for p in params):
            best, ids = self._local_best(logits)
        else:
            best, ids = self._sampled_best(logits, rows)
        token_ids = self._winners(best, ids)
        tokens: list[int] = (token_ids if refused is None else torch.where(refused < 0, refused, token_ids)).tolist()
        if all(p.logprobs is None for p in params):
            return tokens, None
        wanted = [p.logprobs for p in params]
        return tokens, report_logprobs(raw, token_ids, self.first, self.widest, wanted, self.group)

    def logprobs(self, logits_RV: Tensor, token_ids_R: Tensor, count: int) -> list[TokenLogprob]:
        """Of tokens that did come, each with ``count`` likeliest ones (collective); float32, as for those chosen."""
        logits = self._own(logits_RV).float()
        wanted = [count] * len(logits)
        reported = report_logprobs(logits, token_ids_R, self.first, self.widest, wanted, self.group)
        return [one for one in reported if one is not None]

    def _own(self, logits_RV: Tensor) -> Tensor:
        """Without padding columns; a rank that holds nothing else keeps one column that can never win."""
        logits = logits_RV[:, : max(self.real, 1)]
        return logits if self.real else torch.full_like(logits, float("-inf"))

    def _local_best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best score of each row and its token id, the lowest id among equals."""
        if scores.device.type == "cpu":
            index = _argmax(scores)
        else:
            index = scores.argmax(-1, keepdim=True)
        return scores.gather(-1, index).squeeze(-1), index.squeeze(-1) + self.first

    def _winners(self, best_R: Tensor, ids_R: Tensor) -> Tensor:
        """The winning token ids [R] over all ranks, ``NOT_FINITE`` for rows with NaN or without a finite best score.

        A maximum is NaN where any score is. On all ranks one that is not finite then beats those that are.
        """
        broken = ~(best_R < float("inf"))
        ids_R = ids_R.masked_fill(broken | (best_R == float("-inf")), NOT_FINITE)
        return self.agree(best_R.masked_fill(broken, float("inf")), ids_R)

    def agree(self, best_R: Tensor, ids_R: Tensor) -> Tensor:
        """The winning token ids [R] over all ranks; lower ranks hold lower ids, so ties go to the lowest id."""
        if self.group.size == 1:
            return ids_R
        # float64 holds a float32 score and a token id exactly, so that one gather carries both.
        pairs = self.group.all_gather(torch.stack([best_R.double(), ids_R.double()], dim=-1))
        winner = pairs[..., 0].argmax(0)
        return pairs[winner, torch.arange(len(winner), device=winner.device), 1].long()

    def _ban(self, logits: Tensor, rows: SequenceType[SamplingRow], which: SequenceType[int]) -> None:
        """Let the banned tokens of the rows ``which`` never win; in place."""
        pairs = [(index, token - self.first) for index in which for token in rows[index].banned]
        held = [(index, column) for index, column in pairs if 0 <= column < self.real]
        if held:
            places, columns = zip(*held, strict=True)
            at = torch.tensor(places, device=logits.device), torch.tensor(columns, device=logits.device)
            values = logits[at]
            # NaN and infinity stay: they tell that the row is broken.
            logits[at] = torch.where(values < float("inf"), float("-inf"), values)

    def _mask(self, logits: Tensor, rows: SequenceType[SamplingRow], which: SequenceType[int]) -> Tensor:
        """Let only allowed tokens win in the rows ``which``, in place; of all rows, int64 [R], ``REFUSED`` or ``LATE``
        where none is to be chosen, else 0."""
        words = torch.stack([allowed for index in which if (allowed := rows[index].allowed) is not None])
        at = torch.tensor(which, device=logits.device)
        if self.real:
            values = logits[at]
            # NaN and infinity stay: they tell that the row is broken.
            out = ~held_bits(words, self.first, self.real) & (values < float("inf"))
            logits[at] = values.masked_fill(out, float("-inf"))
        refused = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        refused[at] = torch.tensor([0, REFUSED, LATE], device=logits.device)[words[:, -1].long()]
        return refused

    def _sampled_best(self, logits: Tensor, rows: SequenceType[SamplingRow]) -> tuple[Tensor, Tensor]:
        device = logits.device
        params = [row.params for row in rows]
        # Greedy rows keep their logits as scores: temperature 1 and no noise.
        temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device).unsqueeze(1)
        scaled = logits / temperature
        floor = torch.full((len(rows),), float("-inf"), device=device)
        nucleus = [i for i, p in enumerate(params) if not p.greedy and (p.top_k or p.top_p < 1)]
        if nucleus:
            at = torch.tensor(nucleus, device=device)
            floor[at] = nucleus_floor(scaled[at], [params[i] for i in nucleus], self.group, self.widest)
        if any(p.min_p and not p.greedy for p in params):
            floor = torch.maximum(floor, min_p_floor(scaled, params, self.group))
        floor.clamp_(min=torch.finfo(floor.dtype).min)  # what is masked out is never kept

        best, ids = self._local_best(scaled)
        keys = torch.tensor([noise_keys(row.params.seed, row.position) for row in rows], device=device)
        # Few tokens pass a nucleus, so noise is drawn for those alone; other rows draw it for the whole slice.
        kept_counts = (scaled[nucleus] >= floor[nucleus].unsqueeze(1)).sum(-1) if nucleus else None
        narrow = set(nucleus)
        wide = [i for i, p in enumerate(params) if not p.greedy and i not in narrow]
        if nucleus and kept_counts is not None:
            at = torch.tensor(nucleus, device=device)
            width = max(1, int(kept_counts.max()))
            values, index = scaled[at].topk(min(width, scaled.shape[1]), dim=-1)
            best[at], ids[at] = self._noisy_best(values, index + self.first, keys[at], floor[at])
        if wide:
            at = torch.tensor(wide, device=device)
            all_ids = torch.arange(self.first, self.first + scaled.shape[1], device=device)
            best[at], ids[at] = self._noisy_best(scaled[at], all_ids.expand(len(wide), -1), keys[at], floor[at])
        return best, ids

    @staticmethod
    def _noisy_best(values: Tensor, ids: Tensor, keys: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """The best of ``values`` plus noise among those that reach ``floor``; -inf where none does."""
        scores = values + gumbel_noise(keys, ids)
        scores.masked_fill_(values < floor.unsqueeze(1), float("-inf"))
        index = scores.argmax(-1, keepdim=True)
        return scores.gather(-1, index).squeeze(-1), ids.gather(-1, index).squeeze(-1)


def held_bits(words_GW: Tensor, first: int, count: int) -> Tensor:
    """bool [G, count]: the bits from ``first`` on of int32 words, the lowest of each first."""
    bytes_GB = words_GW.view(torch.uint8)[:, first >> 3 : (first + count + 7) >> 3]
    shifts = torch.arange(8, dtype=torch.uint8, device=words_GW.device)
    bits = (bytes_GB.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, first & 7 : (first & 7) + count].bool()


def _argmax(scores_RV: Tensor, width: int = 256) -> Tensor:
    """``argmax(-1, keepdim=True)``, the lowest index among equals; NaN counts as the largest.

    On CPUs torch finds maxima with vector instructions but their places one element at a time, which takes five times
    as long for float32 and more for bfloat16. So places are sought only among the maxima of runs of ``width``
    columns, and then within one run.
    """
    whole = scores_RV.shape[1] // width * width
    runs = scores_RV[:, :whole].reshape(len(scores_RV), -1, width)
    if runs.shape[1] < 2:
        return scores_RV.argmax(-1, keepdim=True)
    run = runs.amax(-1).argmax(-1, keepdim=True)
    inside = runs.take_along_dim(run.unsqueeze(-1), 1).squeeze(1).argmax(-1, keepdim=True)
    place = run * width + inside
    if whole == scores_RV.shape[1]:
        return place
    rest = scores_RV[:, whole:].argmax(-1, keepdim=True) + whole
    last, best = scores_RV.gather(1, rest), scores_RV.gather(1, place)
    return torch.where((last > best) | last.isnan(), rest, place)
