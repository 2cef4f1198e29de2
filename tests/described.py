"""What a config says of a whole model, for comparison with what transformers makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tpctl.arch.block import Experts, Gated
from tpctl.arch.config import ModelConfig
from tpctl.arch.latent import LatentAttention


def described(config: ModelConfig) -> SimpleNamespace:
    """The sizes and switches that all blocks share; ``windows`` has one entry a layer with attention."""
    blueprint, mlp = config.blueprint, config.blueprint.blocks[0].mlp
    attention: Any = next(iter(blueprint.attentions), _NO_ATTENTION)
    if isinstance(attention, LatentAttention):
        attention = _latent(attention)
    return SimpleNamespace(
        model_type=config.model_type,
        hidden_size=blueprint.hidden_size,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=mlp.down.inputs,
        mlps=[_mlp(block.mlp) for block in blueprint.blocks],
        vocab_size=config.vocab_size,
        rms_norm_eps=blueprint.norm.eps,
        tie_word_embeddings=blueprint.tied,
        qkv_bias=attention.qkv.bias,
        o_bias=attention.out.bias,
        mlp_bias=mlp.down.bias,
        qk_norm=attention.q_norm is not None,
        fused=len({part.source for part in attention.qkv.parts}) == 1,
        windows=blueprint.windows,
        rope=attention.rope,
        dtype=config.dtype,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        max_position_embeddings=config.max_position_embeddings,
    )


_NO_ATTENTION = SimpleNamespace(
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "q_norm", "rope")),
    qkv=SimpleNamespace(bias=None, parts=()),
    out=SimpleNamespace(bias=None),
)


def _latent(of: LatentAttention) -> SimpleNamespace:
    """What is there of that which other attention has; transformers counts the rotated part alone as a head."""
    return SimpleNamespace(
        num_heads=of.num_heads,
        num_kv_heads=of.num_heads,
        head_dim=of.rope.rotary_dim,
        qkv=SimpleNamespace(bias=of.down[-1].bias, parts=of.queries.parts * 2),
        out=of.out,
        q_norm=None,
        rope=of.rope,
    )


def _mlp(mlp: Gated | Experts) -> tuple[Any, ...]:
    """An MLP's width; of a mixture also how many experts there are and how they are chosen, and the shared one."""
    if isinstance(mlp, Gated):
        return (mlp.down.inputs,)
    how = mlp.routing
    assert how is not None
    shared = None if mlp.shared is None else mlp.shared.down.inputs
    routing = (how.scores, how.renormalise, how.groups, how.top_groups, how.scale)
    return mlp.count, mlp.per_token, mlp.down.inputs, shared, mlp.shared_gate is not None, routing


def mlps_by_transformers(config: Any) -> list[tuple[Any, ...]]:
    """What each layer's MLP is by transformers' configuration, as its modelling code reads it."""
    family = config.model_type
    dense = (getattr(config, "intermediate_size", None),)
    experts = {
        "mixtral": lambda: (
            *(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size),
            *(None, False, ("softmax", True, 1, 1, 1.0)),
        ),
        "qwen2_moe": lambda: (
            *(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size),
            *(config.shared_expert_intermediate_size, True, ("softmax", config.norm_topk_prob, 1, 1, 1.0)),
        ),
        **dict.fromkeys(
            ("qwen3_next", "qwen3_5_moe_text"),
            lambda: (
                *(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size),
                *(config.shared_expert_intermediate_size, True),
                ("softmax", getattr(config, "norm_topk_prob", True), 1, 1, 1.0),
            ),
        ),
        "qwen3_moe": lambda: (
            *(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size),
            *(None, False, ("softmax", config.norm_topk_prob, 1, 1, 1.0)),
        ),
        **dict.fromkeys(
            ("glm4_moe", "deepseek_v3"),
            lambda: (
                *(config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size),
                *(config.moe_intermediate_size * config.n_shared_experts or None, False),
                ("sigmoid", config.norm_topk_prob, config.n_group, config.topk_group, config.routed_scaling_factor),
            ),
        ),
        "gpt_oss": lambda: (
            *(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size),
            *(None, False, ("softmax of chosen", False, 1, 1, 1.0)),
        ),
        "minimax_m2": lambda: (
            *(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size),
            *(None, False, ("sigmoid", True, 1, 1, 1.0)),
        ),
    }.get(family, lambda: dense)()

    def sparse(layer: int) -> bool:
        if hasattr(config, "decoder_sparse_step"):
            return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        return layer >= getattr(config, "first_k_dense_replace", 0)

    return [experts if sparse(layer) else dense for layer in range(config.num_hidden_layers)]
