"""Tiny quantised checkpoints, and what the ranks of a plan compute with what they hold of one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.packing import Held, Index, Matrix, Packer, as_array
from tests.unit.synthetic import source_shapes
from tests.unit.test_simulated_ranks import attend
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import checked_source_plan
from tpctl.partition.plan import PartitionPlan

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Quantised:
    """A checkpoint: its config, its tensors by name, and the matrices of its linears by module."""

    config: dict[str, Any]
    packer: Packer
    tensors: dict[str, Tensor]
    matrices: dict[str, Matrix]

    def plan(self, tp: int, cutting: Cutting = Cutting()) -> PartitionPlan:
        config = ModelConfig.from_dict(self.config, cutting=cutting)
        return checked_source_plan(config, {name: tuple(one.shape) for name, one in self.tensors.items()}, tp)

    def save(self, folder: Path) -> Path:
        """As a checkpoint of two files, with an index."""
        folder.mkdir(parents=True)
        names = sorted(self.tensors)
        files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, held in files.items():
            save_file({name: self.tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def quantise(config: dict[str, Any], packer: Packer, seed: int = 0, kept: Collection[str] = ()) -> Quantised:
    """A checkpoint of ``config``; modules whose names end with one of ``kept`` stay floats."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, Matrix] = {}
    for name, shape in source_shapes(config).items():
        module = name.removesuffix(".weight")
        if not re.search(r"_proj\.weight$", name) or module.endswith(tuple(kept)):
            tensors[name] = torch.randn(shape, generator=rng).bfloat16()
            continue
        made, matrix = packer.pack(*shape, rng)
        tensors |= {module + suffix: tensor for suffix, tensor in made.items()}
        matrices[module] = matrix.numpy()
    return Quantised({**config, "quantization_config": packer.config}, packer, tensors, matrices)


def assembled(plan: PartitionPlan, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a rank, made of ``tensors`` as its pieces say."""
    found = {}
    for name, stored in plan.shards[rank].items():
        first = tensors[next(iter(stored.pieces[0].tensors))] if stored.pieces else torch.zeros(0)
        out = torch.zeros(stored.shape, dtype=first.dtype)
        for piece in stored.pieces:
            for number in range(piece.shape[0] if stored.stacked else 1):
                start, size, at = piece.start, piece.shape, piece.at
                whole = tensors[piece.source.replace("{}", str(start[0] + number))]
                whole = whole.reshape(whole.shape or (1,))
                target = out
                if stored.stacked:
                    whole = whole if "{}" in piece.source else whole[start[0] + number]
                    target, start, size, at = out[at[0] + number], start[1:], size[1:], at[1:]
                taken = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
                target[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))] = taken
        found[name] = out
    return found


@dataclass(frozen=True)
class Local:
    """What a rank has of a module: its outputs and inputs, and the matrix of them."""

    outputs: Index
    inputs: Index
    matrix: Matrix


def locals_of(model: Quantised, plan: PartitionPlan, rank: int, shard: Mapping[str, Tensor]) -> dict[str, Local]:
    """What ``rank`` has of each quantised module, unpacked from its own tensors alone: where they begin, the plan
    says."""
    parts: dict[str, dict[str, tuple[NDArray[Any], tuple[int, ...]]]] = {}
    for stored in plan.shards[rank].values():
        for piece in stored.pieces:
            module = _module(piece.source, model.matrices)
            if module is None:
                continue
            array = as_array(shard[stored.name])
            for number in range(piece.shape[0] if stored.stacked else 1):
                start, size, at, one = piece.start, piece.shape, piece.at, array
                if stored.stacked:
                    one, start, size, at = array[at[0] + number], start[1:], size[1:], at[1:]
                taken = one[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))]
                expert = _of_expert(module, piece.start[0] + number) if stored.stacked else module
                entry = re.sub(r".*[.](w13_|w2_)?", "", stored.name)
                parts.setdefault(expert, {})[entry] = (taken, start)
    return {module: _unpacked(model, module, Held(held)) for module, held in parts.items()}


def _module(source: str, modules: Mapping[str, Matrix]) -> str | None:
    """The quantised module that a tensor is of."""
    found = (source.rpartition(end)[0] for end in (".", "_"))
    return next((one for one in found if one in modules or _of_expert(one, 0) in modules), None)


def _of_expert(module: str, expert: int) -> str:
    """The module of an expert; one that a checkpoint stacks is ``module[expert]``."""
    return module.replace("{}", str(expert)) if "{}" in module else f"{module}[{expert}]"


def _unpacked(model: Quantised, module: str, held: Held) -> Local:
    name, out, inp = model.packer.values
    array, start = held.tensors[name]
    whole = model.matrices[module]

    def features(axis: tuple[int, int], length: int) -> Index:
        dim, unit = axis
        return np.arange(start[dim] * unit, min((start[dim] + array.shape[dim]) * unit, length))

    outputs, inputs = features(out, whole.shape[0]), features(inp, whole.shape[1])
    return Local(outputs, inputs, model.packer.read(held, outputs, inputs))


def check(model: Quantised, tp: int, cutting: Cutting = Cutting(), folder: Path | None = None) -> PartitionPlan:
    """Check that what the ranks hold is what the whole model holds, and that their sums are its results.

    Args:
        folder: of the shards; ``None``: what the plan says.
    """
    plan = model.plan(tp, cutting)
    ranks = []
    for rank in range(tp):
        shard = assembled(plan, model.tensors, rank) if folder is None else read_shard(folder, rank)
        ranks.append(locals_of(model, plan, rank, shard))
    covered = {module: np.zeros(matrix.shape, bool) for module, matrix in model.matrices.items()}
    for held in ranks:
        for module, local in held.items():
            place = np.ix_(local.outputs, local.inputs)
            covered[module][place] = True
            np.testing.assert_allclose(local.matrix, model.matrices[module][place], rtol=1e-6, err_msg=module)
    assert all(found.all() for found in covered.values())
    check_sums(model, ranks)
    return plan


def check_sums(model: Quantised, ranks: list[dict[str, Local]]) -> None:
    """The ranks' partial sums of attention and MLPs of layer 0, against the whole ones."""
    x = np.random.default_rng(1).standard_normal((3, model.config["hidden_size"]))
    for where in sorted({module.rpartition(".")[0] for module in model.matrices if ".layers.0." in module}):
        whole = _inside(model.matrices, where)
        compute = _attention if where.endswith("self_attn") else _mlp
        head_dim = model.config["head_dim"]
        total = np.zeros((len(x), model.config["hidden_size"]))
        for held in ranks:
            mine = _inside({name: local.matrix for name, local in held.items()}, where)
            if mine:
                total += compute(x, mine, head_dim)
        expected = compute(x, whole, head_dim)
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=where)


def _inside(found: Mapping[str, Matrix], where: str) -> dict[str, Array]:
    """The matrices of the linears in a module, by their own names."""
    parts = ((name.rpartition("."), one) for name, one in found.items())
    return {own: one.astype(np.float64) for (outer, _, own), one in parts if outer == where}


def _mlp(x: Array, held: Mapping[str, Array], head_dim: int) -> Array:
    gate, up = x @ held["gate_proj"].T, x @ held["up_proj"].T
    return np.asarray((np.tanh(gate / 100) * up) @ held["down_proj"].T)


def _attention(x: Array, held: Mapping[str, Array], head_dim: int) -> Array:
    q, k, v = (0.1 * (x @ held[f"{name}_proj"].T).reshape(len(x), -1, head_dim) for name in "qkv")
    return attend(q, k, v) @ held["o_proj"].T


def read_shard(folder: Path, rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"model-rank-{rank}-part-*.safetensors")):
        found |= load_file(file)
    assert found
    return found
