"""The decoder's forward pass on a GPU: the modules of ``models.decoder``, run with fused kernels.

The weights, the order of operations and the two all-reduces of a block are those of ``Decoder.forward``, which stays
the readable reference (and gives the same results, see tests/gpu). What differs is how much one launch does:

    few rows     norm + GEMV (+ bias) | norm + GEMV + SiLU*up | GEMV + residual       six launches a block
    many rows    residual add + norm | cuBLAS | SiLU*up

and in both QK-norm, RoPE and the write into the KV cache are one launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpctl.kernels.activation import silu_and_mul
from tpctl.kernels.gemv import GemvScratch, pick, small_linear
from tpctl.kernels.norm import add_rms_norm, rms_norm
from tpctl.kernels.rope_cache import rope_cache
from tpctl.layers.attention.attention import Attention
from tpctl.layers.attention.base import LayerKV
from tpctl.layers.attention.paged import PagedBackend
from tpctl.layers.batch import ForwardBatch
from tpctl.layers.linear import ReplicatedLinear
from tpctl.layers.norm import RMSNorm
from tpctl.models.decoder import MLP, Decoder, DecoderLayer


class CudaDecoder:
    """Runs ``decoder`` on its device. One instance per stream: its scratch memory is shared by all calls."""

    def __init__(self, decoder: Decoder, backend: PagedBackend) -> None:
        self.decoder = decoder
        self.backend = backend
        self.group = decoder.model.norm.group
        self.windows = set(decoder.config.windows)
        self.layers: list[DecoderLayer] = list(decoder.model.layers)
        self._scratch = GemvScratch.allocate(self.group.device)

    def logits(self, batch: ForwardBatch, kv: list[LayerKV], rows: Tensor | None) -> Tensor:
        """[R, V]: this rank's logits of the tokens ``rows`` of the batch; ``None`` means all."""
        self.backend.begin(batch, self.windows)
        residual: Tensor = self.decoder.model.embed_tokens(batch.input_ids)
        final = self.decoder.model.norm
        if self._small(residual):
            for layer, layer_kv in zip(self.layers, kv, strict=True):
                self._few_rows(layer, residual, layer_kv, batch)
            if rows is not None:
                residual = residual[rows]
            return self._project_small(residual, self.decoder.lm_head.weight, None, final)
        partial: Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            partial = self._many_rows(layer, partial, residual, layer_kv, batch)
        assert partial is not None
        hidden = self._reduce_add(partial, residual, final)
        if rows is not None:
            hidden = hidden[rows]
        if self._small(hidden):
            return self._project_small(hidden, self.decoder.lm_head.weight, None, None)
        return F.linear(hidden, self.decoder.lm_head.weight)

    def _small(self, x: Tensor) -> bool:
        """Whether the kernels for few rows are the faster ones, and take this dtype."""
        return (
            x.dtype != torch.float32
            and pick(x.shape[0], self.layers[0].mlp.down_proj.out_features, x.shape[1]) is not None
        )

    def _few_rows(self, layer: DecoderLayer, residual: Tensor, kv: LayerKV, batch: ForwardBatch) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = self._project_small(residual, attention.qkv_proj.weight, attention.qkv_proj.bias, layer.input_layernorm)
        self._add_small(attention.o_proj, self._attend(attention, qkv, kv, batch), residual)
        norm = layer.post_attention_layernorm
        gated = self._gate_small(mlp, residual, norm)
        self._add_small(mlp.down_proj, gated, residual)

    def _project_small(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        config = pick(x.shape[0], weight.shape[0], x.shape[1])
        if config is None:
            x = x if norm is None else rms_norm(x, norm.weight, norm.eps)
            return F.linear(x, weight, bias)
        fused = None if norm is None else (norm.weight, norm.eps)
        return small_linear(x, weight, self._scratch, bias_O=bias, norm=fused, config=config)

    def _gate_small(self, mlp: MLP, residual: Tensor, norm: RMSNorm) -> Tensor:
        linear = mlp.gate_up_proj
        config = pick(residual.shape[0], linear.weight.shape[0] // 2, residual.shape[1], gated=True)
        if config is None or linear.bias is not None:
            return silu_and_mul(self._project_small(residual, linear.weight, linear.bias, norm))
        return small_linear(
            residual,
            linear.weight,
            self._scratch,
            norm=(norm.weight, norm.eps),
            activation="silu",
            config=config,
        )

    def _add_small(self, linear: ReplicatedLinear, x: Tensor, residual: Tensor) -> None:
        """``residual += linear(x)``, summed over the ranks."""
        bias = linear.bias if self.group.rank == 0 else None
        config = pick(x.shape[0], linear.weight.shape[0], x.shape[1])
        if self.group.size == 1 and config is not None:
            small_linear(
                x, linear.weight, self._scratch, bias_O=bias, residual_TO=residual, out=residual, config=config
            )
            return
        partial = self._project_small(x, linear.weight, bias, None)
        residual.add_(self.group.all_reduce(partial))

    def _many_rows(
        self, layer: DecoderLayer, partial: Tensor | None, residual: Tensor, kv: LayerKV, batch: ForwardBatch
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        x = rms_norm(residual, norm.weight, norm.eps) if partial is None else self._reduce_add(partial, residual, norm)
        qkv = F.linear(x, attention.qkv_proj.weight, attention.qkv_proj.bias)
        partial = attention.o_proj.partial(self._attend(attention, qkv, kv, batch))
        x = self._reduce_add(partial, residual, layer.post_attention_layernorm)
        gated = silu_and_mul(F.linear(x, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias))
        return mlp.down_proj.partial(gated)

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
            q_norm_D=None if q_norm is None else q_norm.weight,
            k_norm_D=None if k_norm is None else k_norm.weight,
            eps=1e-6 if q_norm is None else q_norm.eps,
        )
        return self.backend.attend_cached(q, kv, attention.window, batch)

    def _reduce_add(self, partial: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor:
        return add_rms_norm(self.group.all_reduce(partial), residual, norm.weight, norm.eps)
