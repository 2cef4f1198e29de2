"""FP8 in blocks, as DeepSeek and Qwen publish it (``quant_method: fp8``).

``weight`` e4m3 [N, K] and ``weight_scale_inv`` [ceil(N/128), ceil(K/128)], one factor a block (float32, bfloat16, or
powers of two as e8m0); a value times its block's factor is the weight
(transformers 5, ``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tpctl.arch.fields import Fields
from tpctl.arch.storage import Axis, Entry, Storage
from tpctl.errors import UnsupportedModelError, shown

SCALES = ("F32", "BF16", "F8_E8M0")


@dataclass(frozen=True)
class BlockFP8:
    """All linears but ``kept``, names of modules or patterns of them, are ``stored`` so."""

    stored: Storage
    kept: tuple[str, ...]

    def storage(self, names: Sequence[str]) -> Storage | None:
        return None if any(_names(kept, name) for kept in self.kept for name in names) else self.stored


def read(fields: Fields) -> BlockFP8:
    activation = fields.get("activation_scheme") or "dynamic"
    if activation != "dynamic":
        raise UnsupportedModelError(
            f"config.json: activation_scheme of the quantised weights is {shown(activation)}, tpctl knows dynamic"
        )
    block = fields.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and 0 < n <= 4096 for n in block):
        raise UnsupportedModelError(
            f"config.json: weight_block_size is {shown(block)}, tpctl knows blocks, such as [128, 128]"
        )
    return BlockFP8(block_storage(*block), fields.names("modules_to_not_convert"))


def block_storage(out: int, inp: int, scale: str = "weight_scale_inv") -> Storage:
    """e4m3 with one ``scale`` for each block of ``out`` x ``inp`` features."""
    return Storage(
        f"FP8 in blocks of {out} x {inp}",
        (
            Entry(".weight", "weight", ("F8_E4M3",), Axis(0), Axis(1)),
            Entry(f".{scale}", scale, SCALES, Axis(0, out), Axis(1, inp)),
        ),
    )


def _names(name: str, module: str) -> bool:
    """Whether an entry of ``modules_to_not_convert`` means ``module``: by its whole name, one of the modules that it is
    inside of, or as a pattern from its start."""
    if re.search(rf"(^|\.){re.escape(name)}(\.|$)", module):
        return True
    try:
        return re.match(rf"(?:{name})(\.|$)", module) is not None
    except re.error:
        return False
