"""Sets of requests to time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.errors import UsageError
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

WORKLOADS = ("nano", "short", "prefix", "long", "even")


@dataclass(frozen=True)
class Workload:
    """Requests that are handed in all at once. ``shift`` made their prompts, so that two runs share no prefix."""

    name: str
    requests: list[Request]

    @property
    def output_tokens(self) -> int:
        """Tokens that the requests will generate; they ignore end-of-sequence tokens."""
        return sum(request.sampling.max_tokens for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)


def make_workload(name: str, vocab_size: int, shift: int = 0, sampling: Mapping[str, Any] | None = None) -> Workload:
    """The workload called ``name``, with prompt tokens moved on by ``shift`` (modulo the vocabulary).

    sampling: fields of ``SamplingParams`` in place of the workload's own.

    ``nano``: nano-vllm's own benchmark: seed 0, 256 prompts of 100 to 1,024 random tokens below 10,000, then 256
    output lengths of 100 to 1,024, together 133,966 tokens; temperature 0.6. ``short``: 32 prompts of 128 random
    tokens, 64 tokens each, greedy. ``prefix``: 256 prompts of the same 2,000 tokens and 100 of their own, 128 tokens
    each, temperature 0.6. ``long``: 32 prompts of 12,000 random tokens, 256 tokens each, greedy. ``even``: 512 prompts
    of 1,024 random tokens, 1,024 tokens each, greedy.

    Raises:
        UsageError: no such workload.
    """
    rng = random.Random(0)
    if name == "nano":
        prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
        lengths = [rng.randint(100, 1024) for _ in range(256)]
        temperature = 0.6
    elif name == "short":
        prompts = [[rng.randrange(3, 10000) for _ in range(128)] for _ in range(32)]
        lengths = [64] * 32
        temperature = 0.0
    elif name == "prefix":
        shared = [rng.randrange(3, 10000) for _ in range(2000)]
        prompts = [shared + [rng.randrange(3, 10000) for _ in range(100)] for _ in range(256)]
        lengths = [128] * 256
        temperature = 0.6
    elif name == "long":
        prompts = [[rng.randrange(3, 10000) for _ in range(12000)] for _ in range(32)]
        lengths = [256] * 32
        temperature = 0.0
    elif name == "even":
        prompts = [[rng.randrange(3, 10000) for _ in range(1024)] for _ in range(512)]
        lengths = [1024] * 512
        temperature = 0.0
    else:
        raise UsageError(f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}")
    fields = {"temperature": temperature, **(sampling or {})}
    moved = [[(token + shift) % min(vocab_size, 10001) for token in prompt] for prompt in prompts]
    return Workload(
        name,
        [
            Request(
                f"{name}-{shift}-{index}",
                prompt,
                SamplingParams(**fields, seed=index, max_tokens=length, ignore_eos=True),
            )
            for index, (prompt, length) in enumerate(zip(moved, lengths, strict=True))
        ],
    )


def one_request(
    prompt_tokens: int, output_tokens: int, shift: int, vocab_size: int, sampling: Mapping[str, Any] | None = None
) -> Request:
    """A single request whose prompt differs with ``shift`` from its first token on; greedy unless ``sampling`` (fields
    of ``SamplingParams``) says otherwise."""
    rng = random.Random(shift)
    prompt = [rng.randrange(3, 10000) % vocab_size for _ in range(prompt_tokens)]
    params = SamplingParams(**(sampling or {}), seed=shift, max_tokens=output_tokens, ignore_eos=True)
    return Request(f"one-{shift}-{output_tokens}", prompt, params)
