"""Attention of a simulated rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attend(q_TQD: Array, k_TKD: Array, v_TKD: Array) -> Array:
    """Causal attention, query heads in equal groups over KV heads; returns [T, Q * D]."""
    group = q_TQD.shape[1] // k_TKD.shape[1]
    k, v = k_TKD.repeat(group, axis=1), v_TKD.repeat(group, axis=1)
    scores = np.einsum("tqd,sqd->qts", q_TQD, k) / np.sqrt(q_TQD.shape[2])
    scores = np.where(np.tri(len(q_TQD), dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("qts,sqd->tqd", scores / scores.sum(-1, keepdims=True), v)
    return out.reshape(len(q_TQD), -1)
