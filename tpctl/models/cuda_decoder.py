"""The decoder's forward pass on GPUs: the modules of ``models.decoder``, run with fused kernels.

The weights, the order of operations and the two all-reduces of a block are those of ``Decoder.forward``, which stays
the readable reference (and gives the same results, see tests/gpu). What differs is how much one launch does:

    few rows, one rank    norm + GEMV (+ bias) | norm + GEMV + SiLU*up | GEMV + residual
    otherwise             all-reduce + residual + norm | GEMM | SiLU*up (up to 128 rows within its linear)
                          (a GEMM of few outputs in runs of its input, summed by what follows: kernels.split_linear)

and in both QK-norm, RoPE and the write into the KV cache are one launch. Two ranks, and more where messages
are small, reduce by writing to each other's memory (``kernels.all_reduce``), for few rows from within the linear whose
result is summed; NCCL does the rest.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.kernels.attention.rope_cache import rope_cache
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import silu_and_mul
from tpctl.kernels.common.launch import has_pdl, is_hopper, num_multiprocessors
from tpctl.kernels.common.norm import add_rms_norm, rms_norm
from tpctl.kernels.linear.gated_linear import gated_linear, pick_gated
from tpctl.kernels.linear.gemv import GemvConfig, GemvScratch, few_rows, pick, small_linear
from tpctl.kernels.linear.split_linear import pick_splits, split_linear
from tpctl.layers.attention.attention import Attention
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.attention.paged import PagedBackend
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.norm import RMSNorm
from tpctl.models.decoder import MLP, Decoder, DecoderLayer

PEER_LIMIT = 2 << 20
"""Largest message in bytes that more than two ranks send to each other's memory; above it NCCL sends fewer bytes. An
estimate: measured were two ranks, where peer memory wins at any size."""

PEER_PIECE = 8 << 20
"""Bytes a launch of two ranks' messages, which never go through NCCL (docs/kernel-notes.md)."""


PDL_ROWS = 512
"""Largest batch whose kernels use programmatic dependent launch."""


def reach_each_other(group: TPGroup) -> bool:
    """Whether every rank's GPU can address the memory of all others' (collective); else NCCL does all sums."""
    device, count = group.device, torch.cuda.device_count()
    others = [index for index in range(min(count, group.size)) if index != device.index]
    mine = count >= group.size and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    return group.minimum(int(mine)) == 1


class CudaDecoder:
    """Runs ``decoder`` on its device. One instance per stream: its scratch memory is shared by all calls.

    Args:
        max_rows: the largest decode batch, or captured step.
        max_tokens: the largest step.

    Creation is collective where there are several ranks.
    """

    def __init__(self, decoder: Decoder, backend: PagedBackend, max_rows: int, max_tokens: int) -> None:
        self.decoder = decoder
        self.backend = backend
        self.group = decoder.model.norm.group
        self.windows = set(decoder.config.windows)
        self.layers: list[DecoderLayer] = list(decoder.model.layers)
        self._scratch = GemvScratch.allocate(self.group.device)
        self._few = few_rows(self.group.device)
        self._pdl = False
        self._sums: PeerBuffer | None = None
        self._sends = False  # linears send the sums' addends themselves
        self.peers: PeerBuffer | None = None
        weight = decoder.lm_head.weight
        if self.group.size > 1 and weight.dtype in (torch.bfloat16, torch.float32) and reach_each_other(self.group):
            world = dist.group.WORLD
            assert world is not None
            hidden = weight.shape[1]
            row = hidden * weight.element_size()
            if self.group.size == 2:
                max_rows = max(max_rows, min(max_tokens, PEER_PIECE // row))
            else:
                max_rows = min(max_rows, max(1, PEER_LIMIT // row))
            self.peers = PeerBuffer.connect(world, max_rows, hidden, weight.dtype, self.group.device)

    def logits(self, batch: ForwardBatch, kv: list[LayerKV], rows: Tensor | None) -> Tensor:
        """[R, V]: this rank's logits of the tokens ``rows`` of the batch; ``None`` means all."""
        # Launched early, a kernel's start hides behind the end of the one before; many rows leave nothing to hide.
        self._pdl = batch.num_tokens <= PDL_ROWS and has_pdl(self.group.device)
        self.backend.begin(batch, self.windows)
        residual = self.decoder.model.embed_tokens.local(batch.input_ids)
        self._sums = self.peers if self._peers_take(residual) else None  # all sums of a step have this shape
        self._sends = self._sums is not None and self._small(residual)
        residual = self._all_reduce(residual)
        final = self.decoder.model.norm
        if self.group.size == 1 and self._small(residual):
            for layer, layer_kv in zip(self.layers, kv, strict=True):
                self._few_rows(layer, residual, layer_kv, batch)
            return self._head(residual, rows, final)
        partial: Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            partial = self._block(layer, partial, residual, layer_kv, batch)
        assert partial is not None
        return self._head(self._reduce_add(partial, residual, final), rows, None)

    def _head(self, x: Tensor, rows: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """This rank's logits of some rows, or of all; of none where a step samples nothing."""
        weight = self.decoder.lm_head.weight
        x = x if rows is None else x[rows]
        return self._linear(x, weight, None, norm) if len(x) else x.new_empty(0, len(weight))

    def winner(self, scores_R: Tensor, ids_R: Tensor) -> Tensor | None:
        """The token id of the best score over the ranks, for each row (-1: some rank has stopped sending); ``None``
        where peers cannot be written to."""
        return None if self.peers is None else self.peers.winner(scores_R, ids_R, pdl=self._pdl)

    def lost_peer(self) -> bool:
        """Whether this rank ever gave up waiting for another (synchronises with the device)."""
        return self.peers is not None and self.peers.timed_out()

    def _peers_take(self, x: Tensor) -> bool:
        """Whether sums of this shape go through peer memory: always between two ranks, else what fits one launch."""
        if self.peers is None or not self.peers.fits(x):
            return False
        return self.group.size == 2 or (x.nbytes <= PEER_LIMIT and x.shape[0] <= self.peers.layout.max_rows)

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self._sums is not None:
            return self._sums.all_reduce(x, out=x, pdl=self._pdl)
        return self.group.all_reduce(x)

    @staticmethod
    def _takes(x: Tensor) -> bool:
        """Whether the kernels for few rows take this dtype."""
        return x.dtype != torch.float32

    def _norm_apart(self, x: Tensor, norm: RMSNorm | None) -> tuple[Tensor, RMSNorm | None]:
        """Norm ``x`` beforehand where the kernel would multiply it by the norm's weight in float16, which overflows;
        one row is multiplied in float32."""
        if norm is None or x.dtype != torch.float16 or x.shape[0] == 1:
            return x, norm
        return rms_norm(x, norm.weight, norm.eps, pdl=self._pdl), None

    def _small(self, x: Tensor) -> bool:
        """Whether a whole block runs on the kernels for few rows."""
        down = self.layers[0].mlp.down_proj
        return self._takes(x) and self._pick(x.shape[0], down.out_features, down.in_features) is not None

    def _pick(self, rows: int, out_features: int, in_features: int, *, gated: bool = False) -> GemvConfig | None:
        return pick(rows, out_features, in_features, gated=gated, most=self._few)

    def _few_rows(self, layer: DecoderLayer, residual: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        """A block on one rank: the residual goes in and comes out in place, normed inside the GEMVs that read it."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = self._linear(residual, attention.qkv_proj.weight, attention.qkv_proj.bias, layer.input_layernorm)
        self._add(attention.o_proj.weight, attention.o_proj.bias, self._attend(attention, qkv, kv, batch), residual)
        gated = self._gate(mlp, residual, layer.post_attention_layernorm)
        self._add(mlp.down_proj.weight, mlp.down_proj.bias, gated, residual)

    def _block(
        self, layer: DecoderLayer, partial: Tensor | None, residual: Tensor, kv: LayerKV, batch: ForwardBatch
    ) -> Tensor:
        """A block as in ``DecoderLayer.forward``: takes and returns partial sums ([T, H], or in runs [S, T, H])."""
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        if partial is None:
            x = rms_norm(residual, norm.weight, norm.eps, pdl=self._pdl)
        else:
            x = self._reduce_add(partial, residual, norm)
        qkv = self._runs(x, attention.qkv_proj.weight, attention.qkv_proj.bias)
        partial = self._partial(attention.o_proj.weight, attention.o_proj.bias, self._attend(attention, qkv, kv, batch))
        x = self._reduce_add(partial, residual, layer.post_attention_layernorm)
        return self._partial(mlp.down_proj.weight, mlp.down_proj.bias, self._gate(mlp, x, None))

    def _linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None, outlet: PeerBuffer | None = None
    ) -> Tensor:
        """``norm(x) W^T + b``: one launch for few rows, which can send the result to the peers as well."""
        x, norm = self._norm_apart(x, norm)
        config = self._pick(x.shape[0], weight.shape[0], x.shape[1]) if self._takes(x) else None
        if config is None:
            assert outlet is None, "nobody would send what the all-reduce takes for sent"
            x = x if norm is None else rms_norm(x, norm.weight, norm.eps, pdl=self._pdl)
            return F.linear(x, weight, bias)
        fused = None if norm is None else (norm.weight, norm.eps)
        return small_linear(
            x, weight, self._scratch, bias_O=bias, norm=fused, config=config, outlet=outlet, pdl=self._pdl
        )

    def _gate(self, mlp: MLP, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """``silu(gate) * up`` of the merged projection."""
        x, norm = self._norm_apart(x, norm)
        weight, bias = mlp.gate_up_proj.weight, mlp.gate_up_proj.bias
        rows, intermediate = x.shape[0], weight.shape[0] // 2
        if bias is None and self._takes(x):
            config = self._pick(rows, intermediate, x.shape[1], gated=True)
            if config is not None:
                fused = None if norm is None else (norm.weight, norm.eps)
                return small_linear(
                    x, weight, self._scratch, norm=fused, activation="silu", config=config, pdl=self._pdl
                )
            cut = pick_gated(rows, intermediate, x.shape[1], num_multiprocessors(x.device))
            if cut is not None and norm is None and is_hopper(x.device):
                return gated_linear(x, weight, cut, pdl=self._pdl)
        return silu_and_mul(self._linear(x, weight, bias, norm), pdl=self._pdl)

    def _partial(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """A row-parallel linear's partial sum; rank 0 adds the bias, once."""
        bias = bias if self.group.rank == 0 else None
        if self._sends or (self.group.size > 1 and self._sums is None):
            return self._linear(x, weight, bias, None, self._sums)
        return self._runs(x, weight, bias)

    def _runs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, or runs of it to be summed ([S, T, O]), for kernels that take both."""
        if bias is None and self._takes(x) and is_hopper(x.device):
            splits = pick_splits(x.shape[0], weight.shape[0], weight.shape[1])
            if splits > 1:
                return split_linear(x, weight, splits)
        return self._linear(x, weight, bias, None)

    def _add(self, weight: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor) -> None:
        """``residual += x W^T + b`` on one rank."""
        config = self._pick(x.shape[0], weight.shape[0], x.shape[1])
        if config is None:
            residual.add_(F.linear(x, weight, bias))
        else:
            small_linear(
                x, weight, self._scratch, bias_O=bias, residual_TO=residual, out=residual, config=config, pdl=self._pdl
            )

    def _attend(self, attention: Attention, qkv: Tensor, kv: LayerKV, batch: ForwardBatch) -> Tensor:
        """QK-norm, RoPE and the cache write, then attention: [T, (N + 2K) * D] -> [T, N * D]."""
        q_norm, k_norm = attention.q_norm, attention.k_norm
        q = rope_cache(
            qkv,
            kv.k,
            kv.v,
            (attention.rotary.cos, attention.rotary.sin),
            batch.rope_positions,
            batch.slot_mapping,
            attention.heads.num_heads,
            exponents=kv.exponents,
            q_norm_D=None if q_norm is None else q_norm.weight,
            k_norm_D=None if k_norm is None else k_norm.weight,
            eps=1e-6 if q_norm is None else q_norm.eps,
            pdl=self._pdl,
        )
        return self.backend.attend_cached(q, kv, attention.window, batch)

    def _reduce_add(self, partial: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor:
        """All-reduce, add to the residual in place, normalise (``RMSNorm.reduce_add``)."""
        if self._sums is not None:
            return self._sums.all_reduce_add_rms_norm(
                partial, residual, norm.weight, norm.eps, sent=self._sends, pdl=self._pdl
            )
        return add_rms_norm(self.group.all_reduce(partial), residual, norm.weight, norm.eps, pdl=self._pdl)
