"""Drive the engine from Python: two ranks, three requests at once, tokens as they come.

    python examples/engine_client.py --model demo --tp 2

This is what ``tpctl batch`` is made of. This process never imports torch; the workers do.
"""

from __future__ import annotations

import argparse

from tpctl.checkpoint.sources import resolve
from tpctl.client.engine_client import EngineClient
from tpctl.client.tokenizer import Tokenizer
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

PROMPTS = ("The capital of France is", "One, two, three,", "Water boils at")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=2)
    args = parser.parse_args()

    shards = ensure_sharded(resolve(args.model), args.tp)
    with EngineClient(EngineConfig(shards, args.tp, kv_cache_memory=64 << 20)) as client:
        tokenizer = Tokenizer(shards)  # while the workers load
        params = SamplingParams(max_tokens=12)
        client.submit(Request(prompt, tokenizer.encode(prompt), params) for prompt in PROMPTS)
        answers: dict[str, list[int]] = {prompt: [] for prompt in PROMPTS}
        left = len(PROMPTS)
        while left:
            for output in client.outputs():
                answers[output.id] += output.token_ids
                left -= output.finish_reason is not None
        for prompt, token_ids in answers.items():
            print(f"{prompt}|{tokenizer.decode(token_ids)!r}")
        print({name: int(value) for name, value in client.stats().items()})


if __name__ == "__main__":
    main()
