"""What belongs to other models: fields of a config and names of tensors that the supported families do not have.

transformers would leave such a field unread, and a model that was trained with it would answer wrongly without a word.
Fields that change no result (dropout, caches, training, generation) are not listed here and may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tpctl.errors import UnsupportedModelError, shown

_EXPERTS, _MLA, _ADAPTER = "a mixture of experts", "latent attention (MLA)", "an adapter (LoRA)"

_FIELDS: Mapping[str, tuple[Any, ...]] = {
    # Caps, where 0 is none.
    r".*soft_?cap(ping)?|clip_qkv": (0,),
    # Scales, where 1 is none.
    r"(?!ffn_dim_).*_multipliers?|logits?_scal(e|ing)|scale_(emb|depth)": (1,),
    r"(embed|embedding|residual|attention|softmax)_scale|rope_condense_ratio": (1,),
    r"query_pre_attn_scalar|dim_model_base": (),
    # Attention of other kinds.
    r"(use_)?qk_(layer)?norm|attn_output_gate|attn_temperature_tuning|add_cross_attention|alibi": (),
    r"attention_chunk_size|no_rope_layer_interval|num_kv_shared_layers": (0,),
    r"rotary_pct|rotary_percentage|rope_percent|sliding_window_pattern": (0, 1),
    r"use_bidirectional_attention|is_encoder_decoder|rope_interleaved|cross_attention_layers|no_rope_layers": (),
    r"is_causal": (True,),
    # Blocks of other kinds.
    r"use_parallel_residual|parallel_attn|scale_embedding|per_layer_config": (),
    r"attention_k_eq_v|enable_moe_block|use_double_wide_mlp": (),
    r"hidden_size_per_layer_input": (0,),
    r"hidden_activation": ("silu", "swish"),
    r"num_(local_|routed_)?experts|n_(routed|shared)_experts|num_experts_per_tok|moe_intermediate_size": (0, 1),
    r"(n|topk)_group|routed_scaling_factor": (0, 1),
    r"shared_expert_intermediate_size|first_k_dense_replace": (0,),
    r"(kv|q)_lora_rank": (0,),
    # transformers reads the weights from the file that this names.
    r"transformers_weights": ("model.safetensors",),
}
"""Patterns of fields, and their values that change nothing, besides null, false and empty ones."""

_KINDS: Mapping[str, str] = {
    r".*expert.*|moe_intermediate_size|(n|topk)_group|routed_scaling_factor|first_k_dense_replace": _EXPERTS,
    r"(kv|q)_lora_rank": _MLA,
}

_QUANTISED: Mapping[str, str] = {
    r".*\.g_idx": "GPTQ",
    r".*\.(qweight|qzeros|scales)": "AWQ or GPTQ",
    r".*\.(weight_packed|weight_shape|weight_global_scale|input_global_scale)": "compressed-tensors",
    r".*\.(weight|input|output)_zero_point": "compressed-tensors",
    r".*\.weight_scale_2": "NVFP4",
    r".*\.weight_scale_inv": "FP8 in blocks",
    r".*\.(weight_scale|input_scale|output_scale|[kv]_scale)": "FP8 or compressed-tensors",
    r".*\.(scale_(weight|input)|(act|activation|input_act|weight_act)_scale|scale)": "FP8 or integers with scales",
    r".*_proj_(blocks|scales)": "MXFP4",
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB)": "bitsandbytes",
    r".*\.W_q": "HQQ",
}
_OTHERS: Mapping[str, str] = {
    r".*\.lora_(A|B|magnitude_vector|embedding_A|embedding_B)\b.*": _ADAPTER,
    r".*\.(experts|block_sparse_moe|shared_experts?)\..*|.*\.mlp\.(gate|router)\.weight": _EXPERTS,
    r".*\.(kv_a_proj_with_mqa|kv_b_proj|q_a_proj)\..*": _MLA,
    r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\..*": "a model of images or sound",
}


def check_fields(raw: Mapping[str, Any], architecture: str, head_dim: int) -> None:
    """Refuse a config with a field that ``architecture`` does not have and that would change its results.

    Raises:
        UnsupportedModelError: there is one; the message names it.
    """
    for key, value in raw.items():
        neutral = neutral_values(key)
        if neutral is None or _says_nothing(key, value, neutral, head_dim):
            continue
        kind = next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, key)), None)
        what = f"it belongs to {kind}" if kind else "left out, it could change every result"
        raise UnsupportedModelError(
            f"config.json: {key} is {shown(value)}, which {architecture} does not have; {what}. "
            "Correct model_type, or remove the field if it has no meaning"
        )


def neutral_values(key: str) -> tuple[Any, ...] | None:
    """Values of a field of other families that change nothing; ``None``: this module knows no such field."""
    return next((values for pattern, values in _FIELDS.items() if re.fullmatch(pattern, key)), None)


def _says_nothing(key: str, value: Any, neutral: tuple[Any, ...], head_dim: int) -> bool:
    if value is None or value in neutral:
        return True
    if value is False:
        return key != "is_causal"
    if isinstance(value, list | dict) and not value:
        return True
    if key == "no_rope_layers":  # 1 for a layer that has RoPE
        return isinstance(value, list) and all(one == 1 for one in value)
    return key == "query_pre_attn_scalar" and bool(value == head_dim)


def check_tensors(names: Iterable[str], told: bool = False, own: Iterable[str] = ()) -> None:
    """Refuse a checkpoint of which ``names``, tensors that the plan does not know, show what else it is.

    Args:
        told: its config has a ``quantization_config``.
        own: tensors that the plan does know: of a kind of which it has some, more show nothing.

    Raises:
        UnsupportedModelError: it is quantised, an adapter or a model of another kind; the message says what, and names
            a tensor that shows it.
    """
    names = sorted(names)
    for table in (_QUANTISED, _OTHERS):
        for pattern, kind in table.items():
            matches = re.compile(pattern).fullmatch
            found = next(filter(matches, names), None)
            if found is None or (table is _OTHERS and any(map(matches, own))):
                continue
            if table is _QUANTISED and told:
                raise UnsupportedModelError(
                    f"the checkpoint holds {found} ({kind}), but by the quantization_config of config.json it has no "
                    "such tensor; the two do not belong together, or what it is of cannot be cut quantised (as lm_head)"
                )
            if table is _QUANTISED:
                raise UnsupportedModelError(
                    f"the checkpoint is quantised ({kind}: it holds {found}), but config.json has no "
                    "quantization_config; take the config.json that belongs to it, or its unquantised original"
                )
            if kind in (_EXPERTS, _MLA):  # which tpctl knows, of other configs
                raise UnsupportedModelError(
                    f"the checkpoint is {kind} (it holds {found}), but by config.json it has no such tensor; "
                    "the two do not belong together"
                )
            advice = "; merge it into its base model first" if kind == _ADAPTER else ""
            raise UnsupportedModelError(f"the checkpoint is {kind} (it holds {found}), which is not supported{advice}")
