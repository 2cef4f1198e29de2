"""The model families that tpctl knows, one file each, by the ``model_type`` of a ``config.json``."""

from __future__ import annotations

from tpctl.arch.families import (
    deepseek_v3,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from tpctl.arch.family import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v3": deepseek_v3.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "llama": llama.FAMILY,
    "minimax_m2": minimax_m2.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_moe": qwen3_5.MOE,
    "qwen3_5_moe_text": qwen3_5.MOE_TEXT,
    "qwen3_5_text": qwen3_5.TEXT,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_next": qwen3_next.FAMILY,
    "phi3": phi3.FAMILY,
}
