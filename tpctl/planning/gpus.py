"""GPUs by name: how much they hold and how fast they read it, from their makers' data sheets.

What the sheets call a GB of HBM is 2^30 bytes, within 1%. With ECC a sixteenth of GDDR6 is not to be had. Bandwidth is
in powers of ten; what a kernel reaches of it is less (2.80 of 3.35 TB/s for the linears of an H100 at batch 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """``memory`` in bytes, ``bandwidth`` in bytes a second, and the page that says so."""

    title: str
    memory: int
    bandwidth: int
    source: str


def _gpu(title: str, gib: int, gigabytes_a_second: int, source: str) -> Gpu:
    return Gpu(title, gib << 30, gigabytes_a_second * 10**9, source)


GPUS: Mapping[str, Gpu] = {
    "a100": _gpu("A100 80GB SXM", 80, 2039, "NVIDIA A100 Tensor Core GPU data sheet: 80 GB HBM2e, 2,039 GB/s"),
    "h100": _gpu("H100 SXM", 80, 3350, "NVIDIA H100 Tensor Core GPU data sheet: 80 GB HBM3, 3.35 TB/s"),
    "h200": _gpu("H200 SXM", 140, 4800, "NVIDIA H200 Tensor Core GPU data sheet: 141 GB HBM3e, 4.8 TB/s"),
    "b200": _gpu("B200", 180, 8000, "NVIDIA DGX B200 data sheet: 8 GPUs with 1,440 GB HBM3e and 64 TB/s"),
    "l40s": _gpu("L40S", 45, 864, "NVIDIA L40S GPU data sheet: 48 GB GDDR6 with ECC, 864 GB/s"),
    "rtx4090": _gpu("RTX 4090", 24, 1008, "NVIDIA Ada GPU architecture, appendix: 24 GB GDDR6X, 1,008 GB/s"),
}
"""By the name that ``tpctl plan --gpu`` takes."""
