"""Answer prompts with Ray Data: actors with an engine each, and rows that come back with columns added.

    python examples/ray_data.py --model demo --tp 1 --engines 2

Without --ray it starts Ray on this machine. docs/batch.md says more.
"""

from __future__ import annotations

import argparse
import json

import ray

import tpctl.ray

PROMPTS = ("The capital of France is", "One, two, three,", "", "Water boils at")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--ray", help="address of a cluster; auto: the one that this machine is a node of")
    args = parser.parse_args()

    ray.init(address=args.ray)
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    prompts = ray.data.from_items([{"number": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)])
    answered = prompts.map_batches(
        tpctl.ray.Generator,
        fn_constructor_kwargs={
            "model": args.model,
            "tp": args.tp,
            "sampling": {"max_tokens": 12},
            "kv_cache_memory": 64 << 20,
        },
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=args.engines),
        num_gpus=args.tp if gpus else None,  # an actor has one node, so its ranks are on one
        num_cpus=None if gpus else args.tp,
    )
    for row in sorted(answered.take_all(), key=lambda row: row["number"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
