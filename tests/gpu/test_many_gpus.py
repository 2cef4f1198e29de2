"""As many ranks as there are GPUs, and fewer, through the launcher and client that the commands use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.engine_runs import WIDE, most_behind, prompts_of
from tests.gpu.generating import generate
from tests.tiny import make_broken, make_checkpoint
from tests.tiny_predicting import make_copying
from tpctl.bench.mixed import mixed_requests, soak
from tpctl.client.engine_client import EngineClient
from tpctl.layers.attention.flash import installed_flash_attention
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANKS = [count for count in (2, 3, 4, 8) if count <= torch.cuda.device_count()] or [2]
every_tp = pytest.mark.parametrize("tp_size", RANKS)


def with_heads(tp_size: int) -> dict[str, Any]:
    """``WIDE`` with a head for each rank at least."""
    return WIDE | {"num_attention_heads": max(WIDE["num_attention_heads"], 2 * tp_size)}


def config(folder: Path, tp_size: int, **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"kv_cache_memory": 64 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 128}
    return EngineConfig(folder, tp_size, device="cuda", **{**defaults, **settings})


@every_tp
@pytest.mark.parametrize(
    "count,dtype,backend,heads",
    [
        (1, "bfloat16", "triton", (4, 2)),
        (5, "bfloat16", "triton", (4, 2)),
        (40, "bfloat16", "triton", (4, 2)),
        (1, "float16", "triton", (4, 2)),
        (40, "float16", "triton", (4, 2)),
        (40, "bfloat16", "triton", (9, 3)),  # uneven: 6 and 3
        (1, "bfloat16", "triton", (9, 3)),
        (40, "bfloat16", "flash-attn", (9, 3)),
        (40, "bfloat16", "sdpa", (9, 3)),
    ],
)
def test_ranks_stay_near_float32(
    count: int, dtype: str, backend: str, heads: tuple[int, int], tp_size: int, tmp_path: Path
) -> None:
    """In bfloat16: small linears send what they compute, larger ones are cut along their input and summed by the
    all-reduce; prefill goes through it too. In float16, as on GPUs that do not reach each other, and with the sdpa
    backend NCCL sums."""
    if backend == "flash-attn" and installed_flash_attention() is None:
        pytest.skip("flash-attn is not installed")
    shape = {**WIDE, "hidden_size": 512, "head_dim": 128, "intermediate_size": 6144}
    query_heads, kv_heads = heads
    query_heads *= -(-tp_size // query_heads)  # one for each rank at least
    shape |= {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    model = make_checkpoint("qwen3", tmp_path / "hf", **shape).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "cut", tp_size, dtype=dtype)
    prompts = prompts_of(517, tuple(3 + 7 * i % 160 for i in range(count)))
    requests = [Request(str(i), ids, SamplingParams(max_tokens=24, ignore_eos=True)) for i, ids in enumerate(prompts)]
    settings: dict[str, Any] = {"kv_cache_memory": 256 << 20, "max_num_seqs": 40, "max_num_batched_tokens": 4096}
    settings |= {"attention_backend": backend}
    with EngineClient(EngineConfig(tmp_path / "cut", tp_size, device="cuda", **settings)) as client:
        by_peers = dtype == "bfloat16" and backend != "sdpa"
        assert client.wait_ready().all_reduce == ("peer memory" if by_peers else "NCCL")
        found = generate(client, requests)
    assert most_behind(model, prompts, [found[str(i)] for i in range(count)]) < 0.25


@every_tp
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_ranks_equal_transformers_in_float32(name: str, tp_size: int, tmp_path: Path) -> None:
    model = make_checkpoint(name, tmp_path / "hf", **with_heads(tp_size)).cuda()
    shard_checkpoint(tmp_path / "hf", tmp_path / "cut", tp_size)
    prompts = prompts_of(517)
    requests = [Request(str(i), ids, SamplingParams(max_tokens=24, ignore_eos=True)) for i, ids in enumerate(prompts)]
    sampled = [
        Request(f"s{i}", ids, SamplingParams(max_tokens=24, temperature=0.8, seed=i, ignore_eos=True, **more))
        for i, (ids, more) in enumerate(zip(prompts, [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}], strict=False))
    ]
    sampled.append(
        Request("both", prompts[4], SamplingParams(max_tokens=24, temperature=0.8, top_k=20, top_p=0.9, seed=4))
    )
    with EngineClient(config(tmp_path / "cut", tp_size)) as client:
        found = generate(client, requests + sampled)
    for ids, request in zip(prompts, requests, strict=True):
        tokens = found[request.id]
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
    shard_checkpoint(tmp_path / "hf", tmp_path / "tp1", 1)
    with EngineClient(config(tmp_path / "tp1", 1)) as client:
        assert generate(client, sampled) == {request.id: found[request.id] for request in sampled}


@every_tp
@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_ranks_draft_by_a_models_own_layer(name: str, tp_size: int, tmp_path: Path) -> None:
    """All ranks the same, or they would wait for each other; answers are those without. Of so many layers that a step
    takes longer than waiting for the host, or nothing would be worth drafting."""
    make_copying(name, tmp_path / "hf", 0.01, **{**with_heads(tp_size), "head_dim": 64, "num_hidden_layers": 16})
    shard_checkpoint(tmp_path / "hf", tmp_path / "cut", tp_size)
    requests = [
        Request(str(i), ids, SamplingParams(max_tokens=48, temperature=i % 2 * 0.2, seed=i, ignore_eos=True))
        for i, ids in enumerate(prompts_of(517))
    ]
    found = {}
    for way in ("off", "mtp"):
        with EngineClient(config(tmp_path / "cut", tp_size, speculate=way)) as client:
            found[way] = generate(client, requests)
            stats = client.stats()
    assert found["mtp"] == found["off"]
    assert 0 < stats.accepted_tokens <= stats.draft_tokens


@every_tp
def test_ranks_compute_prompts_beside_decodes(tp_size: int, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "hf", **with_heads(tp_size))
    shard_checkpoint(tmp_path / "hf", tmp_path / "cut", tp_size)
    prompts = prompts_of(517, tuple(30 + 37 * i % 270 for i in range(96)))
    answers = [8 + 53 * i % 200 for i in range(96)]
    requests = [
        Request(str(i), ids, SamplingParams(max_tokens=answers[i], temperature=i % 2 * 0.7, seed=i, ignore_eos=True))
        for i, ids in enumerate(prompts)
    ]
    settings: dict[str, Any] = {"kv_cache_memory": 512 << 20, "max_num_seqs": 96, "max_num_batched_tokens": 2048}
    found = {}
    for policy in ("fcfs", "makespan"):
        with EngineClient(config(tmp_path / "cut", tp_size, scheduling_policy=policy, **settings)) as client:
            found[policy] = generate(client, requests)
            paced = client.stats().paced_steps
            assert paced > 20 if policy == "makespan" else paced == 0
    assert found["makespan"] == found["fcfs"]


@every_tp
def test_rows_that_are_not_finite_end_on_every_rank(tp_size: int, tmp_path: Path) -> None:
    """By peer memory and, in float16, by NCCL."""
    broken = 300
    make_broken("qwen3", tmp_path / "hf", broken, **{**with_heads(tp_size), "head_dim": 128})
    prompts = [[token if token != broken else 3 for token in ids] for ids in prompts_of(517)]
    requests = [
        Request(f"{i} {j}", ids, SamplingParams(max_tokens=9, seed=i, ignore_eos=True, **more))
        for i, ids in enumerate(prompts)
        for j, more in enumerate([*MIX, *HELPED])
    ]
    bad = [Request(f"bad {r.id}", [*r.token_ids[:16], broken], r.sampling) for r in requests]
    for dtype in ("bfloat16", "float16"):
        shard_checkpoint(tmp_path / "hf", tmp_path / dtype, tp_size, dtype=dtype)
        with EngineClient(config(tmp_path / dtype, tp_size, block_size=16, kv_cache_memory=64 << 20)) as client:
            found = generate(client, [*bad[::2], *requests, *bad[1::2]])
        assert all(len(found[request.id]) == 9 for request in requests)
        assert all(found[request.id] == [] for request in bad)


MIX: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.1},
]
HELPED: list[dict[str, Any]] = [{"logprobs": 2}, {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2}]


@every_tp
@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_memory": 1 << 20, "block_size": 16},  # a third of what 16 sequences take
        {
            "scheduling_policy": "makespan",
            "kv_cache_memory": 256 << 20,
            "block_size": 32,
            "max_num_seqs": 128,  # the KV cache is no larger than these can fill, and must hold a job to pace it
            "max_num_batched_tokens": 1024,
        },
    ],
)
def test_soak_with_aborts_leaks_nothing(settings: dict[str, Any], tp_size: int, tmp_path: Path) -> None:
    """Every way to sample, shared prefixes, and once so little memory that sequences are preempted."""
    make_checkpoint("qwen3", tmp_path / "hf", **{**with_heads(tp_size), "head_dim": 128})
    shard_checkpoint(tmp_path / "hf", tmp_path / "cut", tp_size, dtype="bfloat16")
    memory, reserved, host = [], [], []
    with EngineClient(config(tmp_path / "cut", tp_size, **settings)) as client:
        for part in soak(client, mixed_requests(2000, 500), 250):
            # Its books are checked by the engine itself, which is idle now; a leak would be fatal.
            assert (part.stats.paced_steps > 0) == ("scheduling_policy" in settings)
            memory.append(part.stats.device_memory)
            reserved.append(part.stats.reserved_memory)
            host.append(host_memory(os.getpid()))
    stats = part.stats
    assert (stats.preemptions > 100) == ("scheduling_policy" not in settings)
    assert stats.prefix_cache_hit_tokens > 10_000
    assert sum(part.ended.values()) == 2000
    assert set(part.ended) == {"length", "abort"}
    assert memory[-1] <= memory[1] * 1.02  # the fuller rank's
    assert reserved[-1] <= reserved[3] + (32 << 20)  # graphs are captured at first
    assert host[-1] <= host[3] * 1.02  # both ranks'


def host_memory(parent: int) -> int:
    """KiB of their own that the processes below ``parent`` hold."""
    total = 0
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            status = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
            total += int(status["RssAnon"].split()[0]) + host_memory(int(child))
    return total
