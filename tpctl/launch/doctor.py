"""What this machine offers to tpctl, found without starting an engine.

Torch is asked in a child process: a broken installation or driver then costs a line of the report, not the report.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from tpctl.children import python_environment
from tpctl.cores import affinity_cores

PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
)
_TIMEOUT = 120.0  # seconds; a cold import of torch with CUDA on a slow disk

_ASK_TORCH = """
import json, torch
import torch.distributed as dist
from tpctl import shared_memory
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
gpus = []
for index in range(count):
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    peers = [other for other in range(count) if other != index and torch.cuda.can_device_access_peer(index, other)]
    capability = f"{properties.major}.{properties.minor}"
    gpus.append(dict(name=properties.name, capability=capability, free=free, total=total, peers=peers))
print(json.dumps(dict(
    cuda=torch.version.cuda,
    gpus=gpus,
    nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
    gloo=dist.is_gloo_available(),
    shared_memory=shared_memory.is_supported(),
    onednn=torch.backends.mkldnn.is_available(),
)))
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes of its memory, and the numbers of those whose memory it reaches."""

    name: str
    capability: str
    free: int
    total: int
    peers: list[int]


@dataclass(frozen=True)
class Torch:
    """What torch reports.

    Attributes:
        cuda, nccl: versions; ``None``: it is built without, or has no GPU to use it for.
        shared_memory: whether CPU ranks can share some.
        onednn: whether linears on CPUs can be packed.
    """

    cuda: str | None
    gpus: list[Gpu]
    nccl: str | None
    gloo: bool
    shared_memory: bool
    onednn: bool

    @classmethod
    def from_json(cls, text: str) -> Torch:
        """What the child process has printed."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "gpus": [Gpu(**gpu) for gpu in fields["gpus"]]})


@dataclass(frozen=True)
class Checkup:
    """What was found.

    Attributes:
        packages: version of each package, ``None`` where it is not installed.
        torch: ``None`` where it cannot be imported, and then ``problem`` says why.
        device: what ``--device`` defaults to.
        attention_backend: what ``--attention-backend auto`` takes there.
    """

    python: str
    cores: int
    packages: dict[str, str | None]
    torch: Torch | None
    problem: str | None
    device: str
    attention_backend: str


def examine() -> Checkup:
    """Look at the machine. Never raises: what cannot be found is reported as missing."""
    torch, problem = _ask_torch()
    gpus = [] if torch is None else torch.gpus
    device = "cuda" if gpus else "cpu"
    backend = "triton" if gpus and find_spec("triton") is not None else "sdpa"
    return Checkup(
        python=platform.python_version(),
        cores=affinity_cores(),
        packages={name: _version(name) for name in PACKAGES},
        torch=torch,
        problem=problem,
        device=device,
        attention_backend=backend,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ask_torch() -> tuple[Torch | None, str | None]:
    try:
        found = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            env=python_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"torch did not answer within {_TIMEOUT:.0f} seconds"
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"torch ended with exit code {found.returncode}"
    return Torch.from_json(found.stdout.splitlines()[-1]), None
