"""The ways to quantise, and the ``quantization_config`` that tells loaders of each.

The format is compressed-tensors' (https://github.com/vllm-project/compressed-tensors), the schemes are its presets
FP8_DYNAMIC, FP8_BLOCK and W4A16, the last also in groups of 64 and 32, which vLLM's Marlin kernels read too
(``MARLIN_SUPPORTED_GROUP_SIZES``), and the configuration has the fields and values that its ``QuantizationConfig``
gives when llm-compressor saves a model. Tests hold all of it against the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FORMAT_RELEASE = "0.20.1"
"""The release of compressed-tensors whose format this is."""

BLOCK = 128
"""Columns, and of blocks also rows, that share a scale."""


class Method(StrEnum):
    """What the user can ask for."""

    FP8 = "fp8"
    FP8_BLOCK = "fp8-block"
    INT4 = "int4"
    INT4_G64 = "int4-g64"
    INT4_G32 = "int4-g32"


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight [N, K] is stored, and what its inputs are quantised to where it runs.

    Attributes:
        layout: the name of the format of its tensors.
        bits: of a number.
        kind: ``float`` (e4m3fn) or ``int`` (two's complement; stored with 8 added).
        limit: a cell's scale is its largest magnitude divided by this.
        rows, columns: of the cell that shares a scale; ``None`` is a whole row.
        strategy, grid: the name of that cell, and the fields that give its size.
        inputs: the fields of the inputs' quantisation; ``None`` keeps them.
    """

    layout: str
    bits: int
    kind: str
    limit: float
    rows: int
    columns: int | None
    strategy: str
    grid: Mapping[str, Any]
    inputs: Mapping[str, Any] | None

    def cells(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of a weight of ``shape``."""
        rows, columns = shape
        return -(-rows // self.rows), 1 if self.columns is None else -(-columns // self.columns)


def _int4(group: int) -> Scheme:
    return Scheme(
        layout="pack-quantized",
        bits=4,
        kind="int",
        limit=7.5,
        rows=1,
        columns=group,
        strategy="group",
        grid={"group_size": group},
        inputs=None,
    )


SCHEMES: Mapping[Method, Scheme] = {
    Method.FP8: Scheme(
        layout="float-quantized",
        bits=8,
        kind="float",
        limit=448.0,
        rows=1,
        columns=None,
        strategy="channel",
        grid={"group_size": None},
        inputs={"strategy": "token", "group_size": None},
    ),
    Method.FP8_BLOCK: Scheme(
        layout="float-quantized",
        bits=8,
        kind="float",
        limit=448.0,
        rows=BLOCK,
        columns=BLOCK,
        strategy="block",
        grid={"group_size": None, "block_structure": [BLOCK, BLOCK]},
        inputs={"strategy": "group", "group_size": BLOCK},
    ),
    Method.INT4: _int4(BLOCK),
    Method.INT4_G64: _int4(64),
    Method.INT4_G32: _int4(32),
}


def quantization_config(method: Method, ignore: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says of a model quantised by ``method``, but for the linears named in ``ignore``."""
    scheme = SCHEMES[method]
    numbers = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": True}
    inputs = None if scheme.inputs is None else {**numbers, **scheme.inputs, "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": scheme.strategy, **scheme.grid, "dynamic": False},
        "input_activations": inputs,
        "output_activations": None,
        "format": scheme.layout,
    }
    return {
        "version": FORMAT_RELEASE,
        "quant_method": "compressed-tensors",
        "format": scheme.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }
