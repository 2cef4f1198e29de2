"""MXFP4 of gpt-oss' experts (``quant_method: mxfp4``).

    experts.gate_up_proj_blocks  U8 [E, 2I, H/32, 16]   32 values of 4 bits (e2m1) a block, two a byte, low one first
    experts.gate_up_proj_scales  U8 [E, 2I, H/32]       a block's power of two, plus 127
    experts.down_proj_blocks     U8 [E, H, I/32, 16]    …

Rows of gate_up alternate gate, up (transformers 5, ``integrations/mxfp4.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpctl.arch.fields import Fields
from tpctl.arch.formats.skipped import Skipped, is_stack
from tpctl.arch.storage import Axis, Coding, Entry, Storage

BLOCK = 32

STORAGE = Storage(
    "MXFP4",
    (
        Entry("_blocks", "weight", ("U8",), Axis(0), Axis(1, BLOCK, packed=True), (BLOCK // 2,)),
        Entry("_scales", "weight_scale", ("U8", "F8_E8M0"), Axis(0), Axis(1, BLOCK), role="scales"),
    ),
    coding=Coding("e2m1", 4),
)


@dataclass(frozen=True)
class MXFP4:
    """The experts of all layers but ``skipped``."""

    skipped: Skipped
    unused: tuple[str, ...] = ()

    def storage(self, names: Sequence[str]) -> Storage | None:
        return STORAGE if is_stack(names[0]) and not self.skipped.any_of(names) else None


def read(fields: Fields) -> MXFP4:
    key = "modules_to_not_convert"
    return MXFP4(Skipped(fields.names(key)).check(key))
