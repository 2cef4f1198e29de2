"""What mixes tokens in models that tpctl cuts and does not run: attention with something beyond Llama's."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.block import Mixer
from tpctl.arch.family import Sizes


def grouped(sizes: Sizes, kind: str) -> Mixer:
    """Grouped-query attention; ``kind``: what people call it."""
    qkv, out = parts.projections(sizes)
    return Mixer(kind, (qkv, out), sizes.num_heads, sizes.num_kv_heads, kept=2 * sizes.head_dim)
