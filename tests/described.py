"""What a config says of a whole model, for comparison with what transformers makes of it."""

from __future__ import annotations

from types import SimpleNamespace

from tpctl.arch.config import ModelConfig


def described(config: ModelConfig) -> SimpleNamespace:
    """The sizes and switches that all blocks share; ``windows`` has one entry a layer."""
    blueprint, block = config.blueprint, config.blueprint.blocks[0]
    attention, mlp = block.attention, block.mlp
    return SimpleNamespace(
        model_type=config.model_type,
        hidden_size=blueprint.hidden_size,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=mlp.down.inputs,
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
