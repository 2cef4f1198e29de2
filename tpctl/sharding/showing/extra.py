"""What a shard folder has beside the model: tensors that no rank needs, grouped for a list that people read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tpctl.sharding.showing.report import ExtraReport


@dataclass(frozen=True)
class ExtraGroup:
    """Tensors whose names differ in numbers alone: ``shape`` and ``dtype`` are in words where they differ too."""

    name: str
    dtype: str
    shape: str
    count: int
    nbytes: int


def apart(extra: Sequence[ExtraReport]) -> list[ExtraGroup]:
    """``extra`` in groups, in its order. ``N`` in a name stands for a number that several of them have."""
    groups: dict[str, list[ExtraReport]] = {}
    for one in extra:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", one.name), []).append(one)
    return [
        ExtraGroup(
            name if len(found) > 1 else found[0].name,
            ", ".join(sorted({one.dtype for one in found})),
            " or ".join(sorted({str(list(one.shape)) for one in found})[:3]),
            len(found),
            sum(one.nbytes for one in found),
        )
        for name, found in groups.items()
    ]
