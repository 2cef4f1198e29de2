"""Loads one rank's shard: a model whose weights are on the device, and all that is known before a KV cache is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from tpctl.accounting import KvLayout, LayerPool, LayerPools, layout_of, pools_of, slab_bytes, state_bytes
from tpctl.arch.block import linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.delta_net import DeltaNet, state_sizes
from tpctl.arch.growth import growth
from tpctl.arch.latent import Attending
from tpctl.arch.predictor import PREFIX
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held, build_plan, check_scaled
from tpctl.distributed import TPGroup
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.memory.host import available_host_memory
from tpctl.engine.sampling.sampler import Sampler
from tpctl.errors import EngineError, UnsupportedModelError
from tpctl.layers.attention.base import AttentionBackend, LayerKV, kept_layer
from tpctl.layers.attention.latent import spec_of
from tpctl.layers.attention.select import make_backend
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.rotary import RotaryTable, rotary_tables
from tpctl.manifest.manifest import Manifest
from tpctl.manifest.records import ManifestTensor
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.partition.dtypes import DTYPE_BITS, DTYPES, TORCH_NAMES
from tpctl.partition.plan import PartitionPlan
from tpctl.partition.split import EACH
from tpctl.wire.settings import EngineConfig


class Timings(dict[str, float]):
    """Seconds that each part of the start took."""

    def lap(self, what: str, started: float) -> None:
        self[what] = round(time.perf_counter() - started, 3)


@dataclass(frozen=True)
class LoadedModel:
    """One rank's model, before it is known how large its KV cache will be.

    Attributes:
        predicting: that of the predictor, where there is one.
        pools: what a block takes on this rank, the predictor's part included. layout: how KV memory is divided into
            blocks, on all ranks.
        rotaries: every layer's table, if it rotates, and the predictor's; layers that rotate alike share one.
        wanted_len: the longest sequence that the model and the settings allow.
        share: what the rank may take of its GPU.
    """

    settings: EngineConfig
    group: TPGroup
    config: ModelConfig
    dtype: torch.dtype
    backend: AttentionBackend[Any]
    predicting: AttentionBackend[Any] | None
    pools: list[LayerPool]
    layout: KvLayout
    rotaries: tuple[RotaryTable | None, ...]
    model: Decoder
    sampler: Sampler
    weight_bytes: int
    wanted_len: int
    share: GpuShare | None
    timings: Timings

    @property
    def slab_bytes(self) -> int:
        """What a slab of KV blocks takes on this rank; with one pool, a block."""
        return slab_bytes(self.pools, self.layout)

    @property
    def state_bytes(self) -> int:
        """What one sequence's state takes on this rank; 0 without recurrent layers."""
        nets = state_sizes(self.config.blueprint, self.group.rank, self.group.size)
        return state_bytes((one.kept for one in nets), self.dtype.itemsize)

    def caches(self, num_blocks: int, num_states: int) -> list[LayerKV | LayerState]:
        """What each layer keeps of sequences, zeroed; of one that reads an earlier layer's, that one's."""
        group = self.group
        kv = iter(self.backend.allocate(num_blocks, self.dtype, group.device, self.layout))
        found: list[LayerKV | LayerState] = []
        for block in self.config.blueprint.blocks:
            one = block.attention
            if isinstance(one, DeltaNet):
                sizes = one.sizes_of(group.rank, group.size)
                found.append(LayerState.allocate(sizes, num_states, self.dtype, group.device))
            else:
                reads = one.reads if isinstance(one, Attending) else None
                found.append(next(kv) if reads is None else found[reads])
        return found

    def predictor_cache(self, num_blocks: int) -> LayerKV:
        """What the predictor keeps of sequences, in blocks of the same numbers, zeroed."""
        assert self.predicting is not None
        (found,) = self.predicting.allocate(num_blocks, self.dtype, self.group.device)
        return found


def load(
    settings: EngineConfig, group: TPGroup, warm_up: Callable[[TPGroup, torch.dtype], object] | None = None
) -> LoadedModel:
    """Read this rank's shard.

    Args:
        warm_up: what the device needs before its first step besides the weights; done while they load.

    Raises:
        ShardFolderError: the folder is none, or not for this many ranks.
        UnsupportedModelError: it was cut from codes without scales, or does not run on this device; or its predictor is
            to draft tokens, and there is none.
        EngineError: the settings do not fit the model, or the weights do not fit the device.
    """
    folder = settings.shard_dir
    manifest = Manifest.load(folder)
    manifest.check_tp(settings.tp_size, folder)
    manifest.check_files(folder, [group.rank])
    tensors = dict(manifest.tensors(group.rank))
    config = _predicting(settings, group, _config(folder, manifest, tensors))
    made_of = config.blueprint
    idle = {} if made_of.predictor is not None else {n: one for n, one in tensors.items() if n.startswith(PREFIX)}
    tensors = {name: one for name, one in tensors.items() if name not in idle}
    made_of.check_runs(group.device.type)
    if made_of.tied and made_of.head not in tensors:  # in shards for vLLM it may have the embedding's name
        tensors[made_of.head] = tensors.pop(made_of.embedding)
    plan = build_plan(config, settings.tp_size)
    there = [split for split in plan.splits if split.name in tensors]
    check_scaled(config, there, {split.name: {split.name: tensors[split.name].dtype} for split in there})
    stored = tensors[made_of.head].dtype
    dtype = _run_dtype(settings.dtype, TORCH_NAMES.get(stored, stored), group.device)
    wanted_len = settings.longest(config.max_position_embeddings)
    backend, predicting, pools = _backends(settings, group, dtype, made_of, wanted_len)
    layout = layout_of(pools, backend.block_size)
    # While they are converted, weights are held in either form.
    unread = sum(prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8 for tensor in idle.values())
    held = max(manifest.shard(group.rank).nbytes - unread, run_bytes(plan, made_of, tensors, dtype))
    share = _share(settings, group, held)
    warm = None if warm_up is None else Beside(lambda: warm_up(group, dtype))

    timings, started = Timings(), time.perf_counter()
    longest = _most_tokens(settings, share, slab_bytes(pools[group.rank], layout), layout, wanted_len)
    blocks = (*made_of.blocks, *(() if made_of.predictor is None else (made_of.predictor.block,)))
    ropes = [one.rope if isinstance(one := block.attention, Attending) else None for block in blocks]
    rotaries = rotary_tables(ropes, longest, group.device)
    with torch.device("meta"):
        model = Decoder(made_of, plan, backend, rotaries, group, dtype, tensors.keys(), predicting)
    files = [folder / name for name in manifest.rank_files(group.rank)]
    constants = {name for name, tensor in tensors.items() if not tensor.pieces}
    weight_bytes = load_shard(model, files, group.device, constants | idle.keys())
    model.eval()
    timings.lap("weights", started)

    if warm is not None:
        started = time.perf_counter()
        warm.wait()
        timings.lap("warm-up", started)
    return LoadedModel(
        settings=settings,
        group=group,
        config=config,
        dtype=dtype,
        backend=backend,
        predicting=predicting,
        pools=pools[group.rank],
        layout=layout,
        rotaries=rotaries,
        model=model,
        sampler=Sampler(group, plan.vocab_slices, config.vocab_size),
        weight_bytes=weight_bytes,
        wanted_len=wanted_len,
        share=share,
        timings=timings,
    )


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
        group.device.type,
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
    if settings.speculate in ("mtp", "auto") and group.device.type == "cpu":
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


class Beside:
    """Work in a thread of its own, which an ending program does not wait for."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for its end; raises what it raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller's thread
            self._failure = error


def run_bytes(
    plan: PartitionPlan, blueprint: Blueprint, tensors: Mapping[str, ManifestTensor], dtype: torch.dtype
) -> int:
    """What a rank's weights take when they run in ``dtype``: floats in that, quantised weights and their scales in the
    bytes that they are stored in, or more (``arch.growth``).

    Args:
        tensors: those of its shard, by name.
    """
    held = {
        f"{prefix}{linear.name}{linear.joiner}{entry.name}": (part, linear, entry)
        for prefix, _, part in blueprint.placed()
        for linear in linears(part)
        for entry in linear.storage
    }
    total = 0
    for split in plan.splits:
        if (tensor := tensors.get(split.name)) is not None:
            stored, bits = DTYPE_BITS[tensor.dtype], 8 * dtype.itemsize
            if split.dtypes is not None:
                bits = stored * (growth(*held[split.name], stored, bits) if split.name in held else 1)
            total += prod(tensor.shape) * bits // 8
    return total


def _share(settings: EngineConfig, group: TPGroup, weight_bytes: int) -> GpuShare | None:
    """What the rank may take of its GPU; refuses a shard that the GPU cannot hold, before it is read."""
    if group.device.type != "cuda":
        return None
    share = GpuShare.of(group.device, settings.gpu_memory_utilization)
    share.check_weights(group.rank, weight_bytes)
    return share


def _most_tokens(
    settings: EngineConfig, share: GpuShare | None, slab_bytes: int, layout: KvLayout, wanted_len: int
) -> int:
    """Tokens of the longest sequence that any KV cache here could hold, of up to ``wanted_len``: a model may promise
    millions, whose rotary tables alone would take gigabytes."""
    room = settings.kv_cache_memory
    if room is None:
        room = available_host_memory() if share is None else max(share.nbytes, 0)
    held = layout.longest(room // slab_bytes + 1)
    return wanted_len if held is None else min(wanted_len, held)


def _run_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """``"auto"`` runs what is stored; CPUs have no float16 arithmetic worth using, so there it becomes float32."""
    name = stored if wanted == "auto" else wanted
    if name not in DTYPES:
        raise EngineError(f"the shard's weights are {name}, which cannot be run; use --dtype {', '.join(DTYPES)}")
    if name == "float16" and wanted == "auto" and device.type == "cpu":
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
