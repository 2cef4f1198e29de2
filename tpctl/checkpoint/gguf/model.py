"""What a GGUF model will be converted to, known and checked from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpctl.checkpoint.gguf.config import architecture, build_config
from tpctl.checkpoint.gguf.metadata import Metadata
from tpctl.checkpoint.gguf.parts import read_parts
from tpctl.checkpoint.gguf.tensors import Weight, match_tensors
from tpctl.checkpoint.gguf.vocabulary import Vocabulary

_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""Recommended sampling, under ``general.sampling``, and transformers' names of it."""


@dataclass(frozen=True)
class GgufModel:
    """A model that can be converted. ``config`` and ``generation`` are those of ``config.json`` and
    ``generation_config.json``."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    vocabulary: Vocabulary
    weights: tuple[Weight, ...]

    @classmethod
    def read(cls, path: Path) -> GgufModel:
        """Read the headers of the model that ``path`` is a file of.

        Raises:
            GgufError: it cannot be converted; nothing was written.
            SourceError: a file cannot be read.
        """
        values, tensors = read_parts(path)
        metadata = Metadata(values)
        arch = architecture(metadata)
        config = build_config(metadata, arch, tensors)
        vocabulary = Vocabulary.read(metadata)
        metadata.only(".vocab_size", len(vocabulary.tokens))
        metadata.ignore("split.no", "split.count", "split.tensors.count")
        metadata.check_understood()
        weights = match_tensors(arch, config, len(vocabulary.tokens), tensors)
        ends = list(vocabulary.ends)
        ids = {
            "bos_token_id": vocabulary.special.get("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": vocabulary.special.get("pad"),
        }
        sampling = {
            name: metadata.integer(key) if name == "top_k" else metadata.number(key)
            for given, name in _SAMPLING.items()
            if metadata.has(key := f"general.sampling.{given}")
        }
        generation = {**ids, **({"do_sample": True, **sampling} if sampling else {})}
        return cls({**config, **ids, "vocab_size": len(vocabulary.tokens)}, generation, vocabulary, weights)

    @property
    def nbytes(self) -> int:
        """Size of the weights as bfloat16."""
        return sum(2 * prod(weight.shape) for weight in self.weights)
