"""CUDA graphs of whole steps, from the host's packed integers to the sampled token ids.

A graph's shapes are fixed, so a batch of decodes is padded to the next of a ladder of sizes. Each graph is captured
when it is first needed, which costs the time of a few steps then and none at start-up. Steps with prefill chunks are in
``engine.steps.mixed``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from tpctl.engine.sampling.path import SamplingPath
from tpctl.kernels.sampling.prepare import DecodeInputs, SlotTables

_RING = 4  # pinned copies of the packed integers: a copy must not be overwritten before it has been sent
_MOST_GRAPHS = 192  # of all kinds: what one that has not been replayed for longest makes room for


def ladder(largest: int) -> list[int]:
    """The sizes that are captured, up to ``largest``: 1, 2, 4, 8, 16, then 16 more each, from 64 rows on 32, and from
    256 about a fifth. A row more costs little where weights are read once for all; each size costs an engine's first
    run a capture, about an eighth of a second."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(16 if sizes[-1] < 64 else 32, 1 << (sizes[-1].bit_length() - 3)))
    return sorted({min(size, largest) for size in sizes})


class StepInputs:
    """What the host packs for steps, and what is made of it on the device: the same memory for all, of which one runs
    at a time.

    Args:
        sampled: int64 [rows], the token ids of the last step, which the next one reads. No step has more rows.
        most: int32 numbers that a step is given at most.
        tables: what rows are looked up in.
    """

    def __init__(self, sampled: Tensor, most: int, tables: SlotTables) -> None:
        self.device = sampled.device
        self._sampled = sampled
        self._numbers = torch.zeros(most, dtype=torch.int32, device=self.device)
        self._rows = DecodeInputs.allocate(sampled.shape[0], tables)

    def numbers(self, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Where a step's numbers go, int32 and all zero, whole and in parts of these sizes."""
        flat = self._numbers[: sum(sizes)].zero_()
        return flat, list(torch.split(flat, sizes))

    def rows(self, count: int, packed: Tensor) -> DecodeInputs:
        """What a step of ``count`` rows reads, all of them padding so far; ``packed``, [3 * count] or more, is from
        ``numbers``."""
        packed = packed.view(-1, count)
        packed[0].fill_(-1)
        packed[3:].fill_(-1)
        return self._rows.first(count, packed)

    def run(self, key: Hashable, numbers: list[int], make: Callable[[], tuple[Tensor, Callable[[], None]]]) -> None:
        """Run the step of this key on ``numbers``.

        make: for a new key, where its numbers go (int32, on the device) and the step that reads them there, which must
            not synchronise with the host.
        """
        raise NotImplementedError

    def prepare(self, key: Hashable, make: Callable[[], tuple[Tensor, Callable[[], None]]]) -> None:
        """Get the step of this key ready, as ``run`` would."""
        raise NotImplementedError


class CapturedSteps(StepInputs):
    """Steps captured by key, in the same memory and on the same inputs.

    Args:
        nbytes: what the largest step's activations take.
        sampled: as of ``StepInputs``; a step may be run to warm up without changing them.
    """

    def __init__(self, nbytes: int, sampled: Tensor, most: int, tables: SlotTables) -> None:
        super().__init__(sampled, most, tables)
        # With each graph where its numbers go, and the step, which holds what it reads.
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Callable[[], None]]] = {}
        # One stream for all captures: cuBLAS keeps 32 MiB for every stream that it has worked on.
        self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._nbytes = nbytes
        self._memory: torch.cuda.CUDAGraph | None = None
        self._staging = [torch.zeros(most, dtype=torch.int32).pin_memory() for _ in range(_RING)]
        self._sent = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def run(self, key: Hashable, numbers: list[int], make: Callable[[], tuple[Tensor, Callable[[], None]]]) -> None:
        """Send ``numbers`` and replay the step of this key."""
        turn, self._turn = self._turn, (self._turn + 1) % _RING
        self._sent[turn].synchronize()
        staging = self._staging[turn][: len(numbers)]
        staging.copy_(torch.tensor(numbers, dtype=torch.int32))
        self.prepare(key, make)
        graph, target, _ = self._graphs[key]
        target.copy_(staging, non_blocking=True)
        self._sent[turn].record()
        graph.replay()

    def prepare(self, key: Hashable, make: Callable[[], tuple[Tensor, Callable[[], None]]]) -> None:
        """Capture the step of this key, if it is not there."""
        captured = self._graphs.pop(key, None)
        if captured is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                torch.cuda.synchronize(self.device)  # it may still run
                del self._graphs[next(iter(self._graphs))]
            captured = self._capture(*make())
        self._graphs[key] = captured  # the last one now

    def _reserve(self) -> torch.cuda.CUDAGraph:
        """A graph that is never run, for its pool: one piece of memory, which every capture takes parts of and gives
        back. Left to itself a pool grows by a piece for each step that is larger than those before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            torch.empty(self._nbytes, dtype=torch.uint8, device=self.device)[:1].zero_()
        return graph

    def _capture(
        self, target: Tensor, step: Callable[[], None]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Callable[[], None]]:
        # Once outside the graph, on rows that are all padding: kernels are compiled and workspaces made.
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            last = self._sampled.clone()
            step()
            self._sampled.copy_(last)
        current.wait_stream(self._side)
        if self._memory is None:
            self._memory = self._reserve()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory.pool(), stream=self._side):
            step()
        return graph, target, step


class DecodeGraphs:
    """Captured decode steps of up to ``largest`` rows.

    Args:
        step: computes one decode step from its inputs. The others are those of ``run``.
    """

    def __init__(
        self,
        steps: StepInputs,
        largest: int,
        step: Callable[[DecodeInputs, bool, SamplingPath, Tensor | None], None],
    ) -> None:
        self.sizes = ladder(largest)
        self._steps = steps
        self._step = step

    @staticmethod
    def most_numbers(rows: int, columns: int) -> int:
        """int32 numbers that a step of ``rows`` is given at most: a shared prefix takes one beside the columns."""
        return rows * columns + 1

    def run(
        self,
        columns: Sequence[list[int]],
        long: bool = False,
        path: SamplingPath = SamplingPath.DIRECT,
        shared: int = 0,
    ) -> None:
        """One decode step of rows with these slots, positions and tokens, and, always or never, ``steps.states``; those
        that pad it to a captured size write and sample nothing of use. Steps that are long, share a prefix of so many
        ``shared`` tokens, or are sampled otherwise have graphs of their own."""
        count = len(columns[0])
        size = self.sizes[bisect_left(self.sizes, count)]
        padding = [0 if name in (1, 2) else -1 for name in range(len(columns))]
        numbers = [n for own, pad in zip(columns, padding, strict=True) for n in (*own, *[pad] * (size - count))]
        numbers += [shared] * (shared > 0)

        def make() -> tuple[Tensor, Callable[[], None]]:
            flat, (packed, *rest) = self._steps.numbers([size * len(columns), *[1] * (shared > 0)])
            inputs = self._steps.rows(size, packed)
            return flat, lambda: self._step(inputs, long, path, rest[0] if rest else None)

        self._steps.run((size, long, shared > 0, path), numbers, make)
