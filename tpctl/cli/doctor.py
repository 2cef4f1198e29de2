"""``tpctl doctor``: what this machine offers, and what tpctl will use of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.accounting import PACKED_HEAD_DIMS
from tpctl.cli.console import print_json
from tpctl.errors import EngineError

if TYPE_CHECKING:
    from tpctl.launch.doctor import Torch


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Report devices, peer access, communication libraries and kernels, and what will be used."""
    from tpctl.launch.doctor import examine

    found = examine()
    if as_json:
        print_json(asdict(found))
    else:
        print(f"python {found.python}, {found.cores} cores")
        for package, installed in found.packages.items():
            print(f"{package:<16} {installed or 'not installed'}")
        if found.torch is not None:
            _print_torch(found.torch)
        print(f"used by default  --device {found.device} --attention-backend {found.attention_backend}")
        if found.attention_backend == "triton":
            *dims, last = PACKED_HEAD_DIMS
            heads = f"{', '.join(map(str, dims))} or {last}"
            print(f"KV cache         packed for bfloat16 with heads of {heads}, else as activations are")
    if found.problem is not None:
        raise EngineError(f"torch cannot be used: {found.problem}; reinstall it")


def _print_torch(torch: Torch) -> None:
    if not torch.gpus:
        print(f"GPUs             none visible (torch is built {_built(torch.cuda)})")
    for index, gpu in enumerate(torch.gpus):
        free, total = gpu.free / 2**30, gpu.total / 2**30
        peers = ", ".join(map(str, gpu.peers)) or "none"
        print(f"GPU {index}            {gpu.name}, compute {gpu.capability}, {free:.1f} of {total:.1f} GiB free")
        print(f"                 reaches the memory of: {peers}")
    print(f"between GPUs     {_between_gpus(torch)}")
    print(f"between CPUs     {_between_cpus(torch)}")
    print(f"CPU linears      {'oneDNN, packed weights' if torch.onednn else 'plain'}")


def _between_gpus(torch: Torch) -> str:
    gpus, nccl = torch.gpus, f"NCCL {torch.nccl or 'not available'}"
    if len(gpus) < 2:
        return nccl
    if all(len(gpu.peers) == len(gpus) - 1 for gpu in gpus):
        return f"peer memory in bfloat16 and float32, {nccl} in float16"
    return f"{nccl}; ranks on GPUs that do not reach each other's memory use nothing else"


def _between_cpus(torch: Torch) -> str:
    if not torch.gloo:
        return "gloo is not available: only --tp 1 can run"
    return "shared memory, gloo where ranks cannot map it" if torch.shared_memory else "gloo"


def _built(cuda: str | None) -> str:
    return f"for CUDA {cuda}" if cuda else "without CUDA"
