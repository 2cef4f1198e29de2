"""All steps of one rank on a GPU, put together: for a runner that captures them, and where there is no GPU for a
rehearsal that runs each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.engine.runners.cuda_memory import table_width
from tpctl.engine.runners.cuda_sizes import largest_rows, paged, short_rows
from tpctl.engine.runners.cuda_steps import CudaSteps
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.speculation import MOST_PREDICTED
from tpctl.engine.steps.graphs import DecodeGraphs, StepInputs
from tpctl.engine.steps.mixed import MixedGraphs
from tpctl.engine.steps.predicting import PredictorGraphs
from tpctl.engine.steps.slots import Slots
from tpctl.engine.steps.states import NUMBERS
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.sampling.prepare import SlotTables
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.attention.paged import PagedBackend
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.delta_net.state import LayerState

Connect = Callable[[TPGroup, int, torch.dtype, int, int], PeerBuffer | None]
"""Gives memory that sums over the ranks go through, as ``connect_peers`` does."""
MakeInputs = Callable[[Tensor, int, SlotTables], StepInputs]
"""Gives what runs steps by key, of the tokens that they sample, the numbers that each is given at most, and tables."""


class StepSet(NamedTuple):
    """What a rank's steps are run by.

    Attributes:
        sampled: int64 [rows], where a step leaves its token ids and the next one finds them.
        decodes, mixed: what is run by key; ``None``: such steps are launched kernel by kernel.
        keyed: what runs them.
    """

    slots: Slots
    sampled: Tensor
    on_device: CudaSteps
    decodes: DecodeGraphs | None
    mixed: MixedGraphs | None
    keyed: StepInputs | None

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        kv: Sequence[LayerKV | LayerState],
        compute: CudaCompute,
        pace: Pace | None,
        inputs: MakeInputs,
        *,
        max_model_len: int,
        states: bool,
        kind: type[CudaSteps] = CudaSteps,
    ) -> StepSet:
        """Of a model that ``compute`` is used by; ``states``: some layers are recurrent; ``kind``: what steps leave."""
        settings, device = loaded.settings, loaded.group.device
        rows, blocks = largest_rows(settings, pace), table_width(loaded, max_model_len)
        # More slots than can run: a step may still compute a sequence that has ended, beside its successor.
        slots = Slots(2 * settings.max_num_seqs, blocks, device, loaded.backend.places)
        sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        steps = kind(loaded, kv, compute, slots.tables, sampled, states=states)
        if settings.enforce_eager:
            return cls(slots, sampled, steps, None, None, None)
        numbers = max(MixedGraphs.most_numbers(rows, states=states), DecodeGraphs.most_numbers(rows, 3 + NUMBERS))
        if loaded.model.mtp is not None:
            numbers = max(numbers, PredictorGraphs.most_numbers(settings.max_num_seqs, MOST_PREDICTED))
        keyed = inputs(sampled, numbers, slots.tables)
        decodes, mixed = DecodeGraphs(keyed, settings.max_num_seqs, steps.decode), None
        if paged(loaded).captures_prefill:
            mixed = MixedGraphs(keyed, pace, steps.mixed, short_rows(settings), states)
        return cls(slots, sampled, steps, decodes, mixed, keyed)


def use_kernels(loaded: LoadedModel, pace: Pace | None, connect: Connect) -> CudaCompute:
    """Have the model computed by the kernels for GPUs (collective, as ``connect`` is)."""
    settings, group = loaded.settings, loaded.group
    hidden, tokens = loaded.config.blueprint.hidden_size, settings.max_num_batched_tokens
    compute = CudaCompute(group, connect(group, hidden, loaded.dtype, largest_rows(settings, pace), tokens))
    loaded.model.use(compute)
    paged(loaded).reserve(tokens, loaded.wanted_len, group.device)
    if isinstance(loaded.predicting, PagedBackend):
        loaded.predicting.share(paged(loaded))
    return compute
