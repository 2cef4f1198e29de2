"""A decode step of random weights, every kernel from the first norm to the sampled ids (``kernel_bench.py step``)."""

from __future__ import annotations

from typing import Any

import torch
from kernel_timing import BF16, DEVICE, LLAMA, QWEN, Shape, graph_us, make_cache, mixed_lengths, random_weights, row

from tpctl.kernels.attention.paged_decode import DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.rope_cache import rope_cache
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.launch import num_multiprocessors
from tpctl.kernels.common.norm import add_rms_norm, rms_norm
from tpctl.kernels.linear.gated_linear import gated_linear, pick_gated
from tpctl.kernels.linear.gemv import GemvScratch, pick, small_linear
from tpctl.kernels.linear.split_linear import pick_splits, split_linear
from tpctl.kernels.sampling.sampling import sample

PDL = frozenset({"qkv", "rope", "decode", "o", "gate_up", "down", "lm_head", "norm", "silu", "sample"})


class Step:
    """One decode step of random weights: every kernel from the first norm to the sampled ids.

    pdl: the kernels launched with programmatic dependent launch, by name.
    """

    def __init__(self, shape: Shape, lens: list[int]) -> None:
        self.shape, self.batch = shape, len(lens)
        self.pdl: frozenset[str] = frozenset()
        self.weights = {
            name: random_weights(1 if name == "lm_head" else shape.layers, out * (2 if gated else 1), inp)
            for name, out, inp, gated in shape.linears()
        }
        self.bytes = sum(w.numel() * 2 for ws in self.weights.values() for w in ws)
        self.norm = torch.rand(shape.hidden, device=DEVICE, dtype=BF16)
        self.qk: dict[str, Any] = {}
        if shape.qk_norm:
            self.qk = {"q_norm": self.norm[: shape.head_dim], "k_norm": self.norm[: shape.head_dim]}
        self.caches, self.tables, self.lens = make_cache(lens, shape, 256, shape.layers)
        self.bytes += sum(lens) * shape.kv_heads * shape.head_dim * 4 * shape.layers
        scratch = DecodeScratch.allocate(self.batch, shape.heads, shape.head_dim, DEVICE)
        self.plan = DecodePlan(self.batch, shape.heads, shape.kv_heads, shape.head_dim, 256, scratch)
        self.scratch = GemvScratch.allocate(DEVICE)
        self.x = torch.randn(self.batch, shape.hidden, device=DEVICE, dtype=BF16)
        self.rope = (torch.rand(40960, 64, device=DEVICE), torch.rand(40960, 64, device=DEVICE))
        self.positions = self.lens.long() - 1
        self.slots = torch.arange(self.batch, device=DEVICE) * 256
        self.temperatures = torch.full((self.batch,), 0.6, device=DEVICE)
        self.keys = torch.randint(0, 2**32, (self.batch, 2), device=DEVICE)

    def linear(
        self, name: str, layer: int, x: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear `name` with its norm, activation or addition; returns (result, what is still to be added to x)."""
        weight = self.weights[name][layer]
        adds, gated = name in ("o", "down"), name == "gate_up"
        config = pick(x.shape[0], weight.shape[0] // (2 if gated else 1), weight.shape[1], gated=gated)
        if adds:
            if config is not None:
                return small_linear(x, weight, self.scratch, residual_TO=self.x, out=self.x, pdl=name in self.pdl), None
            splits = pick_splits(x.shape[0], *weight.shape)
            return x, torch.nn.functional.linear(x, weight) if splits == 1 else split_linear(x, weight, splits)
        if config is not None and delta is None:
            options: dict[str, Any] = {"activation": "silu"} if gated else {}
            return small_linear(x, weight, self.scratch, norm=(self.norm, 1e-6), pdl=name in self.pdl, **options), None
        if delta is not None:
            x = add_rms_norm(delta, self.x, self.norm, 1e-6, pdl="norm" in self.pdl)
        else:
            x = rms_norm(x, self.norm, 1e-6, pdl="norm" in self.pdl)
        if gated:
            tiles = pick_gated(x.shape[0], weight.shape[0] // 2, x.shape[1], num_multiprocessors(DEVICE))
            if tiles is not None:
                return gated_linear(x, weight, tiles, pdl="gate_up" in self.pdl), None
        y = torch.nn.functional.linear(x, weight)
        return (act_and_mul(y, pdl="silu" in self.pdl) if gated else y), None

    def __call__(self) -> torch.Tensor:
        delta = None
        self.plan.update(self.lens)
        for layer in range(self.shape.layers):
            qkv, _ = self.linear("qkv", layer, self.x, delta)
            q = rope_cache(
                qkv,
                *self.caches,
                self.rope,
                self.positions,
                self.slots,
                self.shape.heads,
                pdl="rope" in self.pdl,
                **self.qk,
            )
            a = paged_decode(q, *self.caches, self.tables[layer], self.lens, self.plan, pdl="decode" in self.pdl)
            _, delta = self.linear("o", layer, a.view(self.batch, -1), None)
            h, _ = self.linear("gate_up", layer, self.x, delta)
            _, delta = self.linear("down", layer, h, None)
        logits, _ = self.linear("lm_head", 0, self.x, delta)
        return sample(logits, self.temperatures, self.keys, pdl="sample" in self.pdl)[1]


def bench_step() -> None:
    row("decode step", "batch", "context", "ms", "ms with pdl", "TB/s")
    for shape in (QWEN, LLAMA, LLAMA.half()):
        for lens in ([256], [256] * 8, [900] * 64, mixed_lengths(256, 100, 1650)):
            step = Step(shape, lens)
            times = []
            for step.pdl in (frozenset(), PDL):
                times.append(graph_us([step]))
            row(shape.name, len(lens), sum(lens) // len(lens), *(f"{us / 1e3:.3f}" for us in times),
                f"{step.bytes / min(times) / 1e6:.2f}")  # fmt: skip
            del step
