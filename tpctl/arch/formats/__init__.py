"""Quantised formats, one file each: what a ``quantization_config`` says of each linear's tensors.

A format gives a ``Scheme``; all else follows from the ``Storage`` that it names for a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpctl.arch.fields import Fields
from tpctl.arch.formats import fp8
from tpctl.arch.formats.scheme import Scheme
from tpctl.errors import CheckpointError, UnsupportedModelError, shown

METHODS: Mapping[str, Callable[[Fields], Scheme]] = {
    "fp8": fp8.read,
}
"""By ``quant_method``."""


def read_scheme(fields: Fields) -> Scheme | None:
    """The scheme of a ``config.json``; ``None``: its weights are floats.

    Raises:
        UnsupportedModelError: of a format that tpctl does not know.
        CheckpointError: it contradicts itself.
    """
    given = {key: fields.mapping(key) for key in ("quantization_config", "compression_config")}
    found = [(key, value) for key, value in given.items() if value]
    if not found:
        return None
    if len(found) > 1 and found[0][1] != found[1][1]:
        raise CheckpointError("config.json has a quantization_config and a compression_config that differ; remove one")
    key, value = found[0]
    method = value.get("quant_method") or value.get("format") or "unknown"
    if method not in METHODS:
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({shown(method)}), which is not supported; tpctl knows "
            f"{', '.join(sorted(METHODS))}; use one of these or its unquantised original"
        )
    return METHODS[method](fields.inside(key))
