"""Loads one rank's shard and runs steps on it: what every device shares, and the CPU's plain way to do it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpctl.arch.config import ModelConfig
from tpctl.arch.splits import LM_HEAD, build_plan
from tpctl.distributed import TPGroup
from tpctl.engine.memory.gpu import GpuShare, reserve
from tpctl.engine.memory.host import CPU_SHARE, available_host_memory, count_blocks
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.errors import EngineError
from tpctl.layers.attention.select import make_backend
from tpctl.layers.rotary import RotaryTable
from tpctl.manifest.manifest import Manifest
from tpctl.models.decoder import Decoder, head_shape
from tpctl.models.loader import load_shard
from tpctl.partition.dtypes import DTYPE_BITS, DTYPES, TORCH_NAMES
from tpctl.wire.settings import EngineConfig


@dataclass
class Launched:
    """A step that has been started: its token ids, or (a subclass) where they will be."""

    batch: ScheduledBatch
    token_ids: list[int]
    logprobs: list[Any] | None = None


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


class ModelRunner:
    """One rank's model, KV cache and sampler.

    Attributes:
        num_blocks: KV blocks, the minimum over the ranks.
        max_model_len: what the model, the settings and the KV cache allow, whichever is least.
        wanted_model_len: the same without the KV cache.
        context_full: what an answer that ends at ``max_model_len`` is told.
        pace: how prompts are best computed beside decodes; ``None``: as fast as possible.
        timings: seconds that each part of the start took.
    """

    def __init__(self, config: EngineConfig, group: TPGroup) -> None:
        self.config = config
        self.group = group
        self.timings: dict[str, float] = {}
        self.pace: Pace | None = None
        self._gpu_share: GpuShare | None = None
        manifest = Manifest.load(config.shard_dir)
        manifest.check_tp(config.tp_size, config.shard_dir)
        manifest.check_files(config.shard_dir, [group.rank])
        self.model_config = ModelConfig.load(config.shard_dir)
        stored = manifest.tensors(group.rank)[LM_HEAD].dtype
        self.dtype = _run_dtype(config.dtype, TORCH_NAMES.get(stored, stored), group.device)
        self.max_model_len = self.wanted_model_len = config.longest(self.model_config.max_position_embeddings)
        self.plan = build_plan(self.model_config, config.tp_size)
        heads = head_shape(self.model_config, self.plan, group.rank)
        self.backend = make_backend(
            config.attention_backend,
            group.device.type,
            self.dtype,
            heads,
            config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
            whole_heads=self.model_config.rope.rotary_dim == heads.head_dim,
        )
        held = manifest.shard(group.rank).nbytes
        # While they are converted, weights are held in either dtype.
        self._check_fits(max(held, held * 8 // DTYPE_BITS[stored] * self.dtype.itemsize))
        warm = Beside(self._warm_up)

        started = time.perf_counter()
        self.rotary = RotaryTable(self.model_config.rope, self.max_model_len, group.device)
        with torch.device("meta"):
            self.model = Decoder(self.model_config, self.plan, self.backend, self.rotary, group, self.dtype)
        files = [config.shard_dir / name for name in manifest.rank_files(group.rank)]
        constants = {name for name, tensor in manifest.tensors(group.rank).items() if tensor.fill}
        self.weight_bytes = load_shard(self.model, files, group.device, constants)
        self.model.eval()
        self.model.optimize()
        self._lap("weights", started)

        started = time.perf_counter()
        warm.wait()
        self._lap("warm-up", started)

        started = time.perf_counter()
        self.sampler = Sampler(group, self.plan.vocab_slices, self.model_config.vocab_size)
        self.num_blocks = group.minimum(self._count_blocks(self._kv_budget()))
        self._fit_model_len()
        self._check_cache()
        self.kv = self.backend.allocate(self.model_config.num_layers, self.num_blocks, self.dtype, group.device)
        self._lap("kv cache", started)

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start a step. On a CPU it ends before the call does."""
        with torch.inference_mode():
            forward = build_forward_batch(batch, self.backend.block_size, self.group.device)
            rows = forward.logits_rows
            hidden = self.model(forward, self.kv, None if len(rows) == forward.num_tokens else rows)
            if not len(rows):
                return Launched(batch, [])
            token_ids, logprobs = self.sampler.sample(self.model.logits(hidden), sampling_rows(batch))
            return Launched(batch, token_ids, logprobs)

    def collect(self, launched: Launched) -> tuple[list[int], list[Any] | None]:
        """Wait for a step: the token ids of its ``batch.sampled``, and log-probabilities where any are wanted."""
        return launched.token_ids, launched.logprobs

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        """Whether the next step can be started before this one's tokens are known on the host."""
        return False

    def info(self) -> dict[str, Any]:
        """What ``Ready`` reports of this rank."""
        return {
            "device": self.group.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tp_size": self.group.size,
            "attention_backend": self.backend.name,
            "kv_cache_dtype": self._kv_cache_dtype,
            "block_size": self.backend.block_size,
            "num_blocks": self.num_blocks,
            "max_model_len": self.max_model_len,
            "wanted_model_len": self.wanted_model_len,
            "kv_cache_bytes": self.num_blocks * self._block_bytes,
            "all_reduce": "NCCL" if self.group.device.type == "cuda" and self.group.size > 1 else None,
            "scheduling_policy": "fcfs" if self.pace is None else "makespan",
            "weight_bytes": self.weight_bytes,
            "timings": self.timings,
        }

    @property
    def _reserve(self) -> int:
        return reserve(self.model_config.num_layers)

    @property
    def _block_bytes(self) -> int:
        return self.backend.bytes_per_block(self.model_config.num_layers, self.dtype)

    @property
    def _kv_cache_dtype(self) -> str:
        return "packed" if getattr(self.backend, "packed", False) else str(self.dtype).removeprefix("torch.")

    def device_memory(self) -> int:
        """Bytes of device memory that tensors take, the maximum over the ranks (collective); 0 on a CPU."""
        device = self.group.device
        return self.group.maximum(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0

    def reserved_memory(self) -> int:
        """Bytes of device memory that torch keeps, for tensors, graphs and later ones; else as ``device_memory``."""
        device = self.group.device
        return self.group.maximum(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0

    def _check_fits(self, weight_bytes: int) -> None:
        """Refuse a shard that this rank's GPU cannot hold, before it is read."""
        if self.group.device.type == "cuda":
            self._gpu_share = GpuShare.of(self.group.device, self.config.gpu_memory_utilization)
            self._gpu_share.check_weights(self.group.rank, weight_bytes)

    def _warm_up(self) -> None:
        """What a device needs before its first step besides the weights; runs while they load."""

    def _kv_budget(self) -> int:
        """Bytes that this rank's KV cache may take."""
        if self.config.kv_cache_memory is not None:
            return self.config.kv_cache_memory
        if self._gpu_share is not None:
            # The reference gathers the keys and values that it reads anew: what is left is for both.
            left = self._gpu_share.nbytes - self._gpu_share.taken(self.group.device) - self._reserve
            return max(left, 0) // 2
        return int(available_host_memory() * CPU_SHARE) // self.group.size

    def _fit_model_len(self) -> None:
        """Lower ``max_model_len`` to what the KV cache holds, unless it was asked for."""
        held = self.num_blocks * self.backend.block_size
        if self.config.max_model_len is not None and held < self.max_model_len:
            blocks = -(-self.max_model_len // self.backend.block_size)
            needed = blocks * self._block_bytes
            raise EngineError(
                f"--max-model-len {self.max_model_len} does not fit: the KV cache holds {held} tokens; "
                f"give --kv-cache-memory {needed} (bytes a rank) or more, or lower the length"
            )
        self.max_model_len = min(self.max_model_len, held)
        self.context_full = f"prompt and answer fill the context of {self.max_model_len} tokens"
        if held < self.wanted_model_len:
            self.context_full = (
                f"the KV cache holds {held} tokens, fewer than the model's {self.wanted_model_len}; "
                "raise --kv-cache-memory"
            )

    def _check_cache(self) -> None:
        """Refuse a KV cache that was asked for (``--kv-cache-memory``) and that the memory left cannot hold."""
        if self.config.kv_cache_memory is None:
            return
        device = self.group.device
        where = "its GPU" if device.type == "cuda" else "its part of this machine's memory"
        free, used = self._room_for_cache(), self.num_blocks * self._block_bytes
        if used > free:
            raise EngineError(
                f"rank {self.group.rank} cannot hold a KV cache of {used / 2**30:.2f} GiB "
                f"(--kv-cache-memory {self.config.kv_cache_memory / 2**30:.2f} GiB, but no more than "
                f"{self.config.max_num_seqs} sequences of {self.max_model_len} tokens can use): {where} has "
                f"{max(0, free) / 2**30:.2f} GiB left for it; lower --kv-cache-memory, --max-num-seqs or "
                "--max-model-len, or leave the first out"
            )

    def _room_for_cache(self) -> int:
        """Bytes that are free now and that no step will need."""
        device = self.group.device
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] - self._reserve
        return available_host_memory() // self.group.size

    def _count_blocks(self, budget: int) -> int:
        block_size = self.backend.block_size
        return count_blocks(budget, self._block_bytes, block_size, self.max_model_len, self.config.max_num_seqs)

    def _lap(self, what: str, started: float) -> None:
        self.timings[what] = round(time.perf_counter() - started, 3)


def sampling_rows(batch: ScheduledBatch) -> list[SamplingRow]:
    """What the sampler needs for each of ``batch.sampled``; all tokens before must be known."""
    rows = []
    for item in batch.sampled:
        sequence = item.sequence
        banned = sequence.stop_token_ids if item.num_generated < sequence.params.min_tokens else ()
        rows.append(SamplingRow(sequence.params, item.end, sequence.token_ids, sequence.num_prompt_tokens, banned))
    return rows


def _run_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """``"auto"`` runs what is stored; CPUs have no float16 arithmetic worth using, so there it becomes float32."""
    name = stored if wanted == "auto" else wanted
    if name not in DTYPES:
        raise EngineError(f"the shard's weights are {name}, which cannot be run; use --dtype {', '.join(DTYPES)}")
    if name == "float16" and wanted == "auto" and device.type == "cpu":
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
