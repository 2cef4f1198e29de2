"""Simulated ranks of Gemma 4, Ministral 3 and models that see: shards compute what the modules of transformers do.

Projections' outputs concatenate by the plan, those of row-parallel linears, MLPs and experts sum, tables of embeddings
sum, norms over all heads are slices; and every rank's queries meet the keys and values they belong to. Float32.

Shapes: T tokens, H hidden, Q/K query and KV heads, D head size, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_dense import ALONE, make_either
from tpctl.arch.block import Attention, Experts, Gated, LayerPart, linears
from tpctl.arch.config import ModelConfig
from tpctl.arch.linear import Linear
from tpctl.arch.source_plan import source_plan
from tpctl.checkpoint.folder import CheckpointFolder
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import Rule
from tpctl.sharding.cutting.shard import shard_checkpoint

TOKENS = torch.tensor([[3, 130, 7, 64, 65, 12, 99]])


@dataclass
class Run:
    """A model of transformers, and what went through its modules: (arguments, result) by their names."""

    folder: Path
    config: ModelConfig
    names: frozenset[str]
    through: dict[str, tuple[tuple[Any, ...], Any]]
    modules: dict[str, Any]

    def shards(self, tp_size: int, folder: Path) -> tuple[PartitionPlan, list[dict[str, Tensor]]]:
        """The plan, and every rank's tensors as they are stored."""
        shard_checkpoint(self.folder, folder, tp_size, text_only=True)
        ranks: list[dict[str, Tensor]] = [{} for _ in range(tp_size)]
        for rank, held in enumerate(ranks):
            for path in folder.glob(f"model-rank-{rank}-part-*.safetensors"):
                held.update(load_file(path))
        return source_plan(self.config, self.names, tp_size), ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    class Made(dict[str, Run]):
        def __missing__(self, name: str) -> Run:
            folder = tmp_path_factory.mktemp(name) / "model"
            model = make_either(name, folder)
            self[name] = _run(folder, model)
            return self[name]

    return Made()


def _run(folder: Path, model: Any) -> Run:
    through: dict[str, tuple[tuple[Any, ...], Any]] = {}
    modules = {name.replace("model.language_model.", "model."): module for name, module in model.named_modules()}

    def keep(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...], result: Any) -> None:
            through[name] = given, result

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(TOKENS)
    names = frozenset(CheckpointFolder.open(folder).shapes)
    return Run(folder, ModelConfig.load(folder), names, through, modules)


@pytest.mark.parametrize("name", [*ALONE, "mistral3-ministral", "gemma4-moe", "gemma4-edge", "gemma4-unified"])
def test_ranks_together_compute_what_transformers_computes(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs[name]
    for tp_size in range(1, run.config.blueprint.max_tp + 1):
        plan, ranks = run.shards(tp_size, tmp_path / f"{tp_size}")
        met: dict[str, int] = defaultdict(int)
        for number, layer in enumerate(run.config.blueprint.layers):
            for part in layer.parts:
                _check(run, plan, ranks, f"model.layers.{number}.", part, met)
            _check_heads(run, plan, ranks, number)
        for part in run.config.blueprint.beside:
            _check(run, plan, ranks, "", part, met)
        _check_head(run, plan, ranks)
        layers = len(run.config.blueprint.layers)
        assert met["projections"] == met["output"] == met["mlp"] == layers
        assert met["experts"] == layers * ("moe" in name)
        assert met["table"] == ("edge" in name)


def _check(
    run: Run, plan: PartitionPlan, ranks: list[dict[str, Tensor]], prefix: str, part: LayerPart, met: dict[str, int]
) -> None:
    if isinstance(part, Attention):
        for one in linears(part):
            _check(run, plan, ranks, prefix, one, met)
    elif isinstance(part, Linear) and part.rule is Rule.QKV:
        _check_columns(run, plan, ranks, prefix, part)
        met["projections"] += 1
    elif isinstance(part, Linear) and part.rule is Rule.ROW:
        _check_rows(run, plan, ranks, prefix, part)
        met["output"] += 1
    elif isinstance(part, Linear) and part.rule is Rule.VOCAB:
        _check_table(run, ranks, part.name)
        met["table"] += 1
    elif isinstance(part, Linear):
        (given, *_), result = run.through[prefix + part.name]
        for held in ranks:
            _equal(given @ held[f"{prefix}{part.name}.weight"].T, result)
    elif isinstance(part, Gated):
        _check_mlp(run, ranks, prefix, part)
        met["mlp"] += 1
    elif isinstance(part, Experts):
        _check_experts(run, ranks, prefix, part)
        met["experts"] += 1
    assert list(linears(part)) or not isinstance(part, Gated | Experts | Attention)


def _check_columns(run: Run, plan: PartitionPlan, ranks: list[dict[str, Tensor]], prefix: str, linear: Linear) -> None:
    """Each rank's outputs lie where the plan says, and all of them are there."""
    stored = f"{prefix}{linear.name}"
    seen: dict[str, set[int]] = defaultdict(set)
    for shard, held in zip(plan.shards, ranks, strict=True):
        for piece in shard[f"{stored}.weight"].pieces:
            part = next(part for part in linear.parts if part.label == piece.label)
            (given, *_), result = run.through[prefix + part.source]
            bias = held.get(f"{stored}.bias")
            found = F.linear(given, held[f"{stored}.weight"], bias)
            first, at, rows = piece.start[0], piece.at[0], piece.shape[0]
            _equal(found[..., at : at + rows], result[..., first : first + rows])
            seen[part.source] |= set(range(first, first + rows))
    for part in linear.parts:
        assert seen[part.source] == set(range(part.length))


def _check_rows(run: Run, plan: PartitionPlan, ranks: list[dict[str, Tensor]], prefix: str, linear: Linear) -> None:
    """The ranks' partial sums, of the inputs that the plan gives them, are the output; rank 0 adds the bias."""
    stored = f"{prefix}{linear.name}"
    (given, *_), result = run.through[prefix + linear.parts[0].source]
    total = torch.zeros_like(result)
    for rank, (shard, held) in enumerate(zip(plan.shards, ranks, strict=True)):
        (piece,) = shard[f"{stored}.weight"].pieces
        first, columns = piece.start[1], piece.shape[1]
        bias = held.get(f"{stored}.bias") if rank == 0 else None
        total += F.linear(given[..., first : first + columns], held[f"{stored}.weight"], bias)
    _equal(total, result)


def _check_table(run: Run, ranks: list[dict[str, Tensor]], name: str) -> None:
    """Looked up rows, of the rank that has them."""
    table = run.modules[name].weight
    ids, total, first = torch.arange(len(table)), torch.zeros_like(table), 0
    for held in ranks:
        rows = held[f"{name}.weight"]
        mine = (ids >= first) & (ids < first + len(rows))
        total[mine] += rows[ids[mine] - first]
        first += len(rows)
    _equal(total, table)


def _acted(gated: Gated | Experts, gate: Tensor) -> Tensor:
    silu = isinstance(gated, Gated) and gated.activation == "silu"
    return F.silu(gate) if silu else F.gelu(gate, approximate="tanh")


def _check_mlp(run: Run, ranks: list[dict[str, Tensor]], prefix: str, mlp: Gated) -> None:
    (given, *_), result = run.through[f"{prefix}mlp"]
    total = torch.zeros_like(result)
    for rank, held in enumerate(ranks):
        biases = (held.get(f"{prefix}mlp.{name}.bias") for name in ("gate_up_proj", "down_proj"))
        up_bias, down_bias = biases
        gate, up = F.linear(given, held[f"{prefix}mlp.gate_up_proj.weight"], up_bias).chunk(2, -1)
        total += F.linear(
            _acted(mlp, gate) * up, held[f"{prefix}mlp.down_proj.weight"], down_bias if rank == 0 else None
        )
    _equal(total, result)


def _check_experts(run: Run, ranks: list[dict[str, Tensor]], prefix: str, experts: Experts) -> None:
    """Partial sums of each expert, with the weights that the router gave."""
    (x_TH, chosen, weights), result = run.through[f"{prefix}experts"]
    total = torch.zeros_like(result)
    for held in ranks:
        w13_EIH, w2_EHI = held[f"{prefix}experts.w13_weight"], held[f"{prefix}experts.w2_weight"]
        assert len(w13_EIH) == len(w2_EHI) == experts.count
        for token, x_H in enumerate(x_TH):
            for expert, weight in zip(chosen[token], weights[token], strict=True):
                gate, up = (w13_EIH[expert] @ x_H).chunk(2)
                total[token] += weight * (w2_EHI[expert] @ (_acted(experts, gate) * up))
        for name in ("scale", "per_expert_scale"):
            _equal(held[f"{prefix}router.{name}"], getattr(run.modules[f"{prefix}router"], name))
    _equal(total, result)


def _check_heads(run: Run, plan: PartitionPlan, ranks: list[dict[str, Tensor]], number: int) -> None:
    """Attention without positions and masks, of what the projections gave: the ranks' sums are the whole.

    Keys are values where a layer has none, and an earlier layer's where it reads those.
    """
    layers = run.config.blueprint.layers
    mixer, prefix = layers[number].mixer, f"model.layers.{number}."
    assert isinstance(mixer, Attention)
    out, head_dim = mixer.out, mixer.head_dim
    source = number if mixer.reads is None else mixer.reads

    def whole(label: str, layer: int) -> Tensor:
        name = f"model.layers.{layer}.self_attn.{label}_proj"
        return run.through[name if name in run.through else name.replace("v_proj", "k_proj")][1][0]

    def outputs(rank: int, layer: int) -> dict[str, Tensor]:
        read = layers[layer].mixer.qkv  # type: ignore[union-attr]
        name = f"model.layers.{layer}.{read.name}"
        (given, *_), _ = run.through[f"model.layers.{layer}.{read.parts[0].source}"]
        found = F.linear(given[0], ranks[rank][f"{name}.weight"], ranks[rank].get(f"{name}.bias"))
        pieces = plan.shards[rank][f"{name}.weight"].pieces
        return {piece.label: found[:, piece.at[0] : piece.at[0] + piece.shape[0]] for piece in pieces}

    q, k, v = whole("q", number), whole("k", source), whole("v", source)
    out_name = f"{prefix}{out.name}"
    weight = run.modules[f"{prefix}self_attn.o_proj"].weight
    expected = _attended(q, k, v, head_dim) @ weight.T
    total = torch.zeros_like(expected)
    for rank in range(plan.tp_size):
        kv = outputs(rank, source)
        mine = _attended(outputs(rank, number)["q"], kv["k"], kv.get("v", kv["k"]), head_dim)
        total += mine @ ranks[rank][f"{out_name}.weight"].T
    _equal(total, expected)


def _attended(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """[T, Q * D], of equal groups of query heads over KV heads."""
    q_TQD, k_TKD, v_TKD = (one.unflatten(1, (-1, head_dim)) for one in (q, k, v))
    group = q_TQD.shape[1] // k_TKD.shape[1]
    k_TQD, v_TQD = k_TKD.repeat_interleave(group, 1), v_TKD.repeat_interleave(group, 1)
    shares = (torch.einsum("tqd,sqd->qts", q_TQD, k_TQD) / 10).softmax(-1)
    return torch.einsum("qts,sqd->tqd", shares, v_TQD).flatten(1)


def _check_head(run: Run, plan: PartitionPlan, ranks: list[dict[str, Tensor]]) -> None:
    """Logits concatenate over the padded vocabulary, and looked up embeddings sum."""
    (given, *_), result = run.through["lm_head"]
    logits = torch.cat([given @ held["lm_head.weight"].T for held in ranks], -1)
    _equal(logits[..., : result.shape[-1]], result)
    assert [len(one) for one in plan.vocab_slices] == [len(held["lm_head.weight"]) for held in ranks]
    if not run.config.blueprint.tied:
        _check_table(run, ranks, "model.embed_tokens")


def _equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
