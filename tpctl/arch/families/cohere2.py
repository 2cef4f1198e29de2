"""Command R7B and Command A: attention and MLP side by side, behind one LayerNorm without bias."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import parts
from tpctl.arch.block import Block
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.linear import Norm
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import full_every, layer_kinds, mixed_windows

ARCHITECTURE = "Cohere2ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    rope = read_rope(fields, ARCHITECTURE, sizes.head_dim, interleaved=True)
    kinds = layer_kinds(fields, sizes.num_layers)
    if kinds is None:
        kinds = full_every(fields.whole("sliding_window_pattern"), sizes.num_layers)
    bias = fields.flag("attention_bias")
    mlp = parts.gated(sizes, parts.read_activation(fields))
    attentions = (  # only layers with a window know positions
        parts.attention(sizes, None if window is None else rope, window, qkv_bias=bias, o_bias=bias)
        for window in mixed_windows(fields, kinds)
    )
    blocks = (Block(_norm(sizes, "input_layernorm"), one, None, mlp, beside=True) for one in attentions)
    return replace(
        parts.model(sizes, tuple(blocks)),
        norm=_norm(sizes, "model.norm"),
        logit_scale=fields.number("logit_scale", least=1e-6, most=1e6),
    )


def _norm(sizes: Sizes, name: str) -> Norm:
    return replace(parts.norm(sizes, name), centred=True)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    describe,
    own=frozenset({"logit_scale", "sliding_window_pattern"}),
    only={
        **dict.fromkeys(("use_parallel_block", "use_gated_activation", "use_embedding_sharing"), (True,)),
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
    },
    eps="layer_norm_eps",
)
