"""The interface of an attention backend.

A backend owns the layout of its KV cache. Each step it first stores the new keys and values, then attends: decodes
over their block tables, prefill chunks over their cached prefix and, causally, over themselves. Storing comes first
for all sequences of a step, so a sequence may read blocks that another one fills in the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tpctl.accounting import KeptLayer, KvForm, KvLayout, LayerPool, LayerPools, pools_of
from tpctl.layers.attention.heads import HeadPreparation, without_gates
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.rotary import RotaryTable


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention on this rank.

    Attributes:
        scale: multiplies the scores.
        window: limits a token to that many keys, its own included.
        softcap: a scaled score s becomes softcap * tanh(s / softcap) before the softmax.
        sinks: a score of each query head joins its softmax, and no value goes with it.
        latent: values are the first so many numbers of keys, and no others are kept (latent attention).
        made: numbers that a head's key and value take where they are made of latent vectors.
        shared: later layers, which keep none of their own, attend to its keys and values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: int | None = None
    made: int = 0
    shared: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


class Place(NamedTuple):
    """Where a pool's blocks lie in its layers' caches: of ``per_slab`` blocks that a slab holds, the first ``stride``
    block ids behind that of the slab before, the others ``step`` behind each other."""

    per_slab: int = 1
    stride: int = 1
    step: int = 1

    def ids(self, table: list[int]) -> list[int]:
        """What layers call the blocks of a table; below 0, what is gone, is 0."""
        if table and table[0] < 0:
            table = [max(block, 0) for block in table]
        if self == (1, 1, 1):
            return table
        per_slab, stride, step = self
        return [block // per_slab * stride + block % per_slab * step for block in table]


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values, in the layout of the backend that allocated them.

    pool: whose slots and block tables it is read by (``ForwardBatch.pools``).
    """

    spec: AttentionSpec
    k: Tensor
    v: Tensor
    factors: Tensor | None = field(default=None, kw_only=True)
    """Of a key and a value each, [blocks, K, B, 2], where ``k`` and ``v`` are bytes: exponents, uint8, of a packed
    cache (``kernels.attention.packed_kv``); scales, bfloat16, of one in FP8 (``kernels.attention.fp8_kv``)."""
    pool: int = field(default=0, kw_only=True)


def kept_layer(spec: AttentionSpec) -> KeptLayer:
    """What is kept for a layer: of latent attention one vector a token, as it is."""
    vectors = 1 if spec.latent is not None else 2 * spec.num_kv_heads
    return KeptLayer(spec.window, vectors, spec.head_dim, spec.latent is not None)


@dataclass
class AttentionPlan:
    """A step, with what its layers share. Backends add what they prepare once a step."""

    batch: ForwardBatch
    _angles: dict[RotaryTable, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def angles(self, rotary: RotaryTable | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The rotary factors of the step's tokens, looked up by the first layer of those that share a table."""
        if rotary is None:
            return None
        found = self._angles.get(rotary)
        if found is None:
            found = self._angles[rotary] = rotary.angles(self.batch.rope_positions, dtype)
        return found

    def grown(self, q_TND: Tensor, rotary: RotaryTable | None) -> Tensor:
        """Rotated queries, scaled by their positions where the model does that."""
        growth_T = None if rotary is None else rotary.growth(self.batch.rope_positions)
        return q_TND if growth_T is None else q_TND * growth_T.to(q_TND.dtype)[:, None, None]


PlanT = TypeVar("PlanT", bound=AttentionPlan)


class AttentionBackend(ABC, Generic[PlanT]):
    """Attention of one rank.

    Args:
        layers: what each layer computes.
        pools: which of them share block tables; by default all, and no block is ever gone.

    Attributes:
        places: where the blocks of each pool lie in the caches that were allocated last.
    """

    name: str

    def __init__(self, layers: Sequence[AttentionSpec], block_size: int, pools: LayerPools | None = None) -> None:
        self.layers = tuple(layers)
        self.block_size = block_size
        self.pools = pools or LayerPools((None,), (0,) * len(self.layers))
        self.places = (Place(),) * len(self.pools.windows)

    @property
    def kv_form(self) -> KvForm:
        """How keys and values are kept."""
        return "model"

    @abstractmethod
    def allocate(
        self, num_slabs: int, dtype: torch.dtype, device: torch.device, layout: KvLayout | None = None
    ) -> list[LayerKV]:
        """Zeroed caches for every layer, of so many slabs; without a ``layout`` there is one pool, whose blocks these
        are."""

    def layer_pools(self, dtype: torch.dtype) -> list[LayerPool]:
        """What the pools' blocks take, keys and values together; at least 1, of a model without attention."""
        kept = [kept_layer(spec) for spec in self.layers]
        return pools_of(kept, self.pools, self.block_size, dtype.itemsize, self.kv_form)

    def forget(self) -> None:
        """Let no step go on with what the ones before have gathered; needed where slots are written again."""
        raise NotImplementedError(f"{self.name} is told of no slots that are written again")

    @abstractmethod
    def begin(self, batch: ForwardBatch) -> PlanT:
        """Once a step, before the first layer. Its device work may be captured in a graph."""

    def run(
        self, qkv: Tensor, prepare: HeadPreparation, kv: LayerKV, plan: PlanT, sinks_N: Tensor | None = None
    ) -> Tensor:
        """[T, N * D]: attention of one layer, from what its projection gives, [T, (N + 2 K) * D]; with gates
        [T, (2 N + 2 K) * D].

        Args:
            sinks_N: the scores of ``AttentionSpec.sinks``.
        """
        heads, angles = (kv.spec.num_heads, kv.spec.num_kv_heads), plan.angles(prepare.rotary, qkv.dtype)
        gates = None
        if prepare.gated:
            qkv, gates = without_gates(qkv, *heads)
        q_TND, k_TKD, v_TKD = prepare(qkv, *heads, angles)
        self.store(k_TKD, v_TKD, kv, plan)
        found = self.attend(plan.grown(q_TND, prepare.rotary), k_TKD, v_TKD, kv, plan, sinks_N)
        return found if gates is None else found * gates.sigmoid()

    @abstractmethod
    def run_again(self, q: Tensor, prepare: HeadPreparation, kv: LayerKV, plan: PlanT) -> Tensor:
        """[T, N * D]: attention of queries [T, N * D] to the keys and values that an earlier layer has stored in this
        step and before, in ``kv``."""

    @abstractmethod
    def store(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: PlanT) -> None:
        """Write the new keys and values to their slots; a slot of -1 is written nowhere."""

    @abstractmethod
    def attend(
        self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, plan: PlanT, sinks_N: Tensor | None = None
    ) -> Tensor:
        """[T, N * D]: softmax(q k^T * scale) v for every new token over its sequence's keys so far. ``k_TKD`` and
        ``v_TKD`` are what ``store`` was given."""
