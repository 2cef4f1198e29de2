"""How much memory a quantised weight takes while it is multiplied by, beside what it is stored in."""

from __future__ import annotations

from tpctl.arch.block import LayerPart
from tpctl.arch.latent import LatentAttention
from tpctl.arch.linear import Linear
from tpctl.arch.storage import Entry


def growth(part: LayerPart, linear: Linear, entry: Entry, stored: int, runs: int) -> int:
    """How many times as many bytes as stored the tensor ``entry`` of ``linear``, of a layer's ``part``, takes.

    Args:
        stored, runs: bits of one of its elements, and of a number of the model's dtype.
    """
    if isinstance(part, LatentAttention) and linear is part.kv_b and linear.storage.coding is not None:
        return int(entry.weights * runs) // stored  # made numbers once, of which scales are no part any more
    return linear.storage.growth(entry)
