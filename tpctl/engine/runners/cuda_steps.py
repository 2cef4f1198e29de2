"""What a step on a GPU computes, from what the host has packed for it to the tokens that are sampled.

Nothing here waits for the device or knows of sequences: CUDA graphs capture these steps (``engine.steps``), and kernels
are found and compiled by running them where there is no device (``engine.runners.rehearsal``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tpctl.accounting import sampled_rows
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.steps.mixed import MixedInputs
from tpctl.kernels.common.launch import early_launch
from tpctl.kernels.delta_net.chunks import ChunkTables
from tpctl.kernels.delta_net.tables import Group
from tpctl.kernels.sampling.floors import Filters, sampling_floors
from tpctl.kernels.sampling.prepare import DecodeInputs, SlotTables, prepare_decode
from tpctl.kernels.sampling.sampling import sample
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.batch import ForwardBatch, PoolTables, PrefillChunks, StateTables
from tpctl.layers.compute_cuda import CudaCompute
from tpctl.layers.delta_net.state import LayerState


class CudaSteps:
    """One rank's steps.

    Args:
        kv: what each layer keeps of sequences, among it states of recurrent layers where there are any (``states``).
        tables: what rows are looked up in.
        sampled: int64 [rows], where a step leaves its token ids and the next one finds them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: Sequence[LayerKV | LayerState],
        compute: CudaCompute,
        tables: SlotTables,
        sampled: Tensor,
        *,
        states: bool,
    ) -> None:
        self._loaded, self._compute, self._kv, self._states = loaded, compute, kv, states
        self._runs = loaded.settings.speculate != "off"
        self._tables, self._sampled = tables, sampled
        self._left: Tensor | None = None

    def left(self, rows: int) -> Tensor:
        """[rows, V]: the logits that the last step has left for the host to sample."""
        assert self._left is not None
        return self._left[:rows]

    def _leave(self, logits: Tensor) -> None:
        """Keep logits in memory that is taken with the first of them, for as many rows as a step may sample."""
        if self._left is None:
            loaded, rows = self._loaded, sampled_rows(self._loaded.settings.max_num_seqs)
            self._left = logits.new_empty(rows, loaded.model.lm_head.out_features, dtype=loaded.dtype)
        self._left[: logits.shape[0]].copy_(logits)

    def _prepared(self, rows: DecodeInputs) -> ForwardBatch:
        """Every row a decode, filled in on the device from what the host has packed."""
        prepare_decode(rows, self._sampled, self._tables, self._loaded.backend.block_size)
        return ForwardBatch(
            input_ids=rows.input_ids,
            rope_positions=rows.rope_positions,
            pools=tuple(map(PoolTables, rows.slot_mapping, rows.block_tables)),
            query_lens=[],
            seq_lens=[],
            num_decodes=rows.input_ids.shape[0],
            logits_rows=rows.input_ids,
            seq_lens_S=rows.seq_lens,
            state_tables=StateTables(rows.packed[3:], runs=self._runs) if self._states else None,
        )

    def decode(self, inputs: DecodeInputs, long: bool, path: SamplingPath, shared_1: Tensor | None) -> None:
        """One decode step, from the packed rows to what is sampled: what a graph captures."""
        forward = replace(self._prepared(inputs), long_context=long, shared_1=shared_1)
        logits = self._loaded.model(forward, self._kv, None)
        self.sample(logits, inputs.filters, inputs.keys, path)

    def mixed(self, inputs: MixedInputs, path: SamplingPath) -> None:
        """One step of decodes and prefill chunks, from the packed rows to what is sampled: what a graph captures."""
        rows, forward = inputs.rows, self.beside(inputs)
        picked = forward.logits_rows
        logits = self._loaded.model(forward, self._kv, picked)
        self.sample(logits, rows.filters.rows(picked), rows.keys[picked], path)

    def beside(self, inputs: MixedInputs) -> ForwardBatch:
        """What such a step computes, filled in on the device."""
        rows = inputs.rows
        forward = self._prepared(rows)
        decodes = torch.arange(forward.num_decodes, device=self._sampled.device) < inputs.num_decodes
        return replace(
            forward,
            logits_rows=inputs.logits_rows.long(),
            seq_lens_S=rows.seq_lens * decodes,
            chunks=PrefillChunks(
                tuple(rows.block_tables.index_select(1, inputs.last_row_P)), inputs.query_start_P1, inputs.seq_lens_P
            ),
            state_tables=_captured_states(inputs),
        )

    def sample(self, logits: Tensor, filters: Filters, keys: Tensor, path: SamplingPath) -> None:
        """Sample a token for each row, or leave the logits for the host to (``left``)."""
        if path is SamplingPath.HOST:
            self._leave(logits)
            return
        sampler = self._loaded.sampler
        pdl = early_launch(logits.shape[0], logits.device)
        floors = None if path is SamplingPath.DIRECT else self._floors(logits, filters, path, pdl)
        scores, ids = sample(
            logits,
            filters.temperature,
            keys,
            vocab_start=sampler.first,
            vocab_size=self._loaded.config.vocab_size,
            floors_T=floors,
            pdl=pdl,
        )
        winner = self._compute.winner(scores, ids)
        self._sampled[: logits.shape[0]].copy_(sampler.agree(scores, ids) if winner is None else winner)

    def _floors(self, logits: Tensor, filters: Filters, path: SamplingPath, pdl: bool) -> Tensor:
        """Of each row the least logit that its filters leave."""
        whole, vocab_size = self._loaded.sampler.whole_rows(logits)
        return sampling_floors(whole, filters, vocab_size=vocab_size, both=path is SamplingPath.TWO_FLOORS, pdl=pdl)


def _captured_states(inputs: MixedInputs) -> StateTables | None:
    """Where the layers of a captured step have states."""
    if inputs.state_chunks is None or inputs.state_sequences is None:
        return None
    chunks, sequences = inputs.state_chunks.view(5, -1), inputs.state_sequences.view(4, -1)
    group = Group(0, chunks.shape[1], 0, sequences.shape[1] - 1)
    return StateTables(inputs.rows.packed[3:], ChunkTables(chunks, sequences, [group]))
