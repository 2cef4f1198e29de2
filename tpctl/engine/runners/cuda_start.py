"""The runner on GPUs: which kind a model wants, and the order in which all it needs is made."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tpctl.distributed import TPGroup
from tpctl.engine.runners.cuda import CudaRunner
from tpctl.engine.runners.cuda_memory import cuda_budget, measure_step
from tpctl.engine.runners.cuda_predicting import CudaPredictingRunner
from tpctl.engine.runners.cuda_sizes import find_pace, largest_rows, paged
from tpctl.engine.runners.loading import load
from tpctl.engine.runners.memory_plan import plan_memory
from tpctl.engine.runners.step_set import use_kernels
from tpctl.layers.compute_cuda import connect_peers
from tpctl.wire.settings import EngineConfig


def make_cuda_runner(
    settings: EngineConfig, group: TPGroup, compiled: Callable[[], object] = lambda: None
) -> CudaRunner:
    """A runner on GPUs (collective). Errors as ``load``, ``cuda_budget`` and ``plan_memory``.

    Args:
        compiled: called before the first kernel is launched; waits for those that are being compiled.
    """
    loaded = load(settings, group, warm_up)
    pace = find_pace(loaded)
    compute = use_kernels(loaded, pace, connect_peers)
    started = time.perf_counter()
    compiled()
    loaded.timings.lap("kernels", started)
    steps = measure_step(loaded, largest_rows(settings, pace), paged(loaded).prefix_bytes(settings.max_num_seqs))
    memory = plan_memory(loaded, cuda_budget(loaded, steps), steps.later)
    kind = CudaRunner if loaded.model.mtp is None else CudaPredictingRunner
    return kind(loaded, memory, compute, steps, pace)


def warm_up(group: TPGroup, dtype: torch.dtype) -> None:
    """Connect NCCL and create cuBLAS' handle and workspace, which take seconds together."""
    with torch.cuda.device(group.device), torch.inference_mode():
        square = torch.zeros(16, 16, dtype=dtype, device=group.device)
        product = group.all_reduce(square @ square)
        torch.cuda.current_stream().synchronize()
        del product  # not before: its memory could become a weight's, which other streams fill meanwhile
