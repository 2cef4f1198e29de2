"""Which GPUs this process may use, asked without torch."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version

from tpctl.errors import UsageError


def visible_gpus() -> int:
    """How many NVIDIA GPUs the driver shows this process (it honours ``CUDA_VISIBLE_DEVICES``); 0 without it.

    Asks the CUDA driver API: ``cuInit``, ``cuDeviceGetCount``.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose_device(wanted: str | None, tp_size: int) -> str:
    """``"cpu"`` or ``"cuda"``: the wanted one, else cuda where it is usable by all ranks.

    Raises:
        UsageError: cuda is wanted, or there, but has fewer GPUs than ranks.
    """
    if wanted == "cpu":
        return "cpu"
    count = visible_gpus() if wanted == "cuda" or _torch_has_cuda() else 0
    if count == 0:
        if wanted == "cuda":
            raise UsageError("--device cuda needs a GPU, but 0 are visible; use --device cpu")
        return "cpu"
    if tp_size > count:
        raise UsageError(f"--tp {tp_size} needs {tp_size} GPUs, but {count} visible; lower it or use --device cpu")
    return "cuda"


def _torch_has_cuda() -> bool:
    """Whether the installed torch is one with CUDA, as far as its version tells (``2.13.0+cpu`` is not)."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
