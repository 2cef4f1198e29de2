"""A chain of kernels with programmatic dependent launch gives the bits of the same chain without it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPE, INTERPRET
from tpctl.kernels.attention.latent_decode import LatentPlan, LatentScratch, latent_decode
from tpctl.kernels.attention.latent_prepare import LatentShape, latent_prepare
from tpctl.kernels.attention.latent_values import latent_values
from tpctl.kernels.attention.packed_kv import pack_reference
from tpctl.kernels.attention.paged_decode import DecodePlan, DecodeScratch, paged_decode
from tpctl.kernels.attention.rope_cache import rope_cache
from tpctl.kernels.common.activation import act_and_mul
from tpctl.kernels.common.norm import add_rms_norm, rms_norm
from tpctl.kernels.linear.gemv import GemvScratch, small_linear
from tpctl.kernels.sampling.floors import Filters, sampling_floors
from tpctl.kernels.sampling.sampling import sample

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, HIDDEN, INTER, VOCAB, LAYERS = 4, 2, 256, 512, 3000, 6
DIM = BLOCK = 64 if INTERPRET else 128


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, DTYPE)


class Chain:
    """A few decoder layers; few rows go through small_linear, with `plain` through torch's linear, which is followed by
    a packed cache; tokens are sampled within top-p."""

    def __init__(self, batch: int, plain: bool) -> None:
        self.batch, self.plain = batch, plain
        sizes = [((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * INTER, HIDDEN), (HIDDEN, INTER)]
        self.weights = [[random(out, inp, scale=inp**-0.5) for out, inp in sizes] for _ in range(LAYERS)]
        self.lm_head = random(VOCAB, HIDDEN, scale=0.1)
        self.norm = 1 + random(HIDDEN, scale=0.1)
        self.caches = [random(batch * 8, BLOCK, KV_HEADS, DIM) for _ in range(2 * LAYERS)]
        self.exponents: list[torch.Tensor | None] = [None] * LAYERS
        if plain and not INTERPRET:
            packed = [pack_reference(cache.transpose(1, 2).contiguous()) for cache in self.caches]
            self.caches = [rows for rows, _ in packed]
            largest = [exponents for _, exponents in packed]
            self.exponents = [torch.stack(pair, -1) for pair in zip(largest[::2], largest[1::2], strict=True)]
        self.tables = torch.randperm(batch * 8).view(batch, 8).int().to(DEVICE)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
        self.x = random(batch, HIDDEN)
        self.rope = (torch.rand(8 * BLOCK, DIM // 2, device=DEVICE), torch.rand(8 * BLOCK, DIM // 2, device=DEVICE))
        self.scratch = GemvScratch.allocate(DEVICE)
        scratch = DecodeScratch.allocate(batch, HEADS, DIM, DEVICE)
        packs = self.exponents[0] is not None
        self.plan = DecodePlan(batch, HEADS, KV_HEADS, DIM, BLOCK, scratch, packed=packs)
        self.keys = torch.randint(0, 2**32, (batch, 2)).to(DEVICE)
        self.filters = Filters.allocate(batch, DEVICE)
        self.filters.temperature.fill_(0.7)
        self.filters.top_p.fill_(0.9)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, pdl: bool, gated: bool = False) -> torch.Tensor:
        if self.plain:
            y = torch.nn.functional.linear(rms_norm(x, self.norm, 1e-6, pdl=pdl), weight)
            return act_and_mul(y, pdl=pdl) if gated else y
        activation = "silu" if gated else None
        return small_linear(x, weight, self.scratch, norm=(self.norm, 1e-6), activation=activation, pdl=pdl)

    def add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, pdl: bool) -> None:
        if self.plain:
            add_rms_norm(torch.nn.functional.linear(x, weight), residual, self.norm, 1e-6, pdl=pdl)
        else:
            small_linear(x, weight, self.scratch, residual_TO=residual, out=residual, pdl=pdl)

    def run(self, pdl: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.plan.update(self.lens)
        x = self.x.clone()
        positions = self.lens.long() - 1
        blocks = self.tables.gather(1, (positions // BLOCK)[:, None])[:, 0]
        slots = blocks * BLOCK + positions % BLOCK
        for layer, (qkv, o, gate_up, down) in enumerate(self.weights):
            a = self.attend(layer, self.linear(x, qkv, pdl), positions, slots, pdl)
            self.add(a.view(self.batch, -1), o, x, pdl)
            self.add(self.linear(x, gate_up, pdl, gated=True), down, x, pdl)
        logits = self.linear(x, self.lm_head, pdl)
        floors = sampling_floors(logits.unsqueeze(0), self.filters, vocab_size=VOCAB, both=False, pdl=pdl)
        return x, sample(logits, self.filters.temperature, self.keys, floors_T=floors, pdl=pdl)[1]

    def attend(
        self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        k_cache, v_cache = self.caches[2 * layer : 2 * layer + 2]
        packed = {"factors": self.exponents[layer], "pdl": pdl}
        q = rope_cache(rows, k_cache, v_cache, self.rope, positions, slots, HEADS, **packed)
        return paged_decode(q, k_cache, v_cache, self.tables, self.lens, self.plan, **packed)


LATENT = LatentShape(32, 16, 16, 16) if INTERPRET else LatentShape(512, 128, 64, 128)


class LatentChain(Chain):
    """The same with latent attention."""

    def __init__(self, batch: int, plain: bool) -> None:
        super().__init__(batch, plain)
        rank, nope, rope, value = LATENT
        for weights in self.weights:
            weights[0] = random(HEADS * (nope + rope) + rank + rope, HIDDEN, scale=HIDDEN**-0.5)
            weights[1] = random(HIDDEN, HEADS * value, scale=(HEADS * value) ** -0.5)
        self.kv_b = [random(HEADS * (nope + value), rank, scale=rank**-0.5) for _ in range(LAYERS)]
        self.caches = [random(batch * 8, BLOCK, rank + rope) for _ in range(LAYERS)]
        self.rope = (self.rope[0][:, : rope // 2].contiguous(), self.rope[1][:, : rope // 2].contiguous())
        self.latent_norm = 1 + random(rank, scale=0.1)
        scratch = LatentScratch.allocate(HEADS, rank, DEVICE)
        self.plan = LatentPlan(batch, HEADS, rank, rope, BLOCK, scratch, itemsize=DTYPE.itemsize)

    def attend(
        self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        kept, cache, kv_b = LATENT.rank + LATENT.rope, self.caches[layer], self.kv_b[layer]
        norm = (self.latent_norm, 1e-6)
        q, _ = latent_prepare(rows[:, :-kept], rows[:, -kept:], kv_b, cache, norm, self.rope, positions, slots, LATENT,
                              pdl=pdl)  # fmt: skip
        sums = latent_decode(q, cache, self.tables, self.lens, self.plan, scale=kept**-0.5, pdl=pdl)
        return latent_values(sums, kv_b, LATENT, pdl=pdl)


# Linears of more than 16 rows are not among those that start early.
CHAINS = [(1, False), (7, False)] if INTERPRET else [(n, plain) for n in (1, 2, 7, 16) for plain in (False, True)]
CHAINS += [] if INTERPRET else [(40, True), (80, True)]


@pytest.mark.parametrize("kind", [Chain, LatentChain])
@pytest.mark.parametrize(("batch", "plain"), CHAINS)
def test_same_bits(batch: int, plain: bool, kind: type[Chain]) -> None:
    torch.manual_seed(batch)
    chain = kind(batch, plain)
    if INTERPRET:
        chain.lens.fill_(70)
        assert torch.isfinite(chain.run(False)[0]).all()
        return
    chain.lens.fill_(1)
    graphs = []
    for pdl in (False, True):
        chain.run(pdl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain.run(pdl)
        graphs.append((graph, outputs))
    for _ in range(30):
        chain.lens.copy_(torch.randint(1, 8 * BLOCK + 1, (batch,)))
        chain.x.copy_(torch.randn(batch, HIDDEN))
        results = []
        for graph, outputs in graphs:
            for _ in range(3):  # replays back to back, so that a step overlaps the one before
                graph.replay()
            results.append([output.clone() for output in outputs])
        for got, want in zip(results[1], results[0], strict=True):
            assert torch.equal(got, want)
        assert torch.isfinite(results[0][0]).all()
