"""Requests that are answered greedily by an engine of real layers, and what transformers answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tpctl.accounting import cache_for
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.runners.loading import load
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

TOKENS = 30
SHARED = [(7 * i) % 120 + 3 for i in range(40)]
PROMPTS = [*(SHARED[:length] for length in (3, 17, 23, 24, 25, 40)), [*SHARED[:20], 77, 78], [9, 8, 7], [50] * 13]


def answers(
    model: Any,
    prompts: Sequence[list[int]] = PROMPTS,
    count: int = TOKENS,
    cache: Callable[[], Any] = lambda: None,
    guess: Sequence[list[int]] | None = None,
) -> list[list[int]]:
    """What transformers' ``model`` answers greedily: ``count`` tokens behind each of ``prompts``.

    All together, in passes over the prompts and as many tokens: each place takes what is likeliest behind the ones
    before, until nothing changes. The first pass that does so was made of the answers; each before has put one more of
    them right at least. No position sees the ones behind it, so what rows are filled up with changes nothing, and no
    mask is needed. Not for models whose tables change with the length of a batch.

    Args:
        cache: makes what takes the keys and values of one pass; as a rule nothing does.
        guess: what is held against it; where that is right, one pass is enough.
    """
    ends, rows = torch.tensor([len(prompt) for prompt in prompts]), torch.arange(len(prompts))[:, None]
    places = ends[:, None] + torch.arange(count)
    ids = torch.zeros(len(prompts), int(ends.max()) + count, dtype=torch.long)
    for row, (prompt, tokens) in enumerate(zip(prompts, guess or [[0] * count] * len(prompts), strict=True)):
        ids[row, : len(prompt) + count] = torch.tensor([*prompt, *tokens])
    with torch.inference_mode():
        for _ in range(count + 1):
            taken = cache()
            # By its place: what it is called depends on the version.
            found = model(ids[:, :-1], None, None, taken, use_cache=taken is not None).logits
            likeliest = found[rows, places - 1].argmax(-1)
            if torch.equal(likeliest, ids[rows, places]):
                return likeliest.tolist()
            ids[rows, places] = likeliest
    raise AssertionError("what is likeliest somewhere depends on what is behind it")


def generated(model: Any, prompts: Sequence[list[int]] = PROMPTS, count: int = TOKENS) -> list[list[int]]:
    """What transformers' own ``generate`` makes of ``prompts``, one by one: ``count`` tokens each."""
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        found.append(answer[0, len(prompt) :].tolist())
    return found


def run(shards: Path, tp_size: int, groups: list[list[Request]], **settings: Any) -> tuple[dict[str, list[int]], Any]:
    """The tokens of each request, group after group in one engine; and its counters."""
    values: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, **settings}
    config = EngineConfig(shards, tp_size, **values)

    def rank(group: TPGroup) -> tuple[dict[str, list[int]], Any]:
        tokens: dict[str, list[int]] = {}
        with torch.inference_mode():
            engine = Engine(config, group)
            for requests in groups:
                engine.apply(Add(requests))
                while engine.has_work:
                    for output in engine.step():
                        assert output.finish_reason in (None, "length")
                        tokens.setdefault(output.id, []).extend(output.token_ids)
            return tokens, engine.stats()

    results = run_ranks(tp_size, rank)
    assert all(tokens == results[0][0] for tokens, _ in results)
    return results[0]


def requests(prefix: str = "", prompts: Sequence[list[int]] = PROMPTS, **way: Any) -> list[Request]:
    """One for each of ``prompts``."""
    params = SamplingParams(**{"max_tokens": TOKENS, "ignore_eos": True, **way})
    return [Request(f"{prefix}{index}", prompt, params) for index, prompt in enumerate(prompts)]


def memory_for(shards: Path, tp_size: int, length: int, max_num_seqs: int = 64) -> int:
    """Bytes of the smallest KV cache, of blocks of 4 tokens, in which sequences of up to that length can run."""

    def rank(group: TPGroup) -> int:
        loaded = load(EngineConfig(shards, tp_size, block_size=4, max_model_len=length), group)
        return cache_for(loaded.layout.slabs(length) * loaded.slab_bytes, loaded.state_bytes, max_num_seqs)

    return max(run_ranks(tp_size, torch.inference_mode()(rank)))
