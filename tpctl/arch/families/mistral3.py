"""Mistral Small 3.1 and 3.2 and Ministral 3, which see: Mistral or Ministral 3 beside Pixtral's tower."""

from __future__ import annotations

from tpctl.arch.families import ministral3, mistral
from tpctl.arch.seeing import seeing

FAMILY = seeing(
    "Mistral3ForConditionalGeneration",
    {"mistral": mistral.FAMILY, "ministral3": ministral3.FAMILY},
    ("vision_tower", "multi_modal_projector"),
)
