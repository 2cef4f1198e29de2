"""Models that see or hear beside a text model, which is cut alone: what they are to the family of that text model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tpctl.arch.blueprint import ROOT, Blueprint
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields

ROOTS = ("language_model.model.", "model.language_model.", ROOT)
"""What stands before the names of the text model's tensors: the first are those of published files."""


def seeing(architecture: str, texts: Mapping[str, Family], towers: tuple[str, ...]) -> Family:
    """The family of a model that also sees or hears.

    Args:
        architecture: the class name that its ``config.json`` lists.
        texts: what its text model may be, by the ``model_type`` in ``text_config``; the first where there is none.
        towers: the modules that see or hear, beside ``language_model``.
    """
    found = {kind: _with_towers(architecture, text, towers) for kind, text in texts.items()}
    return replace(next(iter(found.values())), texts=found)


def _with_towers(architecture: str, text: Family, towers: tuple[str, ...]) -> Family:
    def describe(fields: Fields, sizes: Sizes) -> Blueprint:
        pattern = rf"(model\.)?({'|'.join(towers)})\..*"
        return replace(text.describe(fields, sizes), roots=ROOTS, towers=(pattern,))

    return replace(text, architecture=architecture, inner="text_config", describe=describe)
