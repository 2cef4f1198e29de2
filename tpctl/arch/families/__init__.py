"""The model families that tpctl knows, one file each, by the ``model_type`` of a ``config.json``."""

from __future__ import annotations

from tpctl.arch.families import gemma3, llama, mistral, phi3, qwen2, qwen3, qwen3_moe
from tpctl.arch.family import Family

FAMILIES: dict[str, Family] = {
    "gemma3_text": gemma3.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "phi3": phi3.FAMILY,
}
