"""Tiny models whose answers repeat themselves, so that drafts hold, and hang on all before, so that some do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import FAMILIES, make_checkpoint, make_mixture

_OUT = ("o_proj", "out_proj", "down_proj")


def make_looping(name: str, folder: Path, damp: float = 0.3, **changes: Any) -> Any:
    """Save a random float32 checkpoint of ``FAMILIES[name]`` or ``MIXTURES[name]`` in ``folder``; the transformers
    model, in eval mode.

    By the embedding alone one of four tokens would follow the one before, in a circle; layers change that by as much as
    ``damp`` says.
    """
    make = make_checkpoint if name in FAMILIES else make_mixture
    model = make(name, folder, **{**changes, "tie_word_embeddings": False})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in _OUT):
                parameter *= damp
        embedding = model.model.embed_tokens.weight
        token = torch.arange(len(embedding))
        before = token // 4 * 4 + (token - 1) % 4
        model.lm_head.weight.copy_(embedding[torch.where(before < len(embedding), before, token)])
    model.save_pretrained(folder, save_original_format=True)
    return model
