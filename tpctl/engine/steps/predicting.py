"""CUDA graphs of what a predictor computes behind a captured decode step: its pass over the step's rows, and drafts.

Each has graphs of its own, so that their sizes do not multiply: a step is padded to so many rows, and the sequences
that it drafts for to so many again. All are launched behind each other, and the host waits for none of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.steps.graphs import StepInputs
from tpctl.kernels.sampling.accept import BEFORE


class PredictorGraphs:
    """Captured passes.

    Args:
        sizes: those of decode steps.
        follow: the pass over a step of so many rows, long or not, for drafts or for keys and values alone.
        draft: so many drafts, of the numbers that ``accept`` takes.
    """

    def __init__(
        self,
        steps: StepInputs,
        sizes: Sequence[int],
        follow: Callable[[int, bool, bool], None],
        draft: Callable[[Tensor, int, bool, SamplingPath], None],
    ) -> None:
        self._steps, self._sizes = steps, sizes
        self._follow, self._draft = follow, draft

    @staticmethod
    def most_numbers(rows: int, drafts: int) -> int:
        """int32 numbers that drafts for ``rows`` sequences are given, each of which may have so many already."""
        return rows * (BEFORE + drafts)

    def follow(self, count: int, long: bool, drafts: bool) -> None:
        """Behind a step of ``count`` rows, as it was padded."""
        size = self._size(count)

        def make() -> tuple[Tensor, Callable[[], None]]:
            return self._steps.numbers([0])[0], lambda: self._follow(size, long, drafts)

        self._steps.run(("follow", size, long, drafts), [], make)

    def draft(self, columns: Sequence[list[int]], count: int, long: bool, path: SamplingPath) -> None:
        """``count`` drafts for the sequences of these ``columns``, as of ``accept``."""
        own = len(columns[0])
        size = self._size(own)
        padding = [-1, 0, 0, 0, *[-1] * (len(columns) - BEFORE)]
        numbers = [n for column, pad in zip(columns, padding, strict=True) for n in (*column, *[pad] * (size - own))]

        def make() -> tuple[Tensor, Callable[[], None]]:
            flat, _ = self._steps.numbers([size * len(columns)])
            packed = flat.view(len(columns), size)
            packed[0].fill_(-1)
            return flat, lambda: self._draft(packed, count, long, path)

        self._steps.run(("draft", size, count, long, path), numbers, make)

    def _size(self, count: int) -> int:
        return self._sizes[bisect_left(self._sizes, count)]
