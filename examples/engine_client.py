"""Run a model from Python: two ranks, three prompts at once, then a question to the same engine.

    python examples/engine_client.py --model demo --tp 2

This process never imports torch; the workers do.
"""

from __future__ import annotations

import argparse

from tpctl import LLM, SamplingParams

PROMPTS = ("The capital of France is", "One, two, three,", "Water boils at")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=2)
    args = parser.parse_args()

    with LLM(args.model, args.tp, kv_cache_memory=64 << 20) as llm:
        params = SamplingParams(max_tokens=12)
        for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            print(f"{prompt}|{answer.text!r}")
        print(llm.chat([{"role": "user", "content": "What is the capital of France?"}], params).text)
        print(llm.stats())


if __name__ == "__main__":
    main()
