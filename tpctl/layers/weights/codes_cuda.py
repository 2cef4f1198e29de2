"""Quantised weights on a GPU, multiplied by whichever kernel is fastest for the rows there are.

Up to 16 rows everything around a linear is part of its launch, as with ``KernelWeight``; up to a few hundred, all but
the norm. Where ``Codes.rounds``, inputs of many rows are rounded as the format says, and those of few are not.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tpctl.arch.block import Activation
from tpctl.kernels.collective.all_reduce import PeerBuffer
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.codes import PACKED, Codes
from tpctl.kernels.common.launch import capability, interprets, is_hopper, shared_memory
from tpctl.kernels.linear.codes_cublas import cublas_linear, cublas_scales, takes_rows
from tpctl.kernels.linear.codes_gemm import Way, decoded_linear, gemm_config, pick_way, quantize_rows, scaled_gemm
from tpctl.kernels.linear.codes_gemv import codes_gemv, pick_codes_gemv
from tpctl.kernels.linear.codes_linear import codes_linear, may_be_fast, pick_codes
from tpctl.kernels.linear.codes_ring import codes_ring, pick_codes_ring, ring_reads
from tpctl.kernels.linear.gemv import GemvScratch
from tpctl.kernels.linear.packed_gemm import PackedConfig, packed_gemm, pick_packed
from tpctl.kernels.linear.wide_gemm import WideConfig, pick_wide, wide_gemm
from tpctl.layers.norm import RMSNorm
from tpctl.layers.weights.codes import CodesWeight
from tpctl.layers.weights.kernels import GpuFacts, StepState, fused, normed

_NORM_WITHIN = 16
"""Most rows whose norm is part of the linear: every program takes the rows' lengths anew."""


class KernelCodesWeight(CodesWeight):
    """W [out, in] as codes, on a GPU."""

    def __init__(self, codes: Codes, scratch: GemvScratch, state: StepState, facts: GpuFacts) -> None:
        super().__init__(codes)
        self._scratch, self._state, self._facts = scratch, state, facts
        device = codes.values.device
        cuda = None if interprets(device) else torch.version.cuda
        self._cublas = cublas_scales(codes, capability(device), cuda)

    def linear(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        way = self._way(x)
        if way == "stored":
            return self._stored(x, bias, norm)
        if way == "scaled":
            return self._scaled(x, bias, norm)
        if way == "cublas":
            assert self._cublas is not None
            return cublas_linear(x, self.codes, self._cublas, bias, **fused(norm), pdl=self._state.pdl)
        if isinstance(way, WideConfig):
            return self._wide(x, bias, way, norm)
        x = x if norm is None else normed(x, norm, self._state)
        if isinstance(way, PackedConfig):
            return packed_gemm(x, self.codes, way, bias_N=bias, pdl=self._state.pdl)
        return decoded_linear(x, self.codes, bias, pdl=self._state.pdl)

    def gated(self, x: Tensor, bias: Tensor | None, activation: Activation, norm: RMSNorm | None = None) -> Tensor:
        way = self._way(x)
        if way == "stored":
            return self._stored(x, bias, norm, activation=activation)
        if isinstance(way, WideConfig):
            return self._wide(x, bias, way, norm, activation=activation)
        return act_and_mul(self.linear(x, bias, norm), activation=activation, pdl=self._state.pdl)

    def partial(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._state.sends:
            return self._stored(x, bias, None, outlet=self._state.sums)
        return self.linear(x, bias)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> None:
        way = self._way(x)
        if way == "stored":
            self._stored(x, bias, None, residual=residual)
        elif isinstance(way, WideConfig):
            self._wide(x, bias, way, None, residual_TN=residual, out=residual)
        else:
            residual.add_(self.linear(x, bias))

    def _way(self, x: Tensor) -> Way | Literal["cublas"] | PackedConfig | WideConfig:
        if not self._facts.takes(x):  # cuBLAS multiplies float32 faster
            return "decoded"
        rows, arch, multiprocessors = x.shape[0], capability(x.device), self._facts.multiprocessors
        if x.dtype == torch.bfloat16:
            scales = self._cublas
            if scales is not None and takes_rows(rows, self.codes, scales.block, multiprocessors):
                return "cublas"
            wide = pick_wide(rows, self.codes, multiprocessors=multiprocessors, hopper=is_hopper(x.device))
            if wide is not None and may_be_fast(x, x):
                return wide
            packed = pick_packed(rows, self.codes, arch, multiprocessors)
            if packed is not None:
                return packed
        return pick_way(rows, self.codes, arch, multiprocessors)

    def _wide(self, x: Tensor, bias: Tensor | None, config: WideConfig, norm: RMSNorm | None, **around: Any) -> Tensor:
        if norm is not None and not may_be_fast(x, norm.weight):
            x, norm = normed(x, norm, self._state), None
        pdl = self._state.pdl
        return wide_gemm(x, self.codes, self._scratch, config, bias_N=bias, **fused(norm), **around, pdl=pdl)

    def _stored(
        self,
        x: Tensor,
        bias: Tensor | None,
        norm: RMSNorm | None,
        *,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        outlet: PeerBuffer | None = None,
    ) -> Tensor:
        """One launch, or two with a norm of many rows; of float16 ones as well, which overflow as they meet its weight
        before they are divided by their length."""
        if norm is not None and (x.shape[0] > _NORM_WITHIN or x.dtype == torch.float16):
            x, norm = normed(x, norm, self._state), None
        gated = activation is not None
        if may_be_fast(x, x if norm is None else norm.weight):
            rows, norm_K = x.shape[0], x if norm is None else norm.weight
            facts: dict[str, Any] = {"multiprocessors": self._facts.multiprocessors, "hopper": self._facts.hopper}
            ring = None
            if outlet is None and ring_reads(x, norm_K, self.codes):
                ring = pick_codes_ring(rows, self.codes, gated=gated, **facts)
            found = None if ring is not None else pick_codes_gemv(rows, self.codes, gated=gated, **facts)
            if norm is not None and rows > 1 and (ring or found) is not None:  # each program would square all rows
                x, norm = normed(x, norm, self._state), None
            given: dict[str, Any] = {"bias_O": bias, **fused(norm), "activation": activation, "residual_TO": residual}
            given |= {"out": residual, "pdl": self._state.pdl}
            if ring is not None:
                return codes_ring(x, self.codes, config=ring, **given)
            if found is not None:
                return codes_gemv(x, self.codes, config=found, outlet=outlet, **given)
        config = pick_codes(
            x.shape[0],
            self.codes.outputs // (2 if gated else 1),
            x.shape[1],
            packed=self.codes.kind in PACKED,
            gated=gated,
            multiprocessors=self._facts.multiprocessors,
            large=self._facts.hopper,
        )
        assert config is not None, "so many rows are multiplied in another way"
        return codes_linear(
            x,
            self.codes,
            self._scratch,
            bias_O=bias,
            **fused(norm),
            activation=activation,
            residual_TO=residual,
            out=residual,
            config=config,
            outlet=outlet,
            pdl=self._state.pdl,
        )

    def _scaled(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """Inputs rounded by one launch, and multiplied by another."""
        codes, pdl = self.codes, self._state.pdl
        config = gemm_config(
            codes, x.shape[0], capability(x.device), shared_memory(x.device), self._facts.multiprocessors
        )
        block = None if codes.scales.shape[-1] == 1 else config.block_k
        assert codes.kind in ("e4m3", "int8")
        q, scales = quantize_rows(x, codes.kind, block, **fused(norm), pdl=pdl)
        out = x.new_empty((x.shape[0], codes.outputs))
        return scaled_gemm(q, scales, codes, config, bias_N=bias, out=out, pdl=pdl)
