"""Loads one rank's shard: a model whose weights are on the device, and all that is known before a KV cache is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tpctl.accounting import KvLayout, LayerPool, slab_bytes, state_bytes
from tpctl.arch.block import linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.delta_net import DeltaNet, state_sizes
from tpctl.arch.growth import growth
from tpctl.arch.latent import Attending
from tpctl.distributed import TPGroup
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.memory.host import available_host_memory
from tpctl.engine.runners.outline import Outline, outline
from tpctl.engine.sampling.sampler import Sampler
from tpctl.layers.attention.base import AttentionBackend, LayerKV
from tpctl.layers.delta_net.state import LayerState
from tpctl.layers.rotary import RotaryTable
from tpctl.manifest.records import ManifestTensor
from tpctl.models.decoder import Decoder
from tpctl.models.loader import load_shard
from tpctl.partition.dtypes import DTYPE_BITS
from tpctl.partition.plan import PartitionPlan
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
        kept: list[LayerKV | LayerState] = []
        for block in self.config.blueprint.blocks:
            one = block.attention
            if isinstance(one, DeltaNet):
                sizes = one.sizes_of(group.rank, group.size)
                kept.append(LayerState.allocate(sizes, num_states, self.dtype, group.device))
            else:
                reads = one.reads if isinstance(one, Attending) else None
                kept.append(next(kv) if reads is None else kept[reads])
        return kept

    def predictor_cache(self, num_blocks: int) -> LayerKV:
        """What the predictor keeps of sequences, in blocks of the same numbers, zeroed."""
        assert self.predicting is not None
        (kept,) = self.predicting.allocate(num_blocks, self.dtype, self.group.device)
        return kept


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
    outlined = outline(settings, group)
    manifest, tensors, idle, dtype = outlined.manifest, outlined.tensors, outlined.idle, outlined.dtype
    # While they are converted, weights are held in either form.
    unread = sum(prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8 for tensor in idle.values())
    made_of = outlined.config.blueprint
    held = max(manifest.shard(group.rank).nbytes - unread, run_bytes(outlined.plan, made_of, tensors, dtype))
    share = _share(settings, group, held)
    warm = None if warm_up is None else Beside(lambda: warm_up(group, dtype))

    timings, started = Timings(), time.perf_counter()
    slab = slab_bytes(outlined.pools[group.rank], outlined.layout)
    rotaries = outlined.tables(_most_tokens(settings, share, slab, outlined.layout, outlined.wanted_len))
    with torch.device("meta"):
        model = outlined.decoder(rotaries)
    files = [settings.shard_dir / name for name in manifest.rank_files(group.rank)]
    constants = {name for name, tensor in tensors.items() if not tensor.pieces}
    weight_bytes = load_shard(model, files, group.device, constants | idle.keys())
    model.eval()
    timings.lap("weights", started)

    if warm is not None:
        started = time.perf_counter()
        warm.wait()
        timings.lap("warm-up", started)
    return of_model(outlined, model, rotaries, weight_bytes=weight_bytes, share=share, timings=timings)


def of_model(
    outlined: Outline,
    model: Decoder,
    rotaries: tuple[RotaryTable | None, ...],
    *,
    weight_bytes: int = 0,
    share: GpuShare | None = None,
    timings: Timings | None = None,
) -> LoadedModel:
    """All that is known of a model, with the weights in it."""
    return LoadedModel(
        settings=outlined.settings,
        group=outlined.group,
        config=outlined.config,
        dtype=outlined.dtype,
        backend=outlined.backend,
        predicting=outlined.predicting,
        pools=outlined.pools[outlined.group.rank],
        layout=outlined.layout,
        rotaries=rotaries,
        model=model,
        sampler=Sampler(outlined.group, outlined.plan.vocab_slices, outlined.config.vocab_size),
        weight_bytes=weight_bytes,
        wanted_len=outlined.wanted_len,
        share=share,
        timings=Timings() if timings is None else timings,
    )


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
