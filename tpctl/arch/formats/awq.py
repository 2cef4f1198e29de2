"""AWQ in 4 bits, as AutoAWQ's GEMM version packs it (``quant_method: awq``).

    qweight  I32 [K, N/8]      eight outputs a word, in nibbles 0 2 4 6 1 3 5 7 from the lowest on
    qzeros   I32 [ceil(K/g), N/8], packed alike
    scales   [ceil(K/g), N]    a weight is (value - zero) * scale of its group of g inputs

(casper-hansen/AutoAWQ, ``modules/linear/gemm.py``; transformers 5, ``integrations/awq.py``.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tpctl.arch.fields import Fields
from tpctl.arch.formats.skipped import Skipped
from tpctl.arch.storage import ALL, Axis, Coding, Entry, Storage
from tpctl.errors import UnsupportedModelError, shown

FLOATS = ("F16", "BF16", "F32")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs a word's nibbles are of, from the lowest on."""

NEVER = "shared_expert_gate"
"""A linear of one output, which no word of eight can hold."""

BIAS = Entry(".bias", "bias", None, Axis(0), optional=True, role="bias")
"""Some packers write one for every linear."""


@dataclass(frozen=True)
class AWQ:
    """All linears but ``skipped`` are ``stored`` so."""

    stored: Storage
    skipped: Skipped
    unused: tuple[str, ...] = ()

    def storage(self, names: Sequence[str]) -> Storage | None:
        apart = any(name.endswith(NEVER) or self._is_inside(name) for name in names)
        return None if apart or self.skipped.any_of(names) else self.stored

    def _is_inside(self, module: str) -> bool:
        """AutoAWQ, which wrote the list, also means what is inside of a module that it names."""
        return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) for name in self.skipped.names)


def read(fields: Fields) -> AWQ:
    version = fields.get("version") or fields.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnsupportedModelError(
            f"config.json: the weights are AWQ of version {shown(version)}, tpctl knows gemm; use a checkpoint of that "
            "version"
        )
    bits = fields.get("bits") if fields.get("bits") is not None else fields.get("w_bit")
    if bits is not None and bits != 4:
        raise UnsupportedModelError(f"config.json: the weights are AWQ of {shown(bits)} bits, tpctl knows 4")
    if fields.get("zero_point") is False:
        raise UnsupportedModelError("config.json: the weights are AWQ without zero points, tpctl knows it with them")
    size = group_size(fields, "group_size" if fields.get("group_size") is not None else "q_group_size")
    key = "modules_to_not_convert"
    return AWQ(_storage(size), Skipped(fields.names(key)).check(key))


def group_size(fields: Fields, key: str = "group_size", default: int = 128) -> int | None:
    """How many inputs share a scale; ``None``: all of them, which a config has as -1."""
    value = fields.get(key)
    if value == -1 and value is not True:
        return None
    return default if value is None else fields.whole(key)


def grouped(size: int | None, dim: int, *, dealt: bool = True) -> Axis:
    """The axis of what there is one of for each group of ``size`` inputs."""
    return Axis(dim, ALL, dealt=False) if size is None else Axis(dim, size, dealt=dealt)


def in_groups(size: int | None) -> str:
    return "by channel" if size is None else f"in groups of {size}"


def _storage(size: int | None) -> Storage:
    packed, groups = Axis(1, 8, packed=True), grouped(size, 0)
    return Storage(
        f"AWQ {in_groups(size)}",
        (
            Entry(".qweight", "qweight", ("I32",), packed, Axis(0)),
            Entry(".qzeros", "qzeros", ("I32",), packed, groups, role="zeros"),
            Entry(".scales", "scales", FLOATS, Axis(1), groups, role="scales"),
            BIAS,
        ),
        coding=Coding("uint", 4, order=ORDER),
    )
