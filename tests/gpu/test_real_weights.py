"""The demo model's real weights on GPUs: float32 tokens equal transformers'."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.generating import generate
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.client.engine_client import EngineClient
from tpctl.client.tokenizer import Tokenizer
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = pytest.mark.gpu

TEXTS = (
    "The capital of France is a city that is known all over the world for its museums and",
    "Once upon a time there was a little girl who lived in a house near the forest and her",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "In 1969 the first human beings set foot on the Moon. The mission was called Apollo 11 and",
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,",
    "Question: Why is the sky blue? Answer: Because the light of the sun is scattered by the",
    "Die Hauptstadt von Deutschland ist Berlin, und die Hauptstadt von Italien ist Rom, und die",
    "My favourite recipe for a rainy Sunday needs two onions, a handful of mushrooms and a",
)
LENGTH, TOKENS = 12, 48


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_greedy_tokens_equal_transformers(demo: ResolvedSource, tp_size: int) -> None:
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"needs {tp_size} GPUs")
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(demo.folder)
    prompts = [tokenizer.encode(text)[:LENGTH] for text in TEXTS]
    assert {len(ids) for ids in prompts} == {LENGTH}
    model = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32).eval().cuda()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device="cuda")
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    expected = answers[:, LENGTH:].tolist()
    del model
    torch.cuda.empty_cache()
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    requests = [Request(str(number), ids, params) for number, ids in enumerate(prompts)]
    config = EngineConfig(
        ensure_sharded(demo, tp_size), tp_size, device="cuda", dtype="float32", kv_cache_memory=256 << 20
    )
    with EngineClient(config) as client:
        found = generate(client, requests)
    assert [found[request.id] for request in requests] == expected
