"""Real weights answer with speculation what they answer without, greedily and sampled, at tp 1 and 2."""

from __future__ import annotations

import pytest

from tpctl.bench.passage import PASSAGE
from tpctl.client.llm import LLM
from tpctl.wire.sampling import SamplingParams

CODE = PASSAGE[PASSAGE.index("def median") : PASSAGE.index("| month")]
PROMPTS = [
    f"```python\n{CODE}```\n\nThe same with type hints:\n\n```python\ndef median(",
    PASSAGE[:600] + "\n\nThe same text again:\n\n" + PASSAGE[:60],
    "Once upon a time",
]
WAYS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=4),
]


@pytest.mark.daily(2)
@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_answers_are_those_without(tp: int) -> None:
    found: dict[str, list[list[int]]] = {}
    for way in ("off", "ngram"):
        with LLM("demo", tp, device="cpu", dtype="float32", kv_cache_memory=1 << 28, speculate=way) as llm:
            found[way] = [one.token_ids for params in WAYS for one in llm.generate(PROMPTS, params, stop=["\n\n\n"])]
            stats = llm.stats()
            assert llm.info.speculation == way
    assert found["ngram"] == found["off"]
    assert 20 < stats.accepted_tokens <= stats.draft_tokens
