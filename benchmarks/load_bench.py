"""Times ways of getting one rank's shard files onto a GPU, page cache warm, one process a run.

    python benchmarks/load_bench.py llama-3.1-8b [--tp 2] [--runs 3]

A run starts its clock when CUDA is ready and stops it when the last byte is there, so that what a way has to pin, map
or allocate first counts. Every way must bring the same bytes: their sum is compared.

    staged     what tpctl does (``tpctl/models/device_loader.py``), with other numbers of threads and sizes of a piece
    mapped     ``Tensor.to`` out of safetensors' mapping of the file: through CUDA's own staging buffer
    library    ``safetensors.torch.load_file`` with the GPU as its device
    registered the mapping made known to CUDA (``cudaHostRegister``), then copied straight out of the page cache
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tpctl.bench.synthetic import synthetic_shards
from tpctl.errors import TpctlError
from tpctl.manifest.manifest import Manifest
from tpctl.models import device_loader

DEVICE = torch.device("cuda")
READ_ONLY = 8  # cudaHostRegisterReadOnly
STAGED = [(1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (8, 1), (8, 4), (8, 64)]
"""Threads, MiB a piece."""


def staged(threads: int, mib: int) -> Callable[[list[Path]], dict[str, Tensor]]:
    def load(files: list[Path]) -> dict[str, Tensor]:
        device_loader.THREADS, device_loader.PIECE = threads, mib << 20
        return device_loader.load_files(files, DEVICE)

    return load


def mapped(threads: int) -> Callable[[list[Path]], dict[str, Tensor]]:
    def load(files: list[Path]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with ThreadPoolExecutor(threads) as pool:
            for path in files:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    found |= zip(names, pool.map(lambda name: file.get_tensor(name).to(DEVICE), names), strict=True)
        return found

    return load


def library(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in files:
        found |= load_file(path, str(DEVICE))
    return found


def registered(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for path in files:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            whole = torch.frombuffer(content, dtype=torch.uint8)
            code = runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), READ_ONLY)
            if int(code) != 0:
                raise SystemExit(f"CUDA does not register a mapped file here ({code})")
            for name, tensor, offset in device_loader._allocate(path, DEVICE):
                tensor.view(-1).view(torch.uint8).copy_(whole[offset : offset + tensor.nbytes], non_blocking=True)
                found[name] = tensor
            torch.cuda.synchronize()
            runtime.cudaHostUnregister(whole.data_ptr())
    return found


WAYS: dict[str, Callable[[list[Path]], dict[str, Tensor]]] = {
    **{f"staged, {threads} threads x {mib} MiB": staged(threads, mib) for threads, mib in STAGED},
    "mapped, 1 thread": mapped(1),
    "mapped, 8 threads": mapped(8),
    "library": library,
    "registered": registered,
}


def one(way: str, files: list[Path]) -> None:
    """One run, in its own process: seconds, bytes and the sum of all bytes."""
    torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    started = time.perf_counter()
    tensors = WAYS[way](files)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    total = sum(int(tensor.view(-1).view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors.values())
    print(json.dumps([seconds, sum(tensor.nbytes for tensor in tensors.values()), total]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one, options.files)
    try:
        folder = synthetic_shards(options.shape, options.tp).folder
    except TpctlError as error:
        raise SystemExit(f"{options.shape}: {error}") from None
    files = [folder / name for name in Manifest.load(folder).rank_files(0)]
    for path in files:
        with path.open("rb") as file:
            while file.read(64 << 20):
                pass
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    expected = None
    for way in WAYS:
        command = [sys.executable, __file__, options.shape, "--one", way, "--files", *map(str, files)]
        times = []
        for _ in range(options.runs):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                print(f"{way:30} {run.stderr.strip().splitlines()[-1]}")
                break
            seconds, nbytes, total = json.loads(run.stdout)
            if expected not in (None, total):
                raise SystemExit(f"{way} brought other bytes than the first way")
            expected = total
            times.append(seconds)
        else:
            middle = statistics.median(times)
            print(f"{way:30} {middle:6.2f} s ({min(times):.2f} to {max(times):.2f}) {nbytes / middle / 1e9:6.1f} GB/s")
    return None


if __name__ == "__main__":
    main()
