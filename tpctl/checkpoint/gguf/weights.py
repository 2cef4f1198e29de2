"""A GGUF's weights as one safetensors file of bfloat16, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tpctl.checkpoint.gguf.block_types import BLOCK_TYPES
from tpctl.checkpoint.gguf.header import GgufError
from tpctl.checkpoint.gguf.model import GgufModel
from tpctl.checkpoint.gguf.tensors import Weight
from tpctl.checkpoint.safetensors import TensorSpec, build_header

if TYPE_CHECKING:
    import numpy as np

_BAND = 1 << 21
"""Values that are held as float32 at a time, unless one row or head has more."""


def write_weights(model: GgufModel, path: Path) -> None:
    """Write the weights of ``model`` to the new file ``path``.

    The ``gguf`` package undoes the quantisation, to float32; what is written is the nearest bfloat16.

    Raises:
        GgufError: a tensor holds values that are not finite, or the package is too old for its type.
        OSError: as the file system says.
    """
    check_types(model)
    header = build_header((TensorSpec(weight.name, "BF16", weight.shape) for weight in model.weights), {"format": "pt"})
    weights = {weight.name: weight for weight in model.weights}
    sources: dict[Path, IO[bytes]] = {}
    try:
        with path.open("xb") as target:
            target.write(header.raw)
            for info in sorted(header.tensors.values(), key=lambda info: info.start):
                weight = weights[info.name]
                if weight.tensor.path not in sources:
                    sources[weight.tensor.path] = weight.tensor.path.open("rb")
                for band in _bands(weight, sources[weight.tensor.path]):
                    target.write(band)
    finally:
        for source in sources.values():
            source.close()


def check_types(model: GgufModel) -> None:
    """Raise ``GgufError`` unless the installed ``gguf`` package can read every type among the tensors."""
    import numpy as np

    for kind in sorted({weight.tensor.type for weight in model.weights}):
        block = BLOCK_TYPES[kind]
        try:
            _numbers(np.zeros((1, block.nbytes), dtype=np.uint8), kind)
        except (NotImplementedError, ValueError):
            raise GgufError(f"its type {block.name} needs a newer gguf package; run `pip install -U gguf`") from None


def _bands(weight: Weight, source: IO[bytes]) -> Iterator[Any]:
    """The bytes of ``weight`` in order, as bfloat16."""
    import numpy as np

    tensor = weight.tensor
    rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
    width = columns // tensor.block.values * tensor.block.nbytes
    if weight.heads and len(tensor.shape) == 1:  # a bias: its one row holds all heads
        rows, columns, width = columns, 1, tensor.block.nbytes
    unit = rows // weight.heads if weight.heads else 1
    step = max(1, _BAND // (unit * columns)) * unit
    source.seek(tensor.start)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        data = np.fromfile(source, dtype=np.uint8, count=count * width)
        if data.size < count * width:
            raise GgufError(f"{tensor.path.name} became shorter while it was read; download it again")
        values = _numbers(data.reshape(count, width), tensor.type)
        if weight.heads:
            values = values.reshape(-1, unit // 2, 2, columns).swapaxes(1, 2)
        if weight.added:
            values = values - np.float32(weight.added)
        yield _bfloat16(np.ascontiguousarray(values), tensor.name)


def _numbers(data: np.ndarray[Any, Any], kind: int) -> Any:
    """float32 [rows, columns] of uint8 [rows, bytes a row]."""
    from gguf import GGMLQuantizationType, dequantize

    return dequantize(data, GGMLQuantizationType(kind))


def _bfloat16(values: np.ndarray[Any, Any], name: str) -> Any:
    """The nearest bfloat16 of float32 values, as uint16; to the even one of two."""
    import numpy as np

    bits = values.view(np.uint32)
    exponent = np.uint32(0x7F800000)
    bad = bool(((bits & exponent) == exponent).any())
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    if bad or bool(((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)).any()):
        raise GgufError(f"tensor {name} holds values that are not finite (NaN or beyond bfloat16); download it again")
    return rounded.astype("<u2")
