"""MiniMax-M2: experts chosen by sigmoid and a correction, norms over all query and all key heads at once, and RoPE in a
part of a head."""

from __future__ import annotations

from dataclasses import replace

from tpctl.arch import mixture, parts
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, MOST_EXPERTS, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import RopeConfig, read_rope
from tpctl.arch.routing import Routing
from tpctl.arch.windows import no_window
from tpctl.errors import CheckpointError, shown

ARCHITECTURE = "MiniMaxM2ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    parts.read_activation(fields)
    rope = _rope(fields, sizes)
    windows = no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    count = fields.whole(fields.either("num_local_experts", "num_experts"), most=MOST_EXPERTS)
    experts = mixture.experts(
        sizes.hidden_size,
        sizes.intermediate_size,
        count,
        fields.whole("num_experts_per_tok", most=count),
        where=mixture.SPARSE,
        projections=mixture.MIXTRAL,
        correction="e_score_correction_bias",
        routing=Routing("sigmoid", renormalise=True),
    )
    attentions = (parts.attention(sizes, rope, window, whole_norms=True) for window in windows)
    return parts.model(sizes, tuple(parts.block(sizes, one, experts) for one in attentions))


def _rope(fields: Fields, sizes: Sizes) -> RopeConfig:
    """RoPE of the ``rotary_dim`` first dimensions of a head, as published files have it, or of a share of them."""
    rotated, key = fields.optional_whole("rotary_dim", most=sizes.head_dim), "partial_rotary_factor"
    if rotated is not None:
        share = rotated / sizes.head_dim
        for given in (fields.values, fields.mapping("rope_parameters"), fields.mapping("rope_scaling")):
            if given.get(key) not in (share, None):
                raise CheckpointError(
                    f"config.json: rotary_dim is {rotated} of {sizes.head_dim}, but {key} is {shown(given.get(key))}; "
                    "keep the one that is meant"
                )
        fields = replace(fields, values={**fields.values, key: share})
    return read_rope(fields, ARCHITECTURE, sizes.head_dim, partial=True)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5000000.0,
        "partial_rotary_factor": 1.0,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    },
    frozenset({"rotary_dim", "partial_rotary_factor", "sliding_window"}),
    describe,
    mixture.OWN | {"use_qk_norm"},
    only={
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "attn_type_list": (1,),
        "swa_rope_theta": (-1.0,),
        "shared_moe_mode": ("sigmoid",),
    },
)
