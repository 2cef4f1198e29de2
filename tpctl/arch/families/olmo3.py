"""OLMo 3: OLMo 2 with a window in three layers of four, and a RoPE for each of the two kinds."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families import olmo2
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope_of
from tpctl.arch.windows import FULL, SLIDING, full_every, layer_kinds, mixed_windows

ARCHITECTURE, THETA = "Olmo3ForCausalLM", 500000.0


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    kinds = layer_kinds(fields, sizes.num_layers) or full_every(4, sizes.num_layers)
    # As transformers has it, a rope_theta beside the settings of the two is that of full attention alone.
    thetas = {SLIDING: THETA, FULL: fields.get("rope_theta")}
    ropes = {kind: read_rope_of(kind, fields, ARCHITECTURE, sizes.head_dim, theta) for kind, theta in thetas.items()}
    mlp = parts.gated(sizes, parts.read_activation(fields))
    blocks = (
        olmo2.block(sizes, olmo2.attention(fields, sizes, ropes[kind], window), mlp)
        for kind, window in zip(kinds, mixed_windows(fields, kinds), strict=True)
    )
    return parts.rounded_once(parts.model(sizes, tuple(blocks)))


FAMILY = Family(ARCHITECTURE, {**olmo2.DEFAULTS, "rope_theta": THETA, "sliding_window": 4096}, olmo2.NULLABLE, describe)
