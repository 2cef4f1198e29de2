"""CUDA graphs of steps with prefill chunks, decodes beside them.

Such a step is padded to a number of rows in which decodes and chunks share freely. At a pace (``engine.scheduling.
pacing``) steps are alike, and each size is captured when it first comes. Elsewhere a step of a few hundred tokens, a
question in a chat or one beside the answers of others, is launched kernel by kernel, which takes longer than its
arithmetic; what sizes come is captured while nothing is to be done, or when it has come several times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tpctl.accounting import CHUNKS, SHORT, most_state_chunks, sampled_rows
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.steps.graphs import StepInputs
from tpctl.engine.steps.states import NUMBERS, StepStates, count_chunks
from tpctl.kernels.sampling.prepare import DecodeInputs

_ROWS = 16  # captured steps have a multiple of this many rows, or as many as there may be
_MOST = 48  # such graphs of a kind, paced or short; a job takes about ten
_MISSES = 4  # steps of a size until it is captured at once
_STATE_CHUNKS = 8  # a captured step has a multiple of so many chunks of recurrent layers


@dataclass(frozen=True)
class MixedInputs:
    """What a captured step of decodes and prefill chunks reads: parts of its numbers, and what is made of them.

    rows: every new token as a row: first the decodes, then the chunks' tokens, then padding. num_decodes: [1].
    query_start_P1: [P + 1], the chunks' first rows; those of empty chunks, at the end, begin where the last one ends.
    last_row_P: [P], the last row of each chunk, whose block table is complete. seq_lens_P: [P], tokens up to a chunk's
    last. logits_rows: [R], rows that are sampled. state_chunks, state_sequences: where layers are recurrent, the
    columns of ``kernels.delta_net.tables.Chunks``, those of empty chunks at the end.
    """

    rows: DecodeInputs
    num_decodes: Tensor
    query_start_P1: Tensor
    last_row_P: Tensor
    seq_lens_P: Tensor
    logits_rows: Tensor
    state_chunks: Tensor | None = None
    state_sequences: Tensor | None = None


class MixedKey(NamedTuple):
    """A graph: rows, chunks of recurrent layers, rows that are sampled, and how."""

    rows: int
    state_chunks: int
    sampled: int
    path: SamplingPath


class MixedGraphs:
    """Captured steps of decodes and prefill chunks together.

    Args:
        pace: how large those are that are paced; ``None``: none is.
        short: most tokens of one that is not.
        step: computes one such step from its inputs.
        states: whether the model has recurrent layers.

    Attributes:
        last: which graph has been run last.
    """

    def __init__(
        self,
        steps: StepInputs,
        pace: Pace | None,
        step: Callable[[MixedInputs, SamplingPath], None],
        short: int = SHORT,
        states: bool = False,
    ) -> None:
        self._steps = steps
        self._pace = pace
        self._step = step
        self._short = short
        self._states = states
        self._chunks = CHUNKS if pace is None else pace.chunks
        self.last: MixedKey | None = None
        self._captured: set[MixedKey] = set()
        self._missed: Counter[MixedKey] = Counter()

    @staticmethod
    def most_numbers(rows: int, chunks: int = CHUNKS, *, states: bool = False) -> int:
        """int32 numbers that a step of ``rows`` is given at most."""
        beside = NUMBERS * rows + 5 * most_state_chunks(rows, chunks) + 4 * (chunks + 1) if states else 0
        return 4 * rows + 3 * chunks + 2 + beside

    def meet(self, batch: ScheduledBatch) -> bool:
        """Take note of a step; whether it has a graph, or is to get one now: a paced one that is neither larger than
        the limit nor so small that padding would cost much, or a short one whose size has come before."""
        least, most = self._bounds(batch.paced)
        if not (0 < batch.num_prefills <= self._chunks and least // 2 <= batch.num_tokens <= most):
            return False
        state_chunks = count_chunks(batch.items[batch.num_decodes :]) if self._states else 0
        key = self._key(batch.num_tokens, state_chunks, len(batch.sampled), SamplingPath.of(batch), batch.paced)
        if state_chunks > key.state_chunks:
            return False
        if key in self._captured:
            return True
        if self._full(key):
            return False
        self._missed[key] += 1
        return batch.paced or self._missed[key] >= _MISSES

    def capture_missed(self) -> bool:
        """Capture a size that has come, the one that came most often; whether more are left. Called while there is
        nothing to do: what may come in meanwhile waits for one."""
        wanted = [key for key, _ in self._missed.most_common() if key not in self._captured]
        self._missed.clear()
        if not wanted or self._full(wanted[0]):
            return False
        self._captured.add(wanted[0])
        self._steps.prepare(("mixed", *wanted[0]), lambda: self._make(wanted[0]))
        self._missed.update(wanted[1:])
        return len(wanted) > 1

    def sizes(self, *, paced: bool) -> list[int]:
        """Rows of all graphs there may be, the fewest first."""
        least, most = self._bounds(paced)
        return sorted(
            {self._key(tokens, 0, 1, SamplingPath.DIRECT, paced).rows for tokens in range(max(1, least // 2), most + 1)}
        )

    def _full(self, key: MixedKey) -> bool:
        """Whether there are as many graphs of a key's kind as are kept. Paced ones have as many rows as the pace wants
        at least."""
        least = 0 if self._pace is None else self._pace.rows
        return sum((other.rows >= least) == (key.rows >= least) for other in self._captured) >= _MOST

    def _bounds(self, paced: bool) -> tuple[int, int]:
        """Rows that a graph has at least, and at most."""
        if paced and self._pace is not None:
            return self._pace.rows, self._pace.limit
        return 0, self._short

    def _key(self, tokens: int, state_chunks: int, sampled: int, path: SamplingPath, paced: bool) -> MixedKey:
        """The graph for so many tokens. Where nothing is paced a quarter of them pads it at most, or fewer than
        ``_ROWS``. None has more rows than there is memory for, or more chunks of recurrent layers."""
        least, most = self._bounds(paced)
        step = _ROWS if least else max(_ROWS, (1 << max(tokens - 1, 1).bit_length()) >> 3)
        rows = min(most, max(least, -(-tokens // step) * step))
        chunks = min(most_state_chunks(rows, self._chunks), -(-state_chunks // _STATE_CHUNKS) * _STATE_CHUNKS)
        return MixedKey(rows, chunks, min(rows, sampled_rows(max(sampled, 1))), path)

    def run(
        self,
        slots: list[int],
        positions: list[int],
        tokens: list[int],
        num_decodes: int,
        chunks: list[int],
        sampled: list[int],
        path: SamplingPath = SamplingPath.DIRECT,
        *,
        paced: bool = True,
        states: StepStates | None = None,
    ) -> None:
        """One step.

        slots, positions, tokens: of each row, the decodes' first. chunks: how many rows each prefill chunk has.
        sampled: rows that are sampled. path: as in ``DecodeGraphs.run``. states: where layers are recurrent.
        """
        count = len(slots)
        key = self._key(count, 0 if states is None else states.chunks.count, len(sampled), path, paced)
        self._captured.add(key)
        self.last = key
        starts = [num_decodes]
        for chunk in chunks:
            starts.append(starts[-1] + chunk)
        lens = [positions[end - 1] + 1 for end in starts[1:]]
        empty = self._chunks - len(chunks)
        padding = [0] * (key.rows - count)
        columns = [] if states is None else states.columns
        last = key.rows - 1 if count < key.rows else 0  # padding is sampled greedily, in no time
        numbers = [
            *(*slots, *[-1] * (key.rows - count), *positions, *padding, *tokens, *padding),
            *(n for own in columns for n in (*own, *[-1] * (key.rows - num_decodes))),
            num_decodes,
            *(*starts, *[count] * empty),
            *(*(end - 1 for end in starts[1:]), *[0] * empty),
            *(*lens, *[0] * empty),
            *(*sampled, *[last] * (key.sampled - len(sampled))),
            *(() if states is None else states.chunks.padded(key.state_chunks, self._chunks)),
        ]
        self._steps.run(("mixed", *key), numbers, lambda: self._make(key))

    def _make(self, key: MixedKey) -> tuple[Tensor, Callable[[], None]]:
        """Where the numbers of such a step go, and the step."""
        rows, chunks = key.rows, self._chunks
        packed_rows, tables = (3 + NUMBERS, [5 * key.state_chunks, 4 * (chunks + 1)]) if self._states else (3, [])
        sizes = [packed_rows * rows, 1, chunks + 1, chunks, chunks, key.sampled, *tables]
        flat, (packed, *others) = self._steps.numbers(sizes)
        inputs = MixedInputs(self._steps.rows(rows, packed), *others)
        return flat, lambda: self._step(inputs, key.path)
