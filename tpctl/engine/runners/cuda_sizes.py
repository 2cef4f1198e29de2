"""How large steps on a GPU are, where that is decided before the first of them."""

from __future__ import annotations

from typing import Any

from tpctl import accounting
from tpctl.accounting import CHUNKS, captured_rows
from tpctl.engine.runners.loading import LoadedModel
from tpctl.engine.scheduling.pacing import Pace, pays
from tpctl.layers.attention.paged import PagedBackend
from tpctl.wire.settings import EngineConfig

# Rows that an H100 multiplies in little more than the time of a few (docs/kernel-notes.md): where a layer has many
# weights reading them takes that long, where it has few the latency of its kernels does.
_PACE, _SMALL_PACE = Pace(rows=256, limit=512, chunks=CHUNKS), Pace(rows=512, limit=1024, chunks=CHUNKS)
_SMALL_LAYER = 64 << 20  # bytes of a rank


def paged(loaded: LoadedModel) -> PagedBackend[Any]:
    """The backend, which reads the paged cache in place."""
    assert isinstance(loaded.backend, PagedBackend)
    return loaded.backend


def find_pace(loaded: LoadedModel) -> Pace | None:
    """How prompts are computed beside decodes, where that can be captured; the same on every rank (collective)."""
    settings = loaded.settings
    if settings.scheduling_policy == "fcfs" or settings.enforce_eager or not paged(loaded).captures_prefill:
        return None
    layer = sum(parameter.nbytes for parameter in loaded.model.model.layers[0].parameters())
    layer = loaded.group.minimum(layer)
    if not pays(settings.scheduling_policy, layer):
        return None
    return _SMALL_PACE if layer < _SMALL_LAYER else _PACE


def largest_rows(settings: EngineConfig, pace: Pace | None) -> int:
    """Rows of the largest step that a graph may hold."""
    return captured_rows(settings.max_num_seqs, short_rows(settings), 0 if pace is None else pace.limit)


def short_rows(settings: EngineConfig) -> int:
    """Rows of the largest step with prefill chunks that a graph may hold, where nothing is paced."""
    return 0 if settings.enforce_eager else accounting.short_rows(settings.max_num_batched_tokens)
