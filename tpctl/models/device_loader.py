"""Loads one rank's shard files straight onto a GPU (other ways, timed: ``benchmarks/load_bench.py``).

Threads read pieces of the files into pinned host memory and hand each to the copy engine, two pieces in flight per
thread, so that reading and copying overlap. Tensors land where they stay; nothing passes through pageable memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tpctl.checkpoint.safetensors import read_header
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.partition.dtypes import DTYPES

PIECE = 4 << 20
"""Bytes read and copied at a time. Larger ones lose more in pinning (about 1 ms a MiB) than they save in handling."""

THREADS = 8

STORED: dict[str, torch.dtype] = {
    **{stored: getattr(torch, name) for name, stored in DTYPES.items()},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
"""By their names in headers, dtypes that are read as they are."""


@dataclass(frozen=True)
class _Piece:
    """``length`` bytes of an open file from ``offset``, to the same number of bytes on the device."""

    file: int
    offset: int
    target: Tensor


def load_files(files: Iterable[Path], device: torch.device, skipped: Container[str] = frozenset()) -> dict[str, Tensor]:
    """Every tensor of ``files`` on ``device``, in its stored dtype, but for those whose names are ``skipped``.

    Raises:
        ShardFolderError: a file is no safetensors file, ends early or has a dtype that cannot be run.
    """
    tensors: dict[str, Tensor] = {}
    pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
    opened: list[int] = []
    try:
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            opened.append(fd)
            for name, tensor, offset in _allocate(path, device, skipped):
                tensors[name] = tensor
                flat = tensor.view(-1).view(torch.uint8)
                for start in range(0, flat.numel(), PIECE):
                    pieces.put(_Piece(fd, offset + start, flat[start : start + PIECE]))
        _copy_all(pieces, device)
    finally:
        for fd in opened:
            os.close(fd)
    return tensors


def _allocate(
    path: Path, device: torch.device, skipped: Container[str] = frozenset()
) -> Iterable[tuple[str, Tensor, int]]:
    """(name, empty tensor, offset of its bytes in the file) of each tensor in a safetensors file that is wanted."""
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise ShardFolderError(str(error)) from None
    for name, info in header.tensors.items():
        if name in skipped:
            continue
        dtype = STORED.get(info.dtype)
        if dtype is None:
            raise ShardFolderError(f"{name} in {path.name} is {info.dtype}, which cannot be run; shard it as BF16")
        yield name, torch.empty(info.shape, dtype=dtype, device=device), info.start


def _copy_all(pieces: queue.SimpleQueue[_Piece], device: torch.device) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            _copy_some(pieces, device)
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _copy_some(pieces: queue.SimpleQueue[_Piece], device: torch.device) -> None:
    """Take pieces until none is left: read into one pinned buffer while the other is being copied."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    views = [memoryview(buffer.numpy()) for buffer in buffers]  # type: ignore[arg-type]
    done = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    turn = 0
    with torch.cuda.device(device), torch.cuda.stream(stream):
        while True:
            try:
                piece = pieces.get_nowait()
            except queue.Empty:
                break
            # Asked first, since waiting gives the interpreter's lock away.
            if not done[turn].query():  # type: ignore[no-untyped-call]
                done[turn].synchronize()
            length = piece.target.numel()
            _read_exactly(piece.file, piece.offset, views[turn][:length])
            piece.target.copy_(buffers[turn][:length], non_blocking=True)
            done[turn].record(stream)
            turn = 1 - turn
        stream.synchronize()


def _read_exactly(fd: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise ShardFolderError("a shard file ends before its header says; shard it again")
        buffer, offset = buffer[count:], offset + count
