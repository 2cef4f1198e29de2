"""A soak: requests of every kind by the hundred, some given up, and what the engine holds after each part.

    python benchmarks/soak.py --shape qwen3-30b-a3b [--requests 2000] [--together 250] [--longest 400] [--tp 1]
        [--kv-cache-memory MIB] [--device cuda]

Every way to sample, shared prefixes, answers that their clients give up; little KV cache, so that sequences are
preempted. Fails if a block is lost or a request fails, and if the engine's memory (the fullest rank's tensors) grows by
over 2% after the second part.
"""

from __future__ import annotations

import argparse
import time

import torch

from tpctl.bench.mixed import mixed_requests, soak
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.client.engine_client import EngineClient
from tpctl.wire.settings import EngineConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--together", type=int, default=250)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--kv-cache-memory", type=int, default=1024, help="MiB")
    args = parser.parse_args()
    requests = mixed_requests(args.requests, shape_config(args.shape).vocab_size, args.longest)
    config = EngineConfig(
        synthetic_shards(args.shape, args.tp).folder,
        args.tp,
        device=args.device,
        max_model_len=4 * args.longest,
        max_num_seqs=min(256, args.together),
        max_num_batched_tokens=4096,
        kv_cache_memory=args.kv_cache_memory << 20,
    )
    print(f"{args.shape}, tp {args.tp}, {args.device}: {args.requests} requests, {args.together} at a time\n")
    print("| s | ended | free blocks | preemptions | prefix hits, tokens | device MB | reserved MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    started, memory = time.perf_counter(), []
    with EngineClient(config) as client:
        for part in soak(client, requests, args.together):
            stats = part.stats
            memory.append(stats.device_memory)
            ended = ", ".join(f"{count} {reason}" for reason, count in sorted(part.ended.items()))
            print(
                f"| {time.perf_counter() - started:.1f} | {ended} | {stats.free_blocks} of {stats.num_blocks} | "
                f"{stats.preemptions} | {stats.prefix_cache_hit_tokens} | {stats.device_memory / 1e6:.1f} | "
                f"{stats.reserved_memory / 1e6:.1f} |",
                flush=True,
            )
    if memory[-1] > memory[min(1, len(memory) - 1)] * 1.02:
        raise SystemExit("the engine's memory grew by over 2%")


if __name__ == "__main__":
    main()
