"""The model families that tpctl knows, one file each, by the ``model_type`` of a ``config.json``."""

from __future__ import annotations

from tpctl.arch.families import (
    cohere2,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    granite,
    llama,
    ministral3,
    mistral,
    mistral3,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from tpctl.arch.family import Family

FAMILIES: dict[str, Family] = {
    "cohere2": cohere2.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.SEEING,
    "gemma3_text": gemma3.FAMILY,
    "gemma4": gemma4.FAMILY,
    "gemma4_text": gemma4.TEXT,
    "gemma4_unified": gemma4.UNIFIED,
    "gemma4_unified_text": gemma4.UNIFIED_TEXT,
    "glm4": glm4.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "ministral3": ministral3.FAMILY,
    "mistral": mistral.FAMILY,
    "mistral3": mistral3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "phi3": phi3.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "smollm3": smollm3.FAMILY,
}
