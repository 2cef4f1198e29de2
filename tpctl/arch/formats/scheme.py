"""What a format says of the linears of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tpctl.arch.storage import Storage


class Scheme(Protocol):
    """A checkpoint's format."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Names, less a layer's prefix, of what a checkpoint may hold of it in any layer and no rank needs."""
        ...

    def storage(self, names: Sequence[str]) -> Storage | None:
        """How the weight of a linear is stored; ``None``: as floats.

        Args:
            names: of the module (``model.layers.0.self_attn.q_proj``); files name one and the same by several roots.
                Experts that a checkpoint stacks are ``…mlp.experts.gate_up_proj``, others have a number in theirs.

        Raises:
            UnsupportedModelError: in a way that tpctl does not know.
        """
        ...
