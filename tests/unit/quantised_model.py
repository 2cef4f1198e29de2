"""Tiny quantised checkpoints, and what the ranks of a plan compute with what they hold of one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit import layer_sums
from tests.unit.layer_sums import Local
from tests.unit.packers import PACKERS
from tests.unit.packing import Held, Index, Matrix, Packer, as_array
from tpctl.arch.block import Experts, linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.linear import Linear
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held, checked_source_plan, source_plan
from tpctl.arch.storage import Storage
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH, Rule


def _floats(held: Held, outputs: Index, inputs: Index) -> Matrix:
    return np.asarray(held("weight", outputs, inputs), np.float32)


def _random(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    weight = torch.randn((n, k), generator=rng).bfloat16()
    return {".weight": weight}, weight.float()


def _turned(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    made, matrix = _random(k, n, rng)
    return made, matrix.T


def _turned_floats(held: Held, outputs: Index, inputs: Index) -> Matrix:
    return _floats(held, inputs, outputs).T


FLOATS = Packer({}, ("weight", (0, 1), (1, 1)), _random, _floats)
TRANSPOSED = Packer({}, ("weight", (1, 1), (0, 1)), _turned, _turned_floats)
"""Linears that a format leaves as they are; stored [in, out] in gpt-oss' stacks."""


@dataclass(frozen=True)
class Quantised:
    """A checkpoint: its config, its tensors by name, and the matrices of its quantised linears by module; those of
    linears that are ``floats`` likewise. Modules have ``packers`` of their own where theirs is not the model's. An
    expert that is stacked is ``module[expert]``."""

    config: dict[str, Any]
    packer: Packer
    tensors: dict[str, Tensor]
    matrices: dict[str, Matrix]
    floats: dict[str, Matrix] = field(default_factory=dict, kw_only=True)
    packers: dict[str, Packer] = field(default_factory=dict, kw_only=True)

    @property
    def every(self) -> dict[str, Matrix]:
        """The matrices of all linears."""
        return {**self.matrices, **self.floats}

    def held(self, cutting: Cutting = Cutting()) -> Blueprint:
        """The model in the form that the checkpoint has."""
        return as_held(ModelConfig.from_dict(self.config, cutting=cutting), self.tensors).blueprint

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


def quantise(config: dict[str, Any], packer: Packer, seed: int = 0, *, stacked: bool = False) -> Quantised:
    """A checkpoint of ``config`` whose linears are stored as ``packer.config`` says.

    Args:
        stacked: of experts that may be stored in two forms, in that of stacks; otherwise one by one.
    """
    rng = torch.Generator().manual_seed(seed)
    whole = {**config, "quantization_config": packer.config}
    parsed = ModelConfig.from_dict(whole)
    model = Quantised(whole, packer, {}, {})
    told = _told(parsed.blueprint, stacked)
    blueprint, shapes = as_held(parsed, told).blueprint, source_plan(parsed, told, 1).source_shapes
    places = [
        (blueprint.prefix.format(number), part) for number, at in enumerate(blueprint.layers) for part in at.parts
    ]
    for prefix, part in [*(("", part) for part in blueprint.beside), *places]:
        for linear in linears(part):
            if linear.rule is not Rule.VOCAB:
                _pack(model, prefix, linear, shapes, rng)
    for name, shape in source_plan(parsed, model.tensors, 1).source_shapes.items():
        if name not in model.tensors:
            model.tensors[name] = torch.randn(shape, generator=rng).bfloat16()
    return model


def _told(blueprint: Blueprint, stacked: bool) -> set[str]:
    """The names that tell which form the experts of every layer are in."""
    names = set()
    for number, layer in enumerate(blueprint.layers):
        for part in layer.parts:
            if isinstance(part, Experts):
                forms = [part.gate_up, *(gate_up for gate_up, _, _ in part.forms)]
                fitting = [one for one in forms if (EACH not in one.parts[0].source) is stacked] or forms
                source = fitting[0].parts[0].source.replace(EACH, "0")
                names.add(blueprint.prefix.format(number) + source + fitting[0].storage.entries[0].suffix)
    return names


def _pack(
    model: Quantised, prefix: str, linear: Linear, shapes: Mapping[str, tuple[int, ...]], rng: torch.Generator
) -> None:
    """Add the tensors of ``linear``, packed, and its matrices, to ``model``."""
    for source in dict.fromkeys(part.source for part in linear.parts):
        rows = max(part.offset + part.length for part in linear.parts if part.source == source)
        suffixes = [entry.suffix for entry in linear.storage]
        stacked = linear.stack is not None and EACH not in source
        packer = _packer(model.packer, linear.storage, stacked)
        made: dict[str, list[Tensor]] = {}
        for expert in range(1 if linear.stack is None else linear.stack.count):
            tensors, matrix = packer.pack(rows, linear.inputs, rng)
            module = prefix + source if linear.stack is None else _of_expert(prefix + source, expert)
            kind = model.floats if linear.storage.is_dense else model.matrices
            kind[module], model.packers[module] = matrix.numpy(), packer
            for name, tensor in tensors.items():
                made.setdefault(name, []).append(tensor)
        for name, found in made.items():
            suffix = next((entry.suffix for entry in linear.storage if f".{entry.name}" == name), name)
            assert not stacked or suffix in suffixes, (name, suffixes)
            if stacked:
                whole = prefix + source + suffix
                model.tensors[whole] = torch.stack(found).reshape(shapes[whole]).contiguous()
                continue
            for expert, tensor in enumerate(found):
                model.tensors[(prefix + source).replace(EACH, str(expert)) + suffix] = tensor


def _packer(packer: Packer, storage: Storage, stacked: bool) -> Packer:
    """Of linears that are stored so. FP8 whose config says nothing of blocks has them where experts are stacked."""
    if storage.is_dense:
        (entry,) = storage.entries
        return FLOATS if entry.out is not None and entry.out.dim == 0 else TRANSPOSED
    return PACKERS["fp8"] if stacked and packer is PACKERS["fp8 of vllm"] else packer


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


def locals_of(model: Quantised, plan: PartitionPlan, rank: int, shard: Mapping[str, Tensor]) -> dict[str, Local]:
    """What ``rank`` has of each module, unpacked from its own tensors alone: where they begin, the plan says. Of one
    that holds several parts, ``module:label`` each."""
    every = model.every
    parts: dict[str, dict[str, dict[str, tuple[NDArray[Any], tuple[int, ...]]]]] = {}
    for stored in plan.shards[rank].values():
        for piece in stored.pieces:
            module = _module(piece.source, every)
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
                parts.setdefault(expert, {}).setdefault(entry, {})[piece.label] = (taken, start)
    return {
        key: local
        for module, entries in parts.items()
        for key, local in _unpacked(model.packers.get(module, model.packer), every[module].shape, module, entries)
    }


def _module(source: str, modules: Mapping[str, Matrix]) -> str | None:
    """The module that a tensor is of."""
    found = (source, *(source.rpartition(end)[0] for end in (".", "_", "_scale")))
    return next((one for one in found if one in modules or _of_expert(one, 0) in modules), None)


def _of_expert(module: str, expert: int) -> str:
    """The module of an expert; one that a checkpoint stacks is ``module[expert]``."""
    return module.replace(EACH, str(expert)) if EACH in module else f"{module}[{expert}]"


def _unpacked(
    packer: Packer,
    shape: tuple[int, ...],
    module: str,
    entries: Mapping[str, Mapping[str, tuple[NDArray[Any], tuple[int, ...]]]],
) -> Iterator[tuple[str, Local]]:
    name, out, inp = packer.values
    several = len(entries[name]) > 1
    for label, (array, start) in entries[name].items():
        # What is one for the whole module has no label.
        held = Held({one: found[label] if label in found else found[""] for one, found in entries.items()})

        def features(axis: tuple[int, int], length: int) -> Index:
            dim, unit = axis
            return np.arange(start[dim] * unit, min((start[dim] + array.shape[dim]) * unit, length))  # noqa: B023

        outputs, inputs = features(out, shape[0]), features(inp, shape[1])
        yield f"{module}:{label}" if several else module, Local(outputs, inputs, packer.read(held, outputs, inputs))


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
    every = model.every
    covered = {module: np.zeros(matrix.shape, bool) for module, matrix in every.items()}
    for held in ranks:
        for key, local in held.items():
            module, place = key.partition(":")[0], np.ix_(local.outputs, local.inputs)
            covered[module][place] = True
            np.testing.assert_allclose(local.matrix, every[module][place], rtol=1e-6, err_msg=key)
    assert all(found.all() for found in covered.values())
    layer_sums.check(model.held(cutting), model.config, every, ranks)
    return plan


def read_shard(folder: Path, rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"model-rank-{rank}-part-*.safetensors")):
        found |= load_file(file)
    assert found
    return found
