"""Decodes that share a prefix, which is read once for all, against each for itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401 (a fixture)
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.kernels.attention.fp8_vectors import quantise
from tpctl.kernels.attention.packed_kv import pack_reference
from tpctl.kernels.attention.paged_decode import DecodePlan, DecodeScratch, paged_decode, paged_decode_reference
from tpctl.kernels.attention.shared_prefix import SharedPrefix

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]

# query heads, KV heads, tokens of each behind the prefix (0: a row of padding)
SHAPES = [(4, 2, (1, 33, 7, 70)), (6, 1, (40, 0, 5)), (8, 8, (3, 0, 0))]
MANY = (32, 8, tuple(1 + 7 * i % 200 for i in range(150)))


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("form", ["model", "packed", "fp8"])
@pytest.mark.parametrize(("prefix", "softcap"), [(128, None), (384, 1.5)])
@pytest.mark.parametrize("heads,kv_heads,own", SHAPES if INTERPRET else [*SHAPES, MANY])
def test_matches_reference(
    heads: int, kv_heads: int, own: tuple[int, ...], prefix: int, softcap: float | None, form: str, block: int
) -> None:
    torch.manual_seed(heads)
    seqs, dim = len(own), 64
    lens = [prefix + tokens if tokens else 0 for tokens in own]
    shared, width = prefix // block, -(-max(lens) // block)
    count = shared + seqs * (width - shared)
    keys, values = torch.randn(2, count, block, kv_heads, dim).to(DEVICE, torch.bfloat16)
    order = torch.randperm(count).int()
    tables = torch.zeros(seqs, width, dtype=torch.int32)
    tables[:, :shared] = order[:shared]
    tables[:, shared:] = order[shared:].view(seqs, -1)
    tables = tables.to(DEVICE)
    held, factors = [], []
    kept = []
    for one in () if form == "model" else (keys, values):
        fp8 = form == "fp8"
        rows, of = quantise(one) if fp8 else pack_reference(one)
        held.append(rows.view(torch.uint8).transpose(1, 2).contiguous())
        factors.append(of.transpose(1, 2))
        kept.append((rows.float() * of.float()[..., None]).to(one.dtype) if fp8 else one)
    both = None
    if form == "model":
        held = kept = [keys, values]
    else:
        stacked = torch.stack(factors, -1)
        both = torch.empty(stacked.shape, dtype=stacked.dtype, device=DEVICE).copy_(stacked)
    q = torch.randn(seqs, heads, dim).to(DEVICE, torch.bfloat16)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    tokens = torch.tensor([prefix], dtype=torch.int32, device=DEVICE)
    room = SharedPrefix(
        torch.zeros_like(tokens),
        torch.full((seqs, heads, dim), float("nan"), device=DEVICE),
        torch.full((seqs * heads, 2), float("nan"), device=DEVICE),
    )
    scratch = DecodeScratch.allocate(seqs, heads, dim, DEVICE)
    settings = {"softcap": softcap, "packed": form != "model", "prefix": room}
    plan = DecodePlan(seqs, heads, kv_heads, dim, block, scratch, **settings)
    live = seq_lens > 0
    want = paged_decode_reference(q.double(), kept[0].double(), kept[1].double(), tables, seq_lens, softcap=softcap)
    for pdl in (False,) if INTERPRET else (False, True):
        plan.update(seq_lens, tokens)
        got = paged_decode(q, *held, tables, seq_lens, plan, factors=both, pdl=pdl)
        assert relative_error(got[live], want[live]) < 2e-2
