"""Embeddings that each layer has of its own, and adds at its end (Gemma 4).

A token's for all layers are looked up once a step:

    table[token] ─ ranks' sum ─ · root of P ─────────────(+)─ / root of 2 ── [T, layers, P], a row for each layer
    x ── projection ── / root of H ── norm of each layer ─┘

    residual ── gate ── activation ── · own row ── projection ── norm ── added to the residual, at the layer's end

The table is cut by rows as the model's embedding is, and what multiplies is whole on every rank, so one sum over the
ranks a step is all that is exchanged for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpctl.arch import block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.held import Hold
from tpctl.arch.linear import Linear, Norm
from tpctl.distributed import TPGroup
from tpctl.layers.embedding import VocabParallelEmbedding
from tpctl.layers.linear import ReplicatedLinear
from tpctl.layers.module import attach
from tpctl.layers.norm import RMSNorm


class LayerInput:
    """What a layer adds of its own embeddings. Its weights are under their own names in ``layer``."""

    def __init__(
        self, made_of: block.LayerInput, hold: Hold, layer: nn.Module, dtype: torch.dtype | None = None
    ) -> None:
        self._gate = ReplicatedLinear(hold(made_of.gate), dtype)
        self._projection = ReplicatedLinear(hold(made_of.projection), dtype)
        self._norm = RMSNorm.of(made_of.norm, dtype)
        for one, module in (
            (made_of.gate, self._gate),
            (made_of.projection, self._projection),
            (made_of.norm, self._norm),
        ):
            attach(layer, one.name, module)

    def __call__(self, residual: Tensor, embedded_TP: Tensor) -> Tensor:
        """[T, H], whole on every rank, of the residual [T, H]."""
        gate = F.gelu(self._gate(residual), approximate="tanh")
        return self._norm(self._projection(gate * embedded_TP))  # type: ignore[no-any-return]


class LayerInputs:
    """The embeddings of all layers. Its weights are under their own names in ``model``."""

    def __init__(
        self, made_of: Blueprint, hold: Hold, group: TPGroup, model: nn.Module, dtype: torch.dtype | None = None
    ) -> None:
        table, projection, norm = made_of.beside
        assert isinstance(table, Linear) and isinstance(projection, Linear) and isinstance(norm, Norm)
        (rows,) = hold(table).outputs
        self._size, self._scale = norm.size, made_of.hidden_size**-0.5
        self._table = VocabParallelEmbedding(rows, table.inputs, group, dtype, scale=norm.size**0.5, rounded=True)
        self._projection = ReplicatedLinear(hold(projection), dtype)
        self._norm = RMSNorm.of(norm, dtype)
        for name, module in (
            (table.name, self._table),
            (projection.name, self._projection),
            (norm.name, self._norm),
        ):
            attach(model, name, module)
        self._group = group

    def __call__(self, input_ids: Tensor, embedded_TH: Tensor) -> Tensor:
        """[T, layers, P], of the tokens int64 [T] and the model's embeddings of them, scaled and whole."""
        shape = len(input_ids), -1, self._size
        looked_up = self._group.all_reduce(self._table(input_ids))
        projected: Tensor = self._norm((self._projection(embedded_TH) * self._scale).view(shape))
        return (projected + looked_up.view(shape)).mul_(2.0**-0.5)
