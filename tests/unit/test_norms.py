"""What is rounded where, in bfloat16: norms and the embedding's scale, as transformers' own modules do it."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch

from tests.unit.synthetic import make_config
from tpctl.arch.block import Block
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES
from tpctl.arch.linear import Norm
from tpctl.distributed import TPGroup
from tpctl.layers.embedding import VocabParallelEmbedding
from tpctl.layers.norm import RMSNorm
from tpctl.partition.cuts import Range

MODULES = {"kimi_k2": "deepseek_v3"}
TEXTS = sorted(name for name, family in FAMILIES.items() if family.runs and family.inner is None)


def modules(family: str) -> Any:
    name = MODULES.get(family, family.removesuffix("_text"))
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def their_norm(family: str) -> Any:
    found = modules(family)
    own = [one for one in vars(found).values() if isinstance(one, type) and one.__module__ == found.__name__]
    return next(one for one in own if re.fullmatch(r"\w+(RMS|Layer)Norm", one.__name__))


def norms(family: str) -> list[Norm]:
    made_of = ModelConfig.from_dict(make_config(family)).blueprint
    layers = [one for one in made_of.layers if isinstance(one, Block)]
    found = [made_of.norm]
    for layer in layers:
        found += [layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp]
        found += [getattr(layer.attention, name, None) for name in ("q_norm", "k_norm")]
    return list({(one.unit_offset, one.once, one.centred): one for one in found if one is not None}.values())


@pytest.mark.parametrize("family", TEXTS)
def test_norms_round_as_those_of_transformers(family: str) -> None:
    """All of a model are alike. Squares are added in another order, so that one number of many may end on the other
    side of a rounding."""
    (made_of,) = norms(family)
    ours, theirs = RMSNorm.of(made_of, torch.bfloat16, 512), their_norm(family)(512, eps=made_of.eps).bfloat16()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(512, generator=generator).bfloat16()
    ours.weight.data[:] = theirs.weight.data[:] = weight
    x = torch.randn(64, 512, generator=generator).bfloat16()
    assert (ours(x) == theirs(x)).float().mean() > 0.999


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma4_text", "granite"])
def test_embeddings_are_scaled_as_those_of_transformers(family: str) -> None:
    """Gemma's root of the hidden size is rounded to bfloat16 first; Granite's factor is not."""
    factor = {"embedding_multiplier": 12.03} if family == "granite" else {"hidden_size": 72, "head_dim": 12}
    made_of = ModelConfig.from_dict(make_config(family, **factor)).blueprint
    hidden, scale = made_of.hidden_size, made_of.embedding_scale
    rows = torch.randn(100, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    options: Any = {"scale": scale, "rounded": made_of.rounds_scale}
    ours = VocabParallelEmbedding(Range(0, 100), hidden, TPGroup(), torch.bfloat16, **options)
    ours.weight.data[:] = rows
    if family == "granite":
        want = rows * scale
    else:
        own = vars(modules(family))
        kind = next(kind for name, kind in own.items() if re.fullmatch(r"Gemma\dTextScaledWordEmbedding", name))
        theirs = kind(100, hidden, 0, embed_scale=hidden**0.5).bfloat16()
        theirs.weight.data[:] = rows
        want = theirs(torch.arange(100))
    assert torch.equal(ours(torch.arange(100)), want)
    assert scale != torch.tensor(scale).bfloat16().item()
