"""What rows and drafts cost in a step (``engine.scheduling.speculation``), estimated from a model's sizes.

On a GPU a step takes what its weights take to be read, what its launches wait for each other, and a little for each
row; from the second row on linears leave the way for one row, until there are some eight. Constants are of an H200
(docs/log/2026-11-30-mtp-on-a-gpu.md): others read more slowly, so that drafts are held for dearer there than they are.
"""

from __future__ import annotations

from typing import NamedTuple

from tpctl.arch.block import Experts, LayerPart, linears
from tpctl.arch.blueprint import Blueprint
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.scheduling.speculation import RowCost

_BANDWIDTH = 3.9e12
"""Bytes of weights a second, as linears of one row read them."""
_LAYER = 13e-6
"""Seconds of a layer's launches, beside reading its weights."""
_FEW = 16e-6
"""Seconds of a layer that several rows take more than one (``RowCost.few``)."""
_ROW = 6e-6
"""Seconds of each row."""
_WAIT = 0.1e-3
"""Seconds in which a GPU waits for the host, which chooses the next step when it knows the last one's tokens."""
_DRAFT = 60e-6
"""Seconds of a draft's launches, beside reading the predictor and the head."""


class _Counts(NamedTuple):
    """Weights that all tokens meet, those of the experts of one token, and all of them; and those of a draft."""

    shared: int
    chosen: int
    whole: int
    draft: int

    @classmethod
    def of(cls, blueprint: Blueprint) -> _Counts:
        head = blueprint.vocab_size * blueprint.hidden_size
        parts = [_part(part) for layer in blueprint.layers for part in layer.parts]
        shared, one, whole = (sum(counts) for counts in zip(*parts, strict=True))
        draft = 0
        if blueprint.predictor is not None:
            drafting = [_part(part) for *_, part in blueprint.predictor.placed()]
            draft = head + sum(common + chosen for common, chosen, _ in drafting)
            whole += sum(held for *_, held in drafting)
        return cls(head + shared, one, whole + (1 if blueprint.tied else 2) * head, draft)


def _part(part: LayerPart) -> tuple[int, int, int]:
    """``_Counts`` of a part, without a draft."""
    chosen, count = (part.per_token, part.count) if isinstance(part, Experts) else (0, 0)
    sizes = [(one.outputs * one.inputs, one.stack is not None) for one in linears(part)]
    shared = sum(size for size, stacked in sizes if not stacked)
    expert = sum(size for size, stacked in sizes if stacked)
    return shared, expert * chosen, shared + expert * count


def predicted_cost(cost: RowCost, blueprint: Blueprint) -> RowCost:
    """What steps of a model with a predictor take, where reading weights is what takes time, in that of a step without
    rows, which reads what all rows share: a row more reads its own experts, few of which others have chosen; a draft
    the predictor and the head."""
    counts = _Counts.of(blueprint)
    return cost._replace(row=cost.row + counts.chosen / counts.shared, draft=counts.draft / counts.shared)


def gpu_cost(loaded: LoadedModel) -> RowCost:
    """The same on a GPU, the same on every rank (collective)."""
    return cost_of(loaded.config.blueprint, loaded.group.minimum(loaded.weight_bytes))


def cost_of(blueprint: Blueprint, weight_bytes: int) -> RowCost:
    """That of a rank that holds so many bytes of weights."""
    counts, layers = _Counts.of(blueprint), len(blueprint.layers)
    second = weight_bytes / counts.whole / _BANDWIDTH  # of a weight
    unit = counts.shared * second + layers * _LAYER
    return RowCost(
        first=_WAIT / unit,
        row=(_ROW + counts.chosen * second) / unit,
        draft=(_DRAFT + counts.draft * second) / unit if counts.draft else 0.0,
        few=layers * _FEW / unit,
    )
