"""What a model's predictor (``arch.predictor``) computes on a GPU behind a step, and the step that leaves it what it
reads. Nothing here waits for the device: graphs capture it (``engine.steps.predicting``).

Behind every step it is given the step's rows once more, where they are: the last state of each, and the token that the
row has sampled, or the prompt's next one. Rows of drafts that did not hold leave keys and values of no use, which are
written over as those of the layers are, and nothing waits to know which they are. Then, if tokens are to be drafted,
``accept`` finds the last row of each sequence that holds, and draft follows draft.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tpctl.engine.runners.cuda_steps import CudaSteps
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.speculation import MOST_PREDICTED
from tpctl.engine.steps.mixed import MixedInputs, MixedKey
from tpctl.kernels.sampling.accept import accept
from tpctl.kernels.sampling.prepare import DecodeInputs, SlotTables
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.compute_cuda import CudaCompute


class StatefulSteps(CudaSteps):
    """Steps that leave what a predictor reads of them."""

    _kept: tuple[Tensor, dict[int, ForwardBatch], dict[tuple[int, ...], MixedInputs]] | None = None

    def decode(self, inputs: DecodeInputs, long: bool, path: SamplingPath, shared_1: Tensor | None) -> None:
        model, forward = self._loaded.model, self._prepared(inputs)
        final = model.final(replace(forward, long_context=long, shared_1=shared_1), self._kv)
        assert final is not None
        states_SH = self._compute.normed(*final)
        self._keep(states_SH)[0][len(states_SH)] = forward
        self.sample(model.lm_head(states_SH), inputs.filters, inputs.keys, path)

    def mixed(self, inputs: MixedInputs, path: SamplingPath) -> None:
        model, forward, rows = self._loaded.model, self.beside(inputs), inputs.rows
        final = model.final(forward, self._kv)
        assert final is not None
        states_TH, picked = self._compute.normed(*final), forward.logits_rows
        chunks = 0 if inputs.state_chunks is None else len(inputs.state_chunks) // 5
        self._keep(states_TH)[1][len(states_TH), chunks, len(picked)] = inputs
        self.sample(model.lm_head(states_TH[picked]), rows.filters.rows(picked), rows.keys[picked], path)

    def _keep(self, states_TH: Tensor) -> tuple[dict[int, ForwardBatch], dict[tuple[int, ...], MixedInputs]]:
        """In memory that is taken with the first of them, for as many rows as a step may have; what is beside it."""
        if self._kept is None:
            self._kept = states_TH.new_zeros(len(self._sampled), states_TH.shape[1]), {}, {}
        self._kept[0][: len(states_TH)].copy_(states_TH)
        return self._kept[1:]

    def kept(self, rows: int) -> tuple[ForwardBatch, Tensor]:
        """Where the rows of the last step, decodes of so many, are; and [rows, H], their last states, normed."""
        assert self._kept is not None
        return self._kept[1][rows], self._kept[0][:rows]

    def kept_mixed(self, key: MixedKey) -> tuple[ForwardBatch, Tensor]:
        """The same of a step of decodes and prefill chunks, whose tokens are not told any more."""
        assert self._kept is not None
        return self.beside(self._kept[2][tuple(key[:3])]), self._kept[0][: key.rows]


class _Draft(CudaSteps):
    """One draft of each sequence, left where others leave tokens."""

    def run(self, inputs: DecodeInputs, made_SH: Tensor, long: bool, path: SamplingPath) -> ForwardBatch:
        """Choose it; where the predictor then computes what follows it."""
        forward = replace(self._prepared(inputs), long_context=long)
        self.sample(self._loaded.model.lm_head(made_SH), inputs.filters, inputs.keys, path)
        return replace(forward, input_ids=self._sampled[: len(made_SH)].clamp(min=0))


class PredictorSteps:
    """One rank's predictor.

    Args:
        sampled: as of ``CudaSteps``.
        rows: that a step samples at most.

    Attributes:
        steps: behind which it computes.
        drafts: int64 [MOST_PREDICTED, rows], where they are left, a row a place.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        num_blocks: int,
        compute: CudaCompute,
        tables: SlotTables,
        steps: StatefulSteps,
        sampled: Tensor,
        rows: int,
    ) -> None:
        self._model, self.steps, self._sampled = loaded.model, steps, sampled
        self._kv = loaded.predictor_cache(num_blocks)
        hidden = loaded.config.blueprint.hidden_size
        self._made = torch.zeros(rows, hidden, dtype=loaded.dtype, device=sampled.device)
        self.drafts = torch.zeros(MOST_PREDICTED, rows, dtype=torch.int64, device=sampled.device)
        self._inputs = DecodeInputs.allocate(rows, tables)
        self._places = [_Draft(loaded, (), compute, tables, drafts, states=False) for drafts in self.drafts]

    def follow(self, forward: ForwardBatch, states_TH: Tensor, following_T: Tensor, rows_R: Tensor | None) -> None:
        """Keep keys and values of a step's tokens, and what is made of some rows for ``draft``.

        Args:
            forward: where the tokens are.
            following_T: the token behind each.
            rows_R: the rows that have sampled, in their order; ``None``: all.
        """
        batch = replace(forward, input_ids=following_T.clamp(min=0), shared_1=None)
        made = self._model.predict(states_TH, batch, self._kv, rows_R)
        self._made[: len(made)].copy_(made)

    def follow_decode(self, rows: int, long: bool, drafts: bool) -> None:
        """The same behind a captured step of so many rows, each of which has sampled; for ``drafts`` or for none."""
        forward, states_SH = self.steps.kept(rows)
        none = None if drafts else torch.empty(0, dtype=torch.int64, device=states_SH.device)
        self.follow(replace(forward, long_context=long), states_SH, self._sampled[:rows], none)

    def draft(self, packed: Tensor, count: int, long: bool, path: SamplingPath) -> None:
        """``count`` drafts behind what came of a step.

        Args:
            packed: as of ``accept``.
            long, path: as of ``CudaSteps.decode``.
        """
        rows_S, following = accept(packed, self._sampled, count)
        made_SH = self._made[rows_S]
        for number, (place, own) in enumerate(zip(self._places, following, strict=False), 1):
            batch = place.run(self._inputs.first(len(made_SH), own), made_SH, long, path)
            if number < count:
                made_SH = self._model.predict(made_SH, batch, self._kv)
