"""An engine's steps run where there is no device, so that all kernels they launch are known before one is.

The model is built from the shard folder with tensors that have no memory (torch's meta device), and its steps are run
as the runner runs them: those that graphs capture, in every size, and prompts. Layers that are alike launch the same
kernels, so that of such a few are kept. What is missing here is compiled when it is first launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpctl.accounting import sampled_rows
from tpctl.arch.latent import Attending
from tpctl.distributed import TPGroup
from tpctl.engine.runners.cuda_memory import largest_prompts, run_prompts
from tpctl.engine.runners.cuda_sizes import find_pace, paged
from tpctl.engine.runners.cuda_steps import CudaSteps
from tpctl.engine.runners.loading import LoadedModel, of_model
from tpctl.engine.runners.outline import outline
from tpctl.engine.runners.predictor_steps import PredictorSteps, StatefulSteps
from tpctl.engine.runners.step_set import StepSet, use_kernels
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.speculation import MOST_PREDICTED
from tpctl.engine.steps.graphs import DecodeGraphs, StepInputs, ladder
from tpctl.engine.steps.mixed import MixedGraphs
from tpctl.engine.steps.states import NUMBERS, StepStates
from tpctl.kernels.collective.all_reduce import PeerBuffer, PeerLayout
from tpctl.kernels.common.ahead import KernelSpec, compile_for, digest, unlaunched
from tpctl.kernels.common.launch import EARLY_ROWS, DeviceFacts, stand_for
from tpctl.kernels.delta_net.tables import Chunks, NewTokens
from tpctl.kernels.sampling.accept import BEFORE
from tpctl.kernels.sampling.prepare import SlotTables
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.compute_cuda import peer_rows, reaches_others
from tpctl.layers.delta_net.state import LayerState
from tpctl.manifest.manifest import MANIFEST
from tpctl.models.loader import as_stored
from tpctl.wire.settings import EngineConfig

_PROMPTS = (128, 24, 512, 1024, 2048, 4096, 256, 64, 32, 16, 8, 2, 384, 768)
"""Tokens of steps with prompts, beside the largest, in the order in which they are likely to come."""
_BETWEEN = 4
"""Sizes from a power of two to the next, about, of which prompts are run as well: mixtures take kernels by them."""
_BESIDE = (1, 8, 64)
"""Decodes that prompts may be launched behind."""
_PACKAGE = Path(__file__).parents[2]
_SHARED = 32
"""Decodes that a shared prefix may be attended to for at once, or fewer than those."""
DIRECT = SamplingPath.DIRECT


class Order(NamedTuple):
    """What kernels are wanted for: an engine's ranks on this host, on a device of these facts; ``peers``: they reach
    each other's memory."""

    config: EngineConfig
    ranks: list[int]
    facts: DeviceFacts
    peers: bool

    @classmethod
    def of(cls, config: EngineConfig, group: TPGroup, ranks: Iterable[int]) -> Order:
        facts = DeviceFacts.of(group.device)
        return cls(config, list(ranks), facts, group.size > 1 and reaches_others(group))

    @property
    def digest(self) -> str:
        """Of all that decides which kernels there are: this, the shards, and the code."""
        values = self.config.to_dict()
        manifest = (Path(values.pop("shard_dir")) / MANIFEST).read_bytes()
        values.pop("model_dir")
        code = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(_PACKAGE.rglob("*.py"))]
        return digest([values, manifest, *self[1:], code, torch.__version__])


def rehearse(
    order: Order, failed: Callable[[Exception], object] = lambda error: None
) -> Iterator[tuple[KernelSpec, bool]]:
    """All kernels that the ranks launch, each once, and whether it is the first of its signature; they are found one
    after the other. This process then stands for the device.

    Args:
        failed: told of a step that cannot be run here, whose kernels are left out.
    """
    stand_for(order.facts)
    compile_for(order.facts)
    specs: dict[KernelSpec, None] = {}
    signatures: set[tuple[str, str, str]] = set()
    given = 0
    for rank in order.ranks:
        with torch.no_grad():
            rehearsal = Rehearsal(order.config, rank, peers=order.peers)
        for step in rehearsal.steps():
            try:
                with torch.no_grad(), unlaunched(specs):
                    step()
            except Exception as error:  # whatever it is, the engine will meet it, too
                failed(error)
            for spec in islice(specs, given, None):
                signature = spec.module, spec.name, spec.signature
                yield spec, signature not in signatures
                signatures.add(signature)
            given = len(specs)


class StandIn(TPGroup):
    """A rank's group without the others: collectives give what has the right shape."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, "meta")
        self.kind = "cuda"

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def minimum(self, value: int) -> int:
        return value

    def broadcast_text(self, text: str) -> str:
        return text


class _Run(StepInputs):
    """Runs steps, each once."""

    def __init__(self, sampled: Tensor, most: int, tables: SlotTables) -> None:
        super().__init__(sampled, most, tables)
        self._seen: set[Hashable] = set()

    def run(self, key: Hashable, numbers: list[int], make: Callable[[], tuple[Tensor, Callable[[], None]]]) -> None:
        if key not in self._seen:
            self._seen.add(key)
            make()[1]()


class Rehearsal:
    """One rank's engine, in a process that stands for a GPU (``kernels.common.launch.stand_for``).

    Args:
        config: for GPUs.
        peers: whether sums over the ranks go through each other's memory, where they can.

    Raises:
        TpctlError: as of ``engine.runners.loading.load``.
    """

    def __init__(self, config: EngineConfig, rank: int, *, peers: bool) -> None:
        group = StandIn(rank, config.tp_size)
        outlined = outline(config, group)
        rotaries = outlined.tables(outlined.wanted_len)
        with group.device:
            model = outlined.decoder(rotaries)
        as_stored(model, {name: tensor.dtype for name, tensor in outlined.tensors.items()})
        self._loaded = loaded = of_model(outlined, model, rotaries)
        pace = find_pace(loaded)
        self._paces = (False,) if pace is None else (True, False)
        self._kv = loaded.caches(1, 1)
        keep_different(loaded, self._kv)
        compute = use_kernels(loaded, pace, stand_in_peers if peers else no_peers)
        self._states = bool(loaded.state_bytes)
        kind = CudaSteps if loaded.model.mtp is None else StatefulSteps
        self._set = StepSet.of(
            loaded, self._kv, compute, pace, _Run, max_model_len=loaded.wanted_len, states=self._states, kind=kind
        )
        self._predictor: PredictorSteps | None = None
        if isinstance(steps := self._set.on_device, StatefulSteps):
            tables, sampled = self._set.slots.tables, self._set.sampled
            seqs = loaded.settings.max_num_seqs
            self._predictor = PredictorSteps(loaded, 1, compute, tables, steps, sampled, seqs)

    def steps(self) -> Iterator[Callable[[], None]]:
        """All steps, those first that are likely to be the first."""
        yield from self._prompts()
        if self._set.decodes is not None:
            yield from self._decodes(self._set.decodes)
            if self._predictor is not None:
                yield from self._drafts(self._predictor, self._set.decodes.sizes)
        if self._set.mixed is not None:
            yield from self._mixed(self._set.mixed)
        yield from self._filtered(ladder(self._loaded.settings.max_num_seqs))
        if any(held.kept or held.experts is not None for held in self._loaded.model.held):
            yield from self._of_every_size()

    def _prompts(self) -> Iterator[Callable[[], None]]:
        """Of many lengths; such of which more tokens are sampled, since as many rows go through the last layer; and
        behind decodes."""
        largest, seqs = largest_prompts(self._loaded), self._loaded.settings.max_num_seqs
        steps = [(lens, 1, 0) for lens in (largest, *([tokens] for tokens in _PROMPTS))]
        steps += [(lens, rows, 0) for rows in (seqs, 8, 32) for lens in (largest, [EARLY_ROWS])]
        steps += [([tokens - decodes], 1, decodes) for tokens in (sum(largest), *_PROMPTS) for decodes in _BESIDE]
        yield from self._those_that_fit(steps)
        before = self._loaded.wanted_len - largest[0]
        for cached in {before, min(before, 7 * largest[0])} - {0}:  # last chunks of long prompts; some are unpacked
            yield lambda cached=cached: self._prompt(largest[:1], 1, 0, cached)  # type: ignore[misc]

    def _of_every_size(self) -> Iterator[Callable[[], None]]:
        """Where kernels are chosen by how many rows a layer has, as those of codes and of experts are: all sizes, and
        all numbers of rows that are sampled, of small steps and of large ones."""
        largest, seqs = largest_prompts(self._loaded), self._loaded.settings.max_num_seqs
        steps = [([tokens], 1, 0) for tokens in between(sum(largest))]
        steps += [(lens, rows, 0) for rows in between(seqs) for lens in ([max(rows, EARLY_ROWS)], largest)]
        yield from self._those_that_fit(steps)

    def _those_that_fit(self, steps: list[tuple[list[int], int, int]]) -> Iterator[Callable[[], None]]:
        """Steps of (lengths of prompts, rows that are sampled, decodes)."""
        settings = self._loaded.settings
        for lens, rows, decodes in steps:
            fits = sum(lens) + decodes <= settings.max_num_batched_tokens and rows <= sum(lens) + decodes
            if fits and lens[0] > 0 and max(rows, decodes) <= settings.max_num_seqs:
                yield lambda step=(lens, rows, decodes): self._prompt(*step)  # type: ignore[misc]

    def _prompt(self, lens: list[int], rows: int, decodes: int, cached: int = 0) -> None:
        self._sample(run_prompts(self._loaded, self._kv, lens, rows, decodes, cached), DIRECT)

    def _sample(self, logits: Tensor, path: SamplingPath) -> None:
        at, keys = (logits.new_zeros(shape, dtype=torch.int64) for shape in ((len(logits),), (len(logits), 2)))
        self._set.on_device.sample(logits, self._set.slots.tables.filters.rows(at), keys, path)

    def _filtered(self, sizes: Iterable[int]) -> Iterator[Callable[[], None]]:
        """Tokens sampled of filtered ones, by so many rows: what such a step launches beside what others do."""
        loaded = self._loaded
        width = loaded.model.lm_head.out_features
        for path, rows in product((SamplingPath.TWO_FLOORS, SamplingPath.ONE_FLOOR), sizes):
            logits = torch.empty(rows, width, dtype=loaded.dtype, device=loaded.group.device)
            yield lambda logits=logits, path=path: self._sample(logits, path)  # type: ignore[misc]

    def _decodes(self, graphs: DecodeGraphs) -> Iterator[Callable[[], None]]:
        columns = 3 + NUMBERS * self._states
        backend = paged(self._loaded)
        for size in graphs.sizes:
            rows = [[0] * size] * columns
            yield lambda rows=rows: graphs.run(rows)  # type: ignore[misc]
            if backend.is_long(size, self._loaded.wanted_len):
                yield lambda rows=rows: graphs.run(rows, True)  # type: ignore[misc]
            if backend.shared_pool is not None and size >= _SHARED:
                yield lambda rows=rows: graphs.run(rows, shared=1)  # type: ignore[misc]

    def _drafts(self, predictor: PredictorSteps, sizes: Sequence[int]) -> Iterator[Callable[[], None]]:
        """Behind decodes of all sizes, and for as many sequences."""
        longest = self._loaded.wanted_len
        for size in sizes:
            numbers = self._set.sampled.new_zeros(BEFORE + MOST_PREDICTED, size, dtype=torch.int32)
            counts = range(1, MOST_PREDICTED + 1) if size == sizes[0] else (2,)
            for long in (False, True)[: 1 + paged(self._loaded).is_long(size, longest)]:
                yield partial(predictor.follow_decode, size, long, True)
                yield partial(predictor.follow_decode, size, long, False)
                for count in counts:
                    yield partial(predictor.draft, numbers, count, long, DIRECT)

    def _mixed(self, graphs: MixedGraphs) -> Iterator[Callable[[], None]]:
        def run(tokens: int, sampled: int, paced: bool) -> None:
            slots, positions, ids = [[0] * tokens] * 3
            one = NewTokens(0, tokens, position=0, read=-1, write=0)
            states = StepStates([[]] * NUMBERS, Chunks.of([one])) if self._states else None
            graphs.run(slots, positions, ids, 0, [tokens], [0] * sampled, DIRECT, paced=paced, states=states)

        for paced in self._paces:
            sizes = graphs.sizes(paced=paced)
            sampled = sorted(set(map(sampled_rows, range(1, self._loaded.settings.max_num_seqs + 1))))
            steps = [(tokens, sampled[0]) for tokens in sizes]
            for tokens, rows in steps + [(tokens, rows) for rows in sampled[1:] for tokens in sizes[-1:]]:
                if tokens >= rows:
                    yield lambda one=(tokens, rows, paced): run(*one)  # type: ignore[misc]


def no_peers(group: TPGroup, hidden: int, dtype: torch.dtype, rows: int, tokens: int) -> None:
    """As ``connect_peers``, where ranks do not reach each other's memory."""


def stand_in_peers(group: TPGroup, hidden: int, dtype: torch.dtype, rows: int, tokens: int) -> PeerBuffer | None:
    """As ``connect_peers``, where they do, without memory."""
    most = peer_rows(group.size, hidden, dtype, rows, tokens)
    if not most:
        return None
    addresses = torch.zeros(group.size, dtype=torch.int64, device=group.device)
    return PeerBuffer(group.rank, addresses, PeerLayout.of(most, hidden, dtype), dtype)


def between(most: int) -> list[int]:
    """Numbers of tokens from 1 to ``most``: powers of two, one more, and some between."""
    sizes, power = {1}, 2
    while power <= most:
        sizes |= {power + 1, *range(power, 2 * power, max(1, power // _BETWEEN))}
        power *= 2
    return sorted(size for size in sizes if size <= most)


def keep_different(loaded: LoadedModel, kv: list[LayerKV | LayerState]) -> None:
    """Keep of a model's layers, and of what each keeps in ``kv``, the first two of each kind and the last one: which
    kernels there are does not depend on how many layers launch them. Where layers read those before, all stay."""
    made_of, layers = loaded.config.blueprint, list(loaded.model.model.layers)
    kinds: list[Any] = []
    for block, of_layer, rotary in zip(made_of.blocks, kv, loaded.rotaries, strict=False):
        if (isinstance(block.attention, Attending) and block.attention.reads is not None) or block.input is not None:
            return
        kept_by = (of_layer.spec, of_layer.pool) if isinstance(of_layer, LayerKV) else None
        kinds.append((block, kept_by, None if rotary is None else id(rotary)))
    kept = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < 2 or index == len(kinds) - 1]
    loaded.model.model.layers = nn.ModuleList(layers[index] for index in kept)  # type: ignore[assignment]
    kv[:] = [kv[index] for index in kept]
