"""What drafts by a model's own layer gain on a GPU, of a made-up model whose layer is always right, or never.

    python benchmarks/mtp_bench.py [--family qwen3_5_text] [--layers 24] [--hidden 2048] [--counts 1,2,4,8] [--tp 1]

Weights are random, in bfloat16; but the next token hangs on the last one alone, so that a layer that knows the rule is
always right (``tests.tiny_predicting``), and one that does not is never. Both are the bounds of what published layers
give: times of steps are those of any weights. An engine without drafts and one with answer the same requests in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.tiny_predicting import make_copying, make_predicting
from tpctl.bench.measure import machine
from tpctl.client.engine_client import EngineClient
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

VOCAB = 32768


def answered(client: EngineClient, requests: list[Request]) -> tuple[dict[str, list[int]], float]:
    """The tokens of requests that are handed in at once, and how many came a second, behind the first of each."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    client.submit(requests)
    left, began, first = len(requests), 0.0, 0
    while left:
        for output in client.outputs(timeout=300):
            found[output.id] += output.token_ids
            left -= output.finish_reason is not None
        if not began and all(found.values()):
            began, first = time.perf_counter(), sum(map(len, found.values()))
    seconds = time.perf_counter() - began
    return found, (sum(map(len, found.values())) - first) / seconds


def measure(shards: Path, args: argparse.Namespace, layer: str) -> None:
    settings: dict[str, Any] = {"device": args.device, "max_num_seqs": 64, "kv_cache_memory": 1 << 30}
    settings |= {"max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.4}
    sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    rng = random.Random(1)
    with (
        EngineClient(EngineConfig(shards, args.tp, **settings)) as plain,
        EngineClient(EngineConfig(shards, args.tp, speculate="mtp", **settings)) as drafting,
    ):
        drafting.wait_ready()
        for count in map(int, args.counts.split(",")):
            before = drafting.stats()
            rates: dict[str, list[float]] = {"without": [], "with": []}
            differ = 0
            for turn in range(args.runs + 1):  # the first captures
                prompts = [[rng.randrange(3, VOCAB) for _ in range(64)] for _ in range(count)]
                requests = [Request(f"{count} {turn} {at}", ids, sampling) for at, ids in enumerate(prompts)]
                one, without = answered(plain, requests)
                other, with_ = answered(drafting, requests)
                differ += sum(one[id] != other[id] for id in one)
                if turn:
                    rates["without"].append(without)
                    rates["with"].append(with_)
            after = drafting.stats()
            a, b = (statistics.median(rates[way]) for way in ("without", "with"))
            accepted = after.accepted_tokens - before.accepted_tokens
            drafted = after.draft_tokens - before.draft_tokens
            held = f"{accepted} of {drafted} | {after.steps - before.steps}"
            print(f"| {layer} | {count} | {a:.1f} | {b:.1f} | {b / a:.2f} | {held} | {differ} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_5_text", help="of tests.tiny_predicting.PREDICTING")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", default="right,wrong")
    args = parser.parse_args()
    print({key: value for key, value in machine().items() if value}, vars(args))
    print(
        "| its layer is | at once | without, tok/s | with | ratio | accepted | steps | answers differ |\n"
        + 8 * "|---"
        + "|"
    )
    shape: dict[str, Any] = {
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_attention_heads": args.hidden // 128,
        "num_key_value_heads": max(2, args.hidden // 512),
        "head_dim": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "num_hidden_layers": args.layers,
    }
    if args.family.startswith("qwen"):
        shape["layer_types"] = [("full_attention" if at % 4 == 3 else "linear_attention") for at in range(args.layers)]
        shape |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
        shape |= {"linear_num_key_heads": args.hidden // 128, "linear_num_value_heads": args.hidden // 64}
    if args.family in ("glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text"):
        shape |= {"moe_intermediate_size": args.hidden // 4}
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder)
            (make_copying if kind == "right" else make_predicting)(args.family, made / "hf", **shape)
            shard_checkpoint(made / "hf", made / "cut", args.tp, dtype="bfloat16")
            measure(made / "cut", args, kind)


if __name__ == "__main__":
    main()
