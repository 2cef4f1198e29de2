"""Gemma 2: norms before and behind attention and MLP, capped scores and logits, a window in every second layer."""

from __future__ import annotations

from tpctl.arch import parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.families.gemma3 import ACTIVATIONS, model, read_cap
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import full_every, layer_kinds, mixed_windows
from tpctl.errors import UnsupportedModelError, shown

ARCHITECTURE = "Gemma2ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    activation = parts.read_activation(fields, "hidden_activation", ACTIVATIONS)
    if fields.get("use_bidirectional_attention"):
        key = "use_bidirectional_attention"
        raise UnsupportedModelError(f"config.json: {key} is {shown(fields.get(key))}, which is not supported")
    kinds = layer_kinds(fields, sizes.num_layers) or full_every(2, sizes.num_layers)
    fields.either("sliding_window", "sliding_window_size")  # in some files, where it must say the same
    windows = mixed_windows(fields, kinds)
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim)
    scale = fields.number("query_pre_attn_scalar", least=1e-3, most=1e6) ** -0.5
    cap = read_cap(fields, "attn_logit_softcapping")
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, activation)
    blocks = tuple(
        parts.sandwich(
            sizes,
            parts.attention(sizes, rope, window, qkv_bias=bias, o_bias=bias, scale=scale, softcap=cap),
            mlp,
        )
        for window in windows
    )
    return model(fields, sizes, blocks)


FAMILY = Family(
    ARCHITECTURE,
    {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    frozenset({"sliding_window"}),
    describe,
    own=frozenset(
        {
            *("hidden_activation", "query_pre_attn_scalar", "use_bidirectional_attention"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        }
    ),
)
