"""GPTQ in 4 or 8 bits (``quant_method: gptq``).

    qweight  I32 [K/8, N]             eight inputs a word (four of 8 bits), lowest first
    qzeros   I32 [ceil(K/g), N/8]     eight outputs a word
    scales   [ceil(K/g), N]
    g_idx    I32 [K]                  the group of each input; a weight is (value - zero) * scale of its group

The first format stores a zero less one, the second as it is.

In groups as they come, a rank has the groups of its inputs, and ``g_idx`` counts them from the weight's first. With
``desc_act`` an input may be of any group, and every rank has the zeros and scales of all
(ModelCloud/GPTQModel, ``nn_modules/qlinear``; vLLM 0.33, ``quantization/auto_gptq.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.arch.fields import Fields
from tpctl.arch.formats.awq import BIAS, FLOATS, NEVER, group_size, grouped, in_groups
from tpctl.arch.storage import ALL, Axis, Coding, Entry, Storage
from tpctl.errors import CheckpointError, UnsupportedModelError, shown

FORMATS = ("gptq", "gptq_v2")
"""Which differ in what a zero of 0 stands for."""

BITS = (4, 8)
_BESIDE = {"rotation": "which turns inputs, too", "adapter": "which tpctl does not apply"}
"""What GPTQModel may have done beside quantising."""
_MEANT = ("bits", "group_size", "desc_act")


@dataclass(frozen=True)
class GPTQ:
    """Linears are ``stored`` so; those that one of ``rules`` (patterns of their names, the first counts) matches are
    stored as it says, ``None``: as floats. With ``only``, no others are quantised than those whose names end so.
    """

    stored: Storage
    rules: tuple[tuple[re.Pattern[str], Storage | None], ...]
    only: tuple[str, ...]
    unused: tuple[str, ...] = ()

    def storage(self, names: Sequence[str]) -> Storage | None:
        if any(name.endswith(NEVER) for name in names):
            return None
        for pattern, storage in self.rules:
            if any(pattern.match(name) for name in names):
                return storage
        if self.only and not any(name.endswith(self.only) for name in names):
            return None
        return self.stored


def read(fields: Fields) -> GPTQ:
    if (kind := _kind(fields)) not in FORMATS:
        raise UnsupportedModelError(
            f"config.json: the weights are GPTQ in the format {shown(kind)}, tpctl knows {' and '.join(FORMATS)}; save "
            "the model in one of these"
        )
    for key, what in _BESIDE.items():
        if fields.get(key):
            raise UnsupportedModelError(
                f"config.json: GPTQ's weights have {key} {shown(fields.get(key))}, {what}; use a checkpoint without, "
                "or the unquantised original"
            )
    if fields.get("lm_head") is True:
        raise UnsupportedModelError("config.json: GPTQ has quantised lm_head, tpctl cuts one of floats")
    rules = []
    for pattern, changes in fields.mapping("dynamic").items():
        rules.append(_rule(fields, pattern, changes))
    return GPTQ(_storage(fields), tuple(rules), _only(fields))


def _kind(fields: Fields) -> Any:
    return fields.get("checkpoint_format") or fields.get("format") or "gptq"


def _rule(fields: Fields, pattern: str, changes: Any) -> tuple[re.Pattern[str], Storage | None]:
    """An entry of ``dynamic``, as GPTQModel reads it: "-:" before a pattern leaves modules out, "+:" or nothing gives
    them other settings."""
    try:
        compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise CheckpointError(f"config.json: dynamic has {shown(pattern)}, which is no pattern: {error}") from None
    if pattern.startswith("-:"):
        return compiled, None
    if not isinstance(changes, dict):
        raise CheckpointError(
            f"config.json: dynamic has {shown(changes)} for {shown(pattern)}, but an object is needed"
        )
    meant = {key: value for key, value in changes.items() if key in _MEANT}
    return compiled, _storage(fields.within({**fields.values, **meant}))


def _only(fields: Fields) -> tuple[str, ...]:
    """Optimum's ``modules_in_block_to_quantize``: a list of lists of names."""
    key = "modules_in_block_to_quantize"
    value = fields.get(key)
    together = [name for one in value for name in one] if _is_nested(value) else value
    return tuple(f".{name}" for name in fields.within({key: together}).names(key))


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) for one in value)


def _storage(fields: Fields) -> Storage:
    bits = fields.whole("bits", most=64)
    if bits not in BITS:
        raise UnsupportedModelError(
            f"config.json: the weights are GPTQ of {bits} bits, tpctl knows {' and '.join(map(str, BITS))}"
        )
    ordered = fields.get("desc_act") is not None and fields.flag("desc_act")
    size = group_size(fields)
    word, groups = 32 // bits, grouped(size, 0, dealt=not ordered)
    return Storage(
        f"GPTQ of {bits} bits {in_groups(size)}{' in order of activation' if ordered else ''}",
        (
            Entry(".qweight", "qweight", ("I32",), Axis(1), Axis(0, word, packed=True)),
            Entry(".qzeros", "qzeros", ("I32",), Axis(1, word, packed=True), groups, role="zeros"),
            Entry(".scales", "scales", FLOATS, Axis(1), groups, role="scales"),
            Entry(".g_idx", "g_idx", ("I32",), None, Axis(0), role="order"),
            BIAS,
        ),
        ordered=None if ordered else (".g_idx", ALL if size is None else size),
        coding=Coding("uint", bits, above=0 if _kind(fields) == "gptq_v2" else 1),
    )
