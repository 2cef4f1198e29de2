"""DeepSeek V3, R1 and V3.1: latent attention; dense layers first, then experts chosen by sigmoid and a correction.

Kimi K2 is the same: its ``config.json`` names the class and has a model_type of its own.
"""

from __future__ import annotations

from tpctl.arch import mixture
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.family import COMMON, Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.latent import LatentSizes, latent
from tpctl.arch.rope import read_rope
from tpctl.arch.windows import no_window

ARCHITECTURE = "DeepseekV3ForCausalLM"


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    of = LatentSizes(
        q_rank=fields.optional_whole("q_lora_rank"),
        kv_rank=fields.whole("kv_lora_rank"),
        nope=fields.whole("qk_nope_head_dim"),
        rope=fields.whole("qk_rope_head_dim"),
        value=fields.whole("v_head_dim"),
    )
    if "qk_head_dim" in fields and fields.get("qk_head_dim") != of.nope + of.rope:
        raise fields.wrong("qk_head_dim", f"{of.nope + of.rope}, which qk_nope_head_dim and qk_rope_head_dim give,")
    rope = read_rope(fields, ARCHITECTURE, of.rope, interleaved=fields.flag("rope_interleave"))
    no_window(fields, sizes.num_layers, rope.longest, ARCHITECTURE)
    attention = latent(sizes.hidden_size, sizes.num_heads, of, rope, bias=fields.flag("attention_bias"))
    return mixture.dense_first(fields, sizes, attention)


FAMILY = Family(
    ARCHITECTURE,
    {
        **COMMON,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "head_dim": 64,  # that of the part with RoPE, whatever the hidden size is
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    frozenset({"num_key_value_heads", "q_lora_rank", "sliding_window"}),
    describe,
    frozenset(
        {
            *("n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
            *("q_lora_rank", "kv_lora_rank"),
        }
    ),
    only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
)
