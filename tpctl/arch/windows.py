"""Which layers of a model have a sliding window, from the fields that families share."""

from __future__ import annotations

from tpctl.arch.fields import Fields
from tpctl.errors import CheckpointError, UnsupportedModelError, counted, shown

Windows = tuple[int | None, ...]
"""Each layer's window in tokens, the token itself counted; ``None``: it has none."""

SLIDING, FULL = "sliding_attention", "full_attention"
_KINDS = (FULL, SLIDING)


def no_window(fields: Fields, num_layers: int, longest: int, architecture: str) -> Windows:
    """Of a family that has none. ``longest``: positions that the model takes."""
    kinds = layer_kinds(fields, num_layers)
    refuse_window(fields, longest, architecture)
    if kinds is not None and SLIDING in kinds:
        raise CheckpointError("config.json: layer_types names sliding_attention, but no sliding_window is in use")
    return (None,) * num_layers


def refuse_window(fields: Fields, longest: int, architecture: str) -> None:
    """Refuse a window that hides something, of a family that has none. ``longest``: positions that the model takes."""
    window = fields.optional_whole("sliding_window")
    # transformers masks nothing by it, but its cache drops what lies further back, once an answer is generated.
    if window is not None and window < longest:
        raise UnsupportedModelError(
            f"config.json: sliding_window is {window}, which {architecture} does not have, and engines "
            f"differ in what they make of it; set it to null, or to the model's {longest} positions or more"
        )


def one_window(fields: Fields, num_layers: int, architecture: str, *, used: bool = True) -> Windows:
    """Of a family whose ``sliding_window`` applies to every layer where it is set, and ``used``."""
    kinds, window = layer_kinds(fields, num_layers), fields.optional_whole("sliding_window") if used else None
    if kinds is None:
        return (window,) * num_layers
    if window is None and SLIDING in kinds:
        raise CheckpointError("config.json: layer_types names sliding_attention, but no sliding_window is in use")
    if window is not None and FULL in kinds:
        raise UnsupportedModelError(
            f"config.json: layer_types names full_attention, but {architecture} has its sliding_window "
            f"({window}) in every layer; remove layer_types, or correct model_type"
        )
    return (window,) * num_layers


def upper_windows(fields: Fields, num_layers: int) -> Windows:
    """Of a family with ``use_sliding_window``: in the layers of ``layer_types``, else from ``max_window_layers`` on."""
    kinds = layer_kinds(fields, num_layers)
    window = fields.optional_whole("sliding_window") if fields.flag("use_sliding_window") else None
    if kinds is None:
        first = fields.whole("max_window_layers", least=0) if window is not None else 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and SLIDING in kinds:
        raise CheckpointError("config.json: layer_types names sliding_attention, but no sliding_window is in use")
    return by_kind(kinds, window)


def full_every(count: int, num_layers: int) -> list[str]:
    """The layers' kinds where no ``layer_types`` says them: each ``count``-th has full attention."""
    return [SLIDING if (layer + 1) % count else FULL for layer in range(num_layers)]


def mixed_windows(fields: Fields, kinds: list[str]) -> Windows:
    """Of a family whose ``sliding_window`` is that of the layers that ``kinds`` calls sliding."""
    window = fields.optional_whole("sliding_window")
    if window is None and SLIDING in kinds:
        raise CheckpointError("config.json: layers have sliding attention, but no sliding_window is in use")
    return by_kind(kinds, window)


def by_kind(kinds: list[str], window: int | None) -> Windows:
    """``window`` in the layers that ``layer_types`` calls sliding."""
    return tuple(window if kind == SLIDING else None for kind in kinds)


def layer_kinds(fields: Fields, num_layers: int, known: tuple[str, ...] = _KINDS) -> list[str] | None:
    """The kind of every layer, one of ``known``, where ``layer_types`` says it."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise fields.wrong("layer_types", "a list")
    if unknown := [kind for kind in kinds if kind not in known]:
        names = " and ".join(kind.removesuffix("_attention") for kind in known)
        raise UnsupportedModelError(f"layer type {shown(unknown[0])} is not supported; tpctl knows {names} attention")
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"config.json: layer_types has {counted(len(kinds), 'kind')} for {counted(num_layers, 'layer')}"
        )
    return kinds
