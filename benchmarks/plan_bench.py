"""Holds what ``tpctl plan`` says of a GPU's memory against what an engine takes there, one shape after the other.

    python benchmarks/plan_bench.py qwen3-30b-a3b llama-3.1-8b-fp8 gpt-oss-20b [--max-model-len 4096]
        [--attention-backend sdpa]

weights, KV tokens (where layers have windows, of one sequence): of the plan and of the engine. used: what the GPU's own
counter says when a step of the most tokens and a decode have run, beside the share that was to be used.
"""

from __future__ import annotations

import argparse
import gc

import torch
from kernel_timing import row

from tpctl.attention_choice import BACKENDS
from tpctl.bench.synthetic import synthetic_shards
from tpctl.bench.workload import one_request
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.planning.fit import Budget, plan_model
from tpctl.wire.messages import Add
from tpctl.wire.settings import EngineConfig


def compared(shape: str, max_model_len: int, backend: str) -> None:
    folder = synthetic_shards(shape, 1).folder
    total = torch.cuda.get_device_properties(0).total_memory
    budget = Budget(gpu_memory=total, max_model_len=max_model_len, attention_backend=backend)
    (plan,) = (size for size in plan_model(read_metadata(str(folder)), budget).sizes if size.tp_size == 1)
    config = EngineConfig(
        folder,
        1,
        device="cuda",
        attention_backend=backend,
        max_model_len=max_model_len,
        max_num_seqs=512,
        max_num_batched_tokens=16384,
    )
    engine = Engine(config, TPGroup(0, 1, "cuda"))
    info = engine.runner.info()
    longest = min(max_model_len - 8, 16384)
    engine.apply(Add([one_request(longest, 8, number, 1000) for number in range(1 + 16384 // longest)]))
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    used, tokens = total - torch.cuda.mem_get_info()[0], info.num_blocks * info.block_size
    layout = engine.runner.loaded.layout
    if any(layout.windows):
        longest = engine.runner.loaded.config.max_position_embeddings
        tokens = min(layout.longest(info.num_blocks) or longest, longest)
    row(f"{shape} weights, GB", f"{plan.weight_bytes / 1e9:.2f}", f"{info.weight_bytes / 1e9:.2f}",
        f"{plan.weight_bytes / info.weight_bytes - 1:+.2%}")  # fmt: skip
    row(f"{shape} KV tokens", plan.kv_tokens, tokens, f"{plan.kv_tokens / tokens - 1:+.2%}")
    row(f"{shape} used, GB", f"{total * budget.utilization / 1e9:.2f}", f"{used / 1e9:.2f}",
        f"{total * budget.utilization / used - 1:+.2%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--attention-backend", choices=["auto", *BACKENDS], default="auto")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    row("", "plan", "engine", "plan is")
    for shape in args.shapes:
        compared(shape, args.max_model_len, args.attention_backend)
        gc.collect()  # captured graphs and what they captured know each other
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
