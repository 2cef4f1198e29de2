"""SmolLM3: Llama without RoPE in every fourth layer."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import FULL, SLIDING, layer_kinds, mixed_windows
from tpctl.errors import CheckpointError, counted

ARCHITECTURE = "SmolLM3ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, parts.read_activation(fields), bias=fields.flag("mlp_bias"))
    rotated = _rotated(fields, sizes.num_layers)
    windows = mixed_windows(fields, _kinds(fields, rotated))
    blocks = (
        parts.block(sizes, parts.attention(sizes, rope if rotates else None, window, qkv_bias=bias, o_bias=bias), mlp)
        for rotates, window in zip(rotated, windows, strict=True)
    )
    return parts.model(sizes, tuple(blocks))


def _rotated(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have RoPE: those with a 1 in ``no_rope_layers``, else all but every so many."""
    told = fields.get("no_rope_layers") is not None
    every = fields.whole("no_rope_layer_interval", least=0 if told else 1)
    if not told:
        return [(layer + 1) % every != 0 for layer in range(num_layers)]
    given = fields.wholes("no_rope_layers", most=1)
    if len(given) < num_layers:
        raise CheckpointError(
            f"config.json: no_rope_layers has {counted(len(given), 'number')} for {counted(num_layers, 'layer')}"
        )
    return [bool(one) for one in given[:num_layers]]


def _kinds(fields: Fields, rotated: list[bool]) -> list[str]:
    """Which layers have a window: those that ``layer_types`` says, else those without RoPE, if one is in use."""
    uses = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = layer_kinds(fields, len(rotated))
    if kinds is None:
        return [SLIDING if uses and not rotates else FULL for rotates in rotated]
    if SLIDING in kinds and not uses:
        raise CheckpointError("config.json: layer_types names sliding_attention, but no sliding_window is in use")
    return kinds


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    frozenset({"num_key_value_heads", "sliding_window"}),
    describe,
    own=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
)
