"""What packers of quantised weights are made of.

A packer gives the tensors of a linear [N, K] and the matrix that they mean, found without unpacking them; ``read`` is a
reference that unpacks the tensors of a rank, which begin somewhere inside the whole ones. Indices: n outputs, k inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = NDArray[np.int64]
Matrix = NDArray[np.float32]
ONE = np.zeros(1, np.int64)


class Held:
    """The tensors of a part of a linear, each with the place in the whole one where it begins."""

    def __init__(self, tensors: Mapping[str, tuple[NDArray[Any], tuple[int, ...]]]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, *index: Index) -> NDArray[Any]:
        """Entries by their places in the whole tensor; indices of fewer axes leave the last ones whole."""
        array, start = self.tensors[name]
        places = [one - first for one, first in zip(index, start, strict=False)]
        assert all((one >= 0).all() for one in places), name
        return array[np.ix_(*places)]


@dataclass(frozen=True)
class Packer:
    """A format.

    Attributes:
        config: a model's ``quantization_config``.
        values: the tensor of the values, and of its axes along outputs and inputs the number and the unit.
        pack: gives the tensors of a linear of N outputs and K inputs by suffix, and the matrix.
        read: gives the matrix of some outputs and inputs.
    """

    config: dict[str, Any]
    values: tuple[str, tuple[int, int], tuple[int, int]]
    pack: Callable[[int, int, torch.Generator], tuple[dict[str, Tensor], Tensor]]
    read: Callable[[Held, Index, Index], Matrix]


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Floats as float32, integers as they are; words without their sign."""
    if tensor.dtype == torch.int32:
        return tensor.numpy().astype(np.int64) & 0xFFFFFFFF
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def expanded(scales: Tensor, out: int, inp: int, n: int, k: int) -> Tensor:
    """A factor for every weight, of ones for each ``out`` outputs and ``inp`` inputs."""
    return scales.float().repeat_interleave(out, 0)[:n].repeat_interleave(inp, 1)[:, :k]


def ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def randint(top: int, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(0, top, shape, generator=rng)


def factors(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng) + 0.5


def e4m3(n: int, k: int, rng: torch.Generator) -> Tensor:
    return torch.randn((n, k), generator=rng).to(torch.float8_e4m3fn)


def words(values: Tensor, bits: int, dim: int, order: NDArray[np.int64] | None = None) -> Tensor:
    """``values`` (below 2**bits) packed along ``dim`` into I32, lowest bits first."""
    per = 32 // bits
    moved = values.movedim(dim, -1).long()
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % per)).unflatten(-1, (-1, per))
    if order is not None:
        moved = moved[..., torch.from_numpy(order)]
    packed = (moved << (torch.arange(per) * bits)).sum(-1)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def unpacked(held: NDArray[np.int64], places: Index, bits: int, axis: int) -> NDArray[np.int64]:
    """What is at ``places`` of the words ``held``."""
    shape = [1, 1]
    shape[axis] = -1
    found: NDArray[np.int64] = (held >> (places * bits).reshape(shape)) & ((1 << bits) - 1)
    return found
