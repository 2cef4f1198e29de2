"""Simulated ranks of families that tpctl cuts and does not run: what the shards' tensors compute, summed over the
ranks, equals what transformers' own module does with the whole weights.

A rank's mixer is transformers' module again, of a config with that rank's heads, and with the tensors that it stores.
Experts are computed from the stored stacks, with transformers' router.

Shapes: T tokens, H hidden, E experts of a rank, I inner size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import MIXTURES, make_mixture
from tpctl.arch.block import Experts, Gated
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.manifest.manifest import Manifest
from tpctl.partition.cuts import HeadShare
from tpctl.sharding.cutting.shard import shard_checkpoint

TOKENS, HIDDEN = 9, 64
CUTTINGS = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (2, 2), (4, 2), (3, 3)]
"""TP size and groups of whole experts. 4 and 5 are uneven for 6 heads, and all but 1 for an inner size of 23."""


class Ranks:
    """A model of transformers, and its shards."""

    def __init__(self, made: tuple[Any, Path], out: Path, tp: int, groups: int) -> None:
        self.model, source = made
        shard_checkpoint(source, out, tp, cutting=Cutting(groups))
        self.config, self.tp, self.manifest = ModelConfig.load(source), tp, Manifest.load(out)
        self.held = [load_file(out / f"model-rank-{rank}-part-0.safetensors") for rank in range(tp)]

    def of(self, rank: int, module: str) -> dict[str, Tensor]:
        """The tensors of one rank below ``module``."""
        return {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in self.held[rank].items()
            if name.startswith(f"{module}.")
        }

    def experts(self, rank: int, layer: int) -> tuple[int, bool]:
        """The first expert of ``rank``, and whether it is the first one to hold them."""
        name = f"model.layers.{layer}.{module_of(self, layer)}.experts.w2_weight"
        first = [self.manifest.tensors(one)[name].pieces[0].start[0] for one in range(self.tp)]
        return first[rank], first.index(first[rank]) == rank


Whole = Callable[[str, bool], tuple[Any, Path]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Makes a model and its checkpoint, by its name and whether experts are stacked, each once."""
    made: dict[tuple[str, bool], tuple[Any, Path]] = {}

    def make(name: str, stacked: bool) -> tuple[Any, Path]:
        if (name, stacked) not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[name, stacked] = make_mixture(name, folder, stacked=stacked), folder
        return made[name, stacked]

    return make


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def module_of(ranks: Ranks, layer: int) -> str:
    """Where the experts of ``layer`` are stored: ``mlp``, or Mixtral's name."""
    (experts,) = (part for part in ranks.config.blueprint.layers[layer].parts if isinstance(part, Experts))
    return experts.gate_up.name.split(".")[0]


def gated(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def one_expert(name: str, x: Tensor, held: dict[str, Tensor], expert: int, first: bool) -> Tensor:
    w13, w2 = held["w13_weight"][expert], held["w2_weight"][expert]
    if not name.startswith("gpt_oss"):
        return gated(x, w13, w2)
    rows = x @ w13 + held["w13_bias"][expert]  # [H, 2I], gate and up in turn
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    out = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ w2
    return out + held["w2_bias"][expert] if first else out  # once for all ranks that have a part of the expert


def chosen(name: str, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts that transformers' router gives each token."""
    if name.startswith("gpt_oss"):
        _, weights, numbers = block.router(x)
    elif name.startswith("minimax"):
        _, weights, numbers = block.gate(x, block.e_score_correction_bias)
    else:
        _, weights, numbers = block.gate(x)
    return weights, numbers


@pytest.mark.grid(1)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("name", "tp", "groups"),
    [(name, *one) for name in MIXTURES for one in CUTTINGS if one[1] == 1 or name != "qwen3_5_text"],
)
def test_mlps_and_experts(whole: Whole, tmp_path: Path, name: str, tp: int, groups: int, stacked: bool) -> None:
    ranks = Ranks(whole(name, stacked), tmp_path / "out", tp, groups)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(tp)) * 3
    seen = set()
    with torch.no_grad():
        for number, layer in enumerate(ranks.config.blueprint.layers):
            block = ranks.model.model.layers[number].mlp
            expected = block(x[None])
            expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
            total = torch.zeros_like(x)
            for part in layer.parts:
                seen.add(type(part))
                if isinstance(part, Gated):
                    for rank in range(tp):
                        held = ranks.of(rank, f"model.layers.{number}.mlp")
                        total += gated(x, held["gate_up_proj.weight"], held["down_proj.weight"])
                elif isinstance(part, Experts):
                    total += mixture(name, ranks, number, part, block, x)
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
    assert name == "qwen3_5_text" or Experts in seen


def mixture(name: str, ranks: Ranks, number: int, part: Experts, block: nn.Module, x: Tensor) -> Tensor:
    """The ranks' partial sums, added."""
    weights, numbers = chosen(name, block, x)
    total, module = torch.zeros_like(x), f"model.layers.{number}.{module_of(ranks, number)}"
    for rank in range(ranks.tp):
        held, (first, adds) = ranks.of(rank, module), ranks.experts(rank, number)
        stacks = {key.removeprefix("experts."): one for key, one in held.items() if key.startswith("experts.")}
        for expert in range(len(stacks["w2_weight"])):
            share = (weights * (numbers == first + expert)).sum(-1, keepdim=True)  # [T, 1]
            total += share * one_expert(name, x, stacks, expert, adds)
        if part.shared is not None:
            where = part.shared.down.name.removeprefix("mlp.").removesuffix(".down_proj")
            out = gated(x, held[f"{where}.gate_up_proj.weight"], held[f"{where}.down_proj.weight"])
            if part.shared_gate is not None:
                out = torch.sigmoid(x @ held["shared_expert_gate.weight"].T) * out
            total += out
    return total


def local(config: Any, mixer: nn.Module, share: HeadShare, held: dict[str, Tensor], rank: int) -> nn.Module:
    """transformers' module with the heads of ``share``, and with what one rank stores in it."""
    config, query, kv = deepcopy(config), len(share.query), len(share.kv)
    config.num_attention_heads, config.num_key_value_heads = query, kv
    if "kv_b_proj.weight" in held:  # MLA, where every head has its own keys
        config.num_key_value_heads = query
    if "A_log" in held:
        config.linear_num_key_heads, config.linear_num_value_heads = kv, len(held["A_log"])
    for kind in ("weight", "bias"):
        if f"qkv_proj.{kind}" in held:
            rows, key = held.pop(f"qkv_proj.{kind}"), kv * config.head_dim
            for label, one in zip("qkv", rows.split([len(rows) - 2 * key, key, key]), strict=True):
                held[f"{label}_proj.{kind}"] = one
    if rank and "o_proj.bias" in held:
        held["o_proj.bias"] = torch.zeros_like(held["o_proj.bias"])
    module = type(mixer)(config, mixer.layer_idx).eval()
    module.load_state_dict(held, strict=True)
    return module


class OverAll(nn.Module):
    """A norm over the heads of all ranks, of which this rank has some; their mean square is known."""

    def __init__(self, weight: Tensor, mean_square: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.mean_square, self.eps = weight, mean_square, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean_square + self.eps) * self.weight


def with_norms_over_all(parts: list[nn.Module], shares: list[HeadShare], x: Tensor) -> None:
    """What ranks would tell each other: the sum of squares of all queries and, each KV head once, of all keys."""
    for norm, proj, pick in (("q_norm", "q_proj", "query"), ("k_norm", "k_proj", "kv")):
        squares: dict[int, Tensor] = {}
        for part, share in zip(parts, shares, strict=True):
            heads = getattr(part, proj)(x).unflatten(-1, (-1, part.head_dim)).square().sum(-1)
            held = getattr(share, pick)
            squares.update({head: heads[..., at] for at, head in enumerate(range(held.start, held.stop))})
        mean = torch.stack(list(squares.values())).sum(0)[..., None] / (len(squares) * parts[0].head_dim)
        for part in parts:
            old = getattr(part, norm)
            setattr(part, norm, OverAll(old.weight, mean, old.variance_epsilon))


@pytest.mark.grid(2)
@pytest.mark.parametrize("tp", [tp for tp, groups in CUTTINGS if groups == 1])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixers(whole: Whole, tmp_path: Path, name: str, tp: int) -> None:
    """Attention of every kind, latent attention, and gated delta nets."""
    ranks = Ranks(whole(name, False), tmp_path / "out", tp, 1)
    inner = ranks.model.model
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(tp))
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    positions = torch.arange(TOKENS)[None]
    with torch.no_grad():
        table = inner.rotary_emb(x, positions)
        for number, layer in enumerate(ranks.config.blueprint.layers):
            block, shares = inner.layers[number], list(layer.mixer.shares(tp))
            linear = hasattr(block, "linear_attn")
            module, where = (block.linear_attn, "linear_attn") if linear else (block.self_attn, "self_attn")

            def run(one: nn.Module, linear: bool = linear) -> Tensor:
                if linear:
                    return one(x)
                return one(hidden_states=x, position_embeddings=table, attention_mask=mask)[0]

            parts = [
                local(inner.config, module, share, ranks.of(rank, f"model.layers.{number}.{where}"), rank)
                for rank, share in enumerate(shares)
            ]
            if name.startswith("minimax"):
                with_norms_over_all(parts, shares, x)
            total, expected = sum(run(part) for part in parts), run(module)
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
