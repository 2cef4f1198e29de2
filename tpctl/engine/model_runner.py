"""Loads one rank's shard and runs steps on it."""

from __future__ import annotations

import time
from typing import Any

import torch

from tpctl.distributed import TPGroup
from tpctl.engine.batch import build_forward_batch
from tpctl.engine.config import EngineConfig
from tpctl.engine.memory import CPU_SHARE, available_host_memory, count_blocks
from tpctl.engine.sampler import Sampler, SamplingRow
from tpctl.engine.scheduler import ScheduledBatch
from tpctl.errors import EngineError
from tpctl.layers.attention.base import kv_bytes_per_block
from tpctl.layers.attention.select import make_backend
from tpctl.layers.rotary import RotaryTable
from tpctl.models.config import ModelConfig
from tpctl.models.decoder import Decoder, head_shape
from tpctl.models.loader import load_shard
from tpctl.models.weights import build_plan
from tpctl.partition.manifest import Manifest


class ModelRunner:
    """One rank's model, KV cache and sampler.

    Attributes:
        num_blocks: KV blocks, the minimum over the ranks.
        max_model_len: what the model, the settings and the KV cache allow, whichever is least.
        timings: seconds that each part of the start took.
    """

    def __init__(self, config: EngineConfig, group: TPGroup) -> None:
        self.group = group
        self.timings: dict[str, float] = {}
        started = time.perf_counter()
        manifest = Manifest.load(config.shard_dir)
        manifest.check_tp(config.tp_size, config.shard_dir)
        manifest.check_files(config.shard_dir, [group.rank])
        self.model_config = ModelConfig.load(config.shard_dir)
        self.dtype = _run_dtype(config.dtype, self.model_config.dtype, group.device)
        self.max_model_len = _max_model_len(config.max_model_len, self.model_config)

        self.plan = plan = build_plan(self.model_config, config.tp_size)
        heads = head_shape(self.model_config, plan, group.rank)
        self.backend = make_backend(config.attention_backend, group.device.type, heads, config.block_size)
        self.rotary = RotaryTable(self.model_config.rope, self.max_model_len, group.device)
        with torch.device("meta"):
            self.model = Decoder(self.model_config, plan, self.backend, self.rotary, group, self.dtype)
        files = [config.shard_dir / name for name in manifest.rank_files(group.rank)]
        self.weight_bytes = load_shard(self.model, files, group.device)
        self.model.eval()
        self._lap("weights", started)

        started = time.perf_counter()
        self.model.optimize()
        self._lap("packing", started)

        started = time.perf_counter()
        self.num_blocks = group.minimum(self._count_blocks(config))
        self.max_model_len = min(self.max_model_len, self.num_blocks * self.backend.block_size)
        self.kv = self.backend.allocate(self.model_config.num_layers, self.num_blocks, self.dtype, group.device)
        self.sampler = Sampler(group, plan.vocab_slices, self.model_config.vocab_size)
        self._lap("kv cache", started)

    def run(self, batch: ScheduledBatch) -> tuple[list[int], list[Any] | None]:
        """Compute one step: the token ids of ``batch.sampled``, and log-probabilities where any are wanted."""
        with torch.inference_mode():
            forward = build_forward_batch(batch, self.backend.block_size, self.group.device)
            hidden = self.model(forward, self.kv)
            sampled = batch.sampled
            if not sampled:
                return [], None
            logits = self.model.logits(hidden[forward.logits_rows])
            rows = [
                SamplingRow(item.sequence.params, item.end, item.sequence.token_ids)
                for item in sampled
            ]
            return self.sampler.sample(logits, rows)

    def info(self) -> dict[str, Any]:
        """What ``Ready`` reports of this rank."""
        return {
            "device": self.group.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tp_size": self.group.size,
            "attention_backend": self.backend.name,
            "block_size": self.backend.block_size,
            "num_blocks": self.num_blocks,
            "max_model_len": self.max_model_len,
            "weight_bytes": self.weight_bytes,
            "timings": self.timings,
        }

    def _count_blocks(self, config: EngineConfig) -> int:
        budget = config.kv_cache_memory
        if budget is None:
            budget = int(available_host_memory() * CPU_SHARE) // self.group.size
        block_size = self.backend.block_size
        layers = self.model_config.num_layers
        block_bytes = kv_bytes_per_block(self.backend.heads, layers, block_size, self.dtype)
        return count_blocks(budget, block_bytes, block_size, self.max_model_len, config.max_num_seqs)

    def _lap(self, what: str, started: float) -> None:
        self.timings[what] = round(time.perf_counter() - started, 3)


def _run_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """``"auto"`` runs what is stored; CPUs have no float16 arithmetic worth using, so there it becomes float32."""
    name = stored if wanted == "auto" else wanted
    if name == "float16" and wanted == "auto" and device.type == "cpu":
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _max_model_len(wanted: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if wanted is None:
        return limit
    if not 2 <= wanted <= limit:
        raise EngineError(f"--max-model-len {wanted} is not between 2 and {limit}, the model's own limit")
    return wanted
