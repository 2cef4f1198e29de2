"""What a rank's shard folder says of its model, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from tpctl.accounting import KvLayout, LayerPool, LayerPools, layout_of, pools_of
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.latent import Attending
from tpctl.arch.predictor import PREFIX
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held, build_plan, check_scaled
from tpctl.distributed import TPGroup
from tpctl.errors import EngineError, UnsupportedModelError
from tpctl.layers.attention.base import AttentionBackend, kept_layer
from tpctl.layers.attention.latent import spec_of
from tpctl.layers.attention.select import make_backend
from tpctl.layers.rotary import RotaryTable, rotary_tables
from tpctl.manifest.manifest import Manifest
from tpctl.manifest.records import ManifestTensor
from tpctl.models.decoder import Decoder
from tpctl.partition.dtypes import DTYPES, TORCH_NAMES
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH
from tpctl.wire.settings import EngineConfig


@dataclass(frozen=True)
class Outline:
    """What is known of one rank's model before its weights are read.

    Attributes:
        tensors: those of its shard that are read, by name. idle: those that are not, a predictor's.
        pools: what a block takes on each rank.
    """

    settings: EngineConfig
    group: TPGroup
    config: ModelConfig
    plan: PartitionPlan
    tensors: dict[str, ManifestTensor]
    idle: dict[str, ManifestTensor]
    manifest: Manifest
    dtype: torch.dtype
    wanted_len: int
    backend: AttentionBackend[Any]
    predicting: AttentionBackend[Any] | None
    pools: list[list[LayerPool]]

    @cached_property
    def layout(self) -> KvLayout:
        """How KV memory is divided into blocks, on all ranks."""
        return layout_of(self.pools, self.backend.block_size)

    def tables(self, longest: int) -> tuple[RotaryTable | None, ...]:
        """Every layer's rotary table, and the predictor's, for sequences of so many tokens."""
        made_of = self.config.blueprint
        blocks = (*made_of.blocks, *(() if made_of.predictor is None else (made_of.predictor.block,)))
        ropes = [one.rope if isinstance(one := block.attention, Attending) else None for block in blocks]
        return rotary_tables(ropes, longest, self.group.device)

    def decoder(self, rotaries: tuple[RotaryTable | None, ...]) -> Decoder:
        """The model, on torch's current device, its weights empty."""
        backends = self.backend, self.predicting
        made_of, held = self.config.blueprint, self.tensors.keys()
        return Decoder(made_of, self.plan, backends[0], rotaries, self.group, self.dtype, held, backends[1])


def outline(settings: EngineConfig, group: TPGroup) -> Outline:
    """What this rank's shard folder says (collective). Errors as of ``load``, but for memory and weights."""
    folder = settings.shard_dir
    manifest = Manifest.load(folder)
    manifest.check_tp(settings.tp_size, folder)
    manifest.check_files(folder, [group.rank])
    tensors = dict(manifest.tensors(group.rank))
    config = _predicting(settings, group, _config(folder, manifest, tensors))
    made_of = config.blueprint
    idle = {} if made_of.predictor is not None else {n: one for n, one in tensors.items() if n.startswith(PREFIX)}
    tensors = {name: one for name, one in tensors.items() if name not in idle}
    made_of.check_runs(group.kind)
    if made_of.tied and made_of.head not in tensors:  # in shards for vLLM it may have the embedding's name
        tensors[made_of.head] = tensors.pop(made_of.embedding)
    plan = build_plan(config, settings.tp_size)
    there = [split for split in plan.splits if split.name in tensors]
    check_scaled(config, there, {split.name: {split.name: tensors[split.name].dtype} for split in there})
    stored = tensors[made_of.head].dtype
    dtype = _run_dtype(settings.dtype, TORCH_NAMES.get(stored, stored), group.kind)
    wanted_len = settings.longest(config.max_position_embeddings, config.beyond)
    backends = _backends(settings, group, dtype, made_of, wanted_len)
    return Outline(settings, group, config, plan, tensors, idle, manifest, dtype, wanted_len, *backends)


def _backends(
    settings: EngineConfig, group: TPGroup, dtype: torch.dtype, made_of: Blueprint, longest: int
) -> tuple[AttentionBackend[Any], AttentionBackend[Any] | None, list[list[LayerPool]]]:
    """That of the layers, the predictor's, if there is one, and what a block of both takes on each rank."""
    attentions = made_of.attentions
    specs = [[spec_of(attention, rank, group.size) for attention in attentions] for rank in range(group.size)]
    ranks = [[kept_layer(spec) for spec in of_rank] for of_rank in specs]
    own = len(attentions) - (made_of.predictor is not None)
    make = partial(
        make_backend,
        settings.attention_backend,
        group.kind,
        dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        whole_heads=not any(attention.rotates_part for attention in attentions),
        longest=longest,
    )
    size, predicting = settings.block_size, None
    backend = make(specs[group.rank][:own], size, ranks=[of_rank[:own] for of_rank in ranks])
    pools = backend.pools
    if made_of.predictor is not None:
        assert pools.windows == (None,), "the blocks of the predictor's layer are those of the only pool"
        predicting = make(specs[group.rank][own:], size)
        pools = LayerPools(pools.windows, (*pools.of_layer, 0))
    form = backend.kv_form
    return backend, predicting, [pools_of(one, pools, backend.block_size, dtype.itemsize, form) for one in ranks]


def _config(folder: Path, manifest: Manifest, tensors: Mapping[str, ManifestTensor]) -> ModelConfig:
    """The model as it was cut, and in the form that its checkpoint had."""
    config = ModelConfig.load(folder, Cutting(manifest.expert_parallel, manifest.even, manifest.compat))
    sources = {piece.source.replace(EACH, "0") for tensor in tensors.values() for piece in tensor.pieces}
    config = as_held(config, sources)
    return replace(config, blueprint=replace(config.blueprint, stored=()))


def _predicting(settings: EngineConfig, group: TPGroup, config: ModelConfig) -> ModelConfig:
    """``config`` with a predictor only where it is to draft tokens: on every rank or none (collective).

    Raises:
        UnsupportedModelError: it is asked for by name, and some rank's shards have none.
    """
    blueprint = config.blueprint
    if settings.speculate in ("mtp", "auto"):
        if group.minimum(int(blueprint.predictor is not None)):
            return config
        if settings.speculate == "mtp":
            why = f"a {config.model_type} model has none"
            if config.cutting.engine is not None:
                why = f"those for {config.cutting.engine} have none; shard the model again without --compat"
            elif blueprint.further is not None:
                why = (
                    "the checkpoint has none, or an older tpctl has left it out; if it has tensors named "
                    f"{blueprint.further.source}*, shard it again"
                )
            raise UnsupportedModelError(
                "--speculate mtp takes a layer that predicts more tokens (MTP), which these shards do not hold: "
                f"{why}, or use --speculate ngram"
            )
    return replace(config, blueprint=blueprint.without_predictor())


def _run_dtype(wanted: str, stored: str, kind: str) -> torch.dtype:
    """``"auto"`` runs what is stored; CPUs have no float16 arithmetic worth using, so there it becomes float32."""
    name = stored if wanted == "auto" else wanted
    if name not in DTYPES:
        raise EngineError(f"the shard's weights are {name}, which cannot be run; use --dtype {', '.join(DTYPES)}")
    if name == "float16" and wanted == "auto" and kind == "cpu":
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
