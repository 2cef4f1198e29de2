"""Instructions of PTX whose operands are numbers, for all threads of a program at once (`threads`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.gpu.assembly import as_floats


def e4m3_pair(codes: Any) -> Any:
    """Two FP8 numbers, of 16 bits, as a word of float16, which holds every one of them."""
    numbers = torch.from_numpy(np.ascontiguousarray(codes, np.uint32).astype(np.uint16)).view(torch.float8_e4m3fn)
    return numbers.to(torch.float16).numpy().view(np.uint32)


def half_pair(high: Any, low: Any) -> Any:
    """Numbers as a word of float16."""
    rounded = (one.astype(np.float16).view(np.uint16).astype(np.uint32) for one in (low, high))
    return next(rounded) | next(rounded) << 16


def halves(operation: Callable[..., Any], *words: Any) -> Any:
    """Of two float16 numbers each, rounded once."""
    found = np.zeros(len(words[0]), np.uint32)
    for shift in (0, 16):
        given = ((one >> shift).astype(np.uint16).view(np.float16).astype(np.float64) for one in words)
        found |= operation(*given).astype(np.float16).view(np.uint16).astype(np.uint32) << shift
    return found


FLOATS: dict[str, Callable[..., Any]] = {
    "mul.f32": lambda a, b: a * b,
    "add.f32": lambda a, b: a + b,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}
HALVES: dict[str, Callable[..., Any]] = {"fma.rn.f16x2": lambda a, b, c: a * b + c, "add.rn.f16x2": lambda a, b: a + b}


def product(a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
    """mma.m16n8k16: registers of 16 x 16, 16 x 8 and 16 x 8 numbers, by the threads of each warp."""
    results = [one.copy() for one in c]
    row, pair = np.arange(32) // 4, np.arange(32) % 4 * 2
    halves = [[as_floats((word >> shift).astype(np.uint16)) for shift in (0, 16)] for word in (*a, *b)]
    for start in range(0, len(c[0]), 32):
        warp = slice(start, start + 32)
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for i in range(2):
            for word, (down, along) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                left[row + down, pair + along + i] = halves[word][i][warp]
            for word in range(2):
                right[pair + 8 * word + i, row] = halves[4 + word][i][warp]
        sums = left @ right
        for i, (down, along) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
            results[i][warp] += sums[row + down, pair + along]
    return results
