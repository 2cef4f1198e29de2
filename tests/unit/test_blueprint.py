"""Layers that differ from each other: cut, planned, drawn and run from their blueprint alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.unit.generating import generated
from tpctl.arch import parts
from tpctl.arch.block import Attention
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.families import FAMILIES, llama
from tpctl.arch.family import Family, Sizes
from tpctl.arch.fields import Fields
from tpctl.arch.rope import read_rope
from tpctl.checkpoint.metadata import read_metadata
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.layers.rotary import RotaryTable
from tpctl.manifest.manifest import Manifest
from tpctl.planning.fit import Budget, plan_model
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards
from tpctl.sharding.showing.kinds import kinds
from tpctl.sharding.showing.page import render
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

TOKENS = 20
PROMPTS = [[(7 * i) % 120 + 3 for i in range(length)] for length in (3, 9, 17, 30)]
CONFIG: dict[str, Any] = {
    "model_type": "odd",
    "architectures": ["OddForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def describe(fields: Fields, sizes: Sizes) -> Blueprint:
    """A wide layer, a narrow one with a window and capped scores, and the first once more."""
    rope = read_rope(fields, "OddForCausalLM", sizes.head_dim)
    other = replace(sizes, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=80)
    narrow = replace(rope, theta=300.0, rotary_dim=12)
    wide = parts.block(sizes, parts.attention(sizes, rope), parts.gated(sizes, "silu"))
    capped = parts.attention(other, narrow, window=6, scale=0.4, softcap=2.0, qk_norm=True)
    return parts.model(sizes, (wide, parts.block(other, capped, parts.gated(other, "gelu_tanh")), wide))


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of random weights."""
    family = Family("OddForCausalLM", llama.FAMILY.defaults, llama.FAMILY.nullable, describe)
    monkeypatch.setitem(FAMILIES, "odd", family)
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)
    made_of = ModelConfig.load(folder).blueprint
    shapes: dict[str, tuple[int, ...]] = {}
    for split in made_of.splits():
        for part in split.parts:
            shapes[part.source] = split.shape(part.length)
    scale = {1: (0.3, 0.5), 2: (0.2, 0.0)}
    weights = {}
    for name, shape in shapes.items():
        spread, mean = scale[len(shape)]
        weights[name] = torch.randn(shape, generator=generator) * spread + mean
    save_file(weights, folder / "model.safetensors")
    return folder


def written_out(made_of: Blueprint, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """[T, V]: the logits behind each of ``ids``, one layer after the other, nothing shared, nothing cached."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def rotated(x_THD: Tensor, attention: Attention) -> Tensor:
        table = RotaryTable(attention.rope, len(ids), "cpu")
        cos, sin = table.cos.unsqueeze(1), table.sin.unsqueeze(1)
        one, two = x_THD.chunk(2, -1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer, block in enumerate(made_of.blocks):
        at, attention = f"model.layers.{layer}", block.attention
        normed = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (normed @ weights[f"{at}.self_attn.{label}_proj.weight"].T).view(len(ids), -1, attention.head_dim)
            for label in "qkv"
        )
        if attention.q_norm is not None:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        q, k = rotated(q, attention), rotated(k, attention)
        group = attention.num_heads // attention.num_kv_heads
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * attention.scale
        if attention.softcap is not None:
            scores = torch.tanh(scores / attention.softcap) * attention.softcap
        place = torch.arange(len(ids))
        hidden = place[None, :] > place[:, None]
        if attention.window is not None:
            hidden |= place[None, :] <= place[:, None] - attention.window
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        attended = torch.einsum("hts,shd->thd", shares, v.repeat_interleave(group, 1)).flatten(1)
        x = x + attended @ weights[f"{at}.self_attn.o_proj.weight"].T
        normed = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (normed @ weights[f"{at}.mlp.{label}_proj.weight"].T for label in ("gate", "up"))
        acted = F.silu(gate) if block.mlp.activation == "silu" else F.gelu(gate, approximate="tanh")
        x = x + (acted * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


def greedy(folder: Path, tp_size: int, **settings: Any) -> dict[str, list[int]]:
    """The engine's answers to ``PROMPTS``."""
    config = EngineConfig(folder, tp_size, kv_cache_memory=1 << 21, block_size=4, **settings)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)

    def rank(group: TPGroup) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        with torch.inference_mode():
            engine = Engine(config, group)
            engine.apply(Add([Request(str(index), prompt, params) for index, prompt in enumerate(PROMPTS)]))
            while engine.has_work:
                for output in engine.step():
                    tokens.setdefault(output.id, []).extend(output.token_ids)
            engine.stats()
        return tokens

    first, *others = run_ranks(tp_size, rank)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_layers_that_differ_compute_what_is_written_out(odd: Path, tp_size: int) -> None:
    shard_checkpoint(odd, odd.parent / "shards", tp_size)
    made_of, weights = ModelConfig.load(odd).blueprint, load_file(odd / "model.safetensors")
    answers = greedy(odd.parent / "shards", tp_size, max_num_batched_tokens=13, max_num_seqs=4)
    for index, prompt in enumerate(PROMPTS):
        answer = answers[str(index)]
        logits = written_out(made_of, weights, prompt + answer[:-1])[len(prompt) - 1 :]
        assert len(answer) == len(logits) == TOKENS
        assert (logits[torch.arange(TOKENS), torch.tensor(answer)] > logits.amax(-1) - 1e-4).all()
    assert len({tuple(answer) for answer in answers.values()}) > 1


@pytest.mark.parametrize("tp_size", [1, 3])
def test_what_is_known_of_layers_that_differ(odd: Path, tp_size: int) -> None:
    """The planner's bytes are those of the files, the page draws each sort, merging gives the source back."""
    out = odd.parent / "shards"
    shard_checkpoint(odd, out, tp_size)
    config, manifest = ModelConfig.load(odd), Manifest.load(out)
    assert dict(config.blueprint.alike) == {0: [0, 2], 1: [1]}
    report = plan_model(read_metadata(str(odd)), Budget(), tp_size=tp_size)
    files = [
        sum(path.stat().st_size for path in out.glob(f"model-rank-{rank}-part-*.safetensors"))
        for rank in range(tp_size)
    ]
    assert [rank.file_bytes for rank in report.ranks] == files
    held = [sum(4 * prod(entry.shape) for entry in manifest.tensors(rank).values()) for rank in range(tp_size)]
    assert [rank.weight_bytes for rank in report.ranks] == held
    shares = [block.attention.shares(tp_size) for block in config.blueprint.blocks]
    for rank in report.ranks:
        heads = zip(shares, (8, 0, 8), strict=True)  # the one between them has a window
        assert rank.kv_bytes_per_token == sum(2 * len(share[rank.rank].kv) * size * 4 for share, size in heads)
        assert rank.window_bytes >= 2 * len(shares[1][rank.rank].kv) * 12 * 4 * 6
    assert report.limit == 5 and report.limit_reason.endswith("and there are 4")

    shown = inspect_shards(out, source=odd)
    qkv = [kind for kind in kinds(shown) if kind.title == "self_attn.qkv_proj"]
    assert [kind.layers for kind in qkv] == [(0, 2), (1,)]
    assert "the way through one decoder block" in render(shown, config)
    merge_shards(out, odd.parent / "merged")
    assert (odd.parent / "merged" / "model.safetensors").read_bytes() == (odd / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("gemma3")
    model = make_checkpoint("gemma3-caps", folder / "hf")
    yield folder, {str(index): answer for index, answer in enumerate(generated(model, PROMPTS, TOKENS))}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_greedy_tokens_of_gemma_3_equal_generate(gemma: tuple[Path, dict[str, list[int]]], tp_size: int) -> None:
    folder, expected = gemma
    shard_checkpoint(folder / "hf", folder / f"tp{tp_size}", tp_size)
    assert greedy(folder / f"tp{tp_size}", tp_size) == expected
