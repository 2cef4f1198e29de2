"""How large a model's tensors are on each rank: weights exactly, the KV cache by token, activations by estimate.

Layers are cut alike, so one layer's plan stands for all of them; only their dtypes may differ.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import DEFAULT_PART_SIZE, checked_source_plan, source_plan, source_splits, stored_dtype
from tpctl.arch.splits import LM_HEAD
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.errors import PartitionError
from tpctl.partition.dtypes import DTYPE_BITS, DTYPES
from tpctl.partition.plan import PartitionPlan, PlannedTensor
from tpctl.partition.split import source_shapes
from tpctl.sharding.moving.parts import assign_parts, part_files

PACKED_HEAD_DIMS = (64, 128, 256)
"""Of heads whose keys and values can be packed (``kernels.packed_kv``, without importing Triton)."""

SAMPLER_BYTES_A_TOKEN, SAMPLER_BYTES = 96, 512 << 20
"""What sampling takes for a row and each token of the vocabulary, and at most for rows together (as above)."""

MOST_UNPACKED = 8
"""Steps of the largest size whose contexts are unpacked at most (the engine's own, as above)."""


class ModelSizes:
    """The sizes of one model.

    Args:
        cast: safetensors dtype that floats are cast to.
        may_pack: keys and values may be packed.

    Attributes:
        source_shapes: of the checkpoint's tensors, by name.
        dtypes: the safetensors dtype of every stored tensor.

    Raises:
        CheckpointError: the checkpoint's headers do not fit its config.
    """

    def __init__(self, config: ModelConfig, metadata: ModelMetadata, cast: str | None, may_pack: bool = True) -> None:
        self.config = config
        self._tensors = metadata.tensors
        self._may_pack = may_pack
        if metadata.tensors is not None:
            checked_source_plan(config, {name: tensor.shape for name, tensor in metadata.tensors.items()}, 1)
        splits = source_splits(config, self._tensors or ())
        self.source_shapes = source_shapes(splits)
        self.dtypes = {
            split.name: stored_dtype(split.name, {b.source: self.source_dtype(b.source) for b in split.blocks}, cast)
            for split in splits
        }
        self._in_layer_0 = {name: re.sub(r"^model\.layers\.\d+\.", "model.layers.0.", name) for name in self.dtypes}
        self._bits: dict[str, int] = defaultdict(int)  # of one element in every layer together
        self._times: dict[str, int] = defaultdict(int)
        for name, first in self._in_layer_0.items():
            self._bits[first] += DTYPE_BITS[self.dtypes[name]]
            self._times[first] += 1

    def plan_of_one_layer(self, tp_size: int) -> PartitionPlan:
        """The plan with the first layer alone. Raises ``PartitionError`` if the model cannot be cut so."""
        config = replace(self.config, num_layers=1, windows=self.config.windows[:1])
        return source_plan(config, self._tensors or (), tp_size)

    def source_dtype(self, name: str) -> str:
        return DTYPES[self.config.dtype] if self._tensors is None else self._tensors[name].dtype

    @property
    def dtype(self) -> str:
        """The safetensors dtype that the engine runs the model in: that of the head, as it takes it from the shards."""
        return self.dtypes[LM_HEAD]

    def limit(self) -> tuple[int, str]:
        """The smallest size that cannot work, and why."""
        largest = self.config.num_heads
        reason = f"a query head is not divided, and there are {largest}"
        while True:
            try:
                self.plan_of_one_layer(largest)
                return largest + 1, reason
            except PartitionError as error:
                if largest == 1:
                    raise
                largest, reason = largest - 1, str(error)

    def weights(self, plan: PartitionPlan, rank: int) -> tuple[int, int]:
        """Bytes and parameters of all layers on ``rank`` of the one-layer ``plan``."""
        shard = plan.shards[rank].items()
        nbytes = sum(stored.numel * self._bits[name] for name, stored in shard) // 8
        return nbytes, sum(stored.numel * self._times[name] for name, stored in shard)

    def file_bytes(self, plan: PartitionPlan, ranks: Sequence[int]) -> list[int]:
        """Bytes of the part files of ``ranks``, headers included, as ``tpctl shard`` writes them by default.

        Args:
            ranks: one of each sort that the one-layer ``plan`` has, since together they decide where a part ends.
        """
        shards = [self._all_layers(plan.shards[rank]) for rank in ranks]
        parts = assign_parts(shards, self.dtypes, DEFAULT_PART_SIZE)
        files = (part_files(rank, shard, self.dtypes, parts) for rank, shard in zip(ranks, shards, strict=True))
        return [sum(file.header.file_size for file in found) for found in files]

    def _all_layers(self, shard: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
        """A shard of the one-layer plan with every layer's names; the pieces stay those of the first."""
        return {name: shard[first] for name, first in self._in_layer_0.items()}

    def kv_bytes_per_token(self, kv_heads: int) -> int:
        config, bits = self.config, DTYPE_BITS[self.dtype]
        vector = config.head_dim * 3 // 2 + 1 if self.packs else config.head_dim * bits // 8
        return 2 * config.num_layers * kv_heads * vector

    @property
    def packs(self) -> bool:
        """Whether GPUs keep bfloat16 keys and values in 12 bits."""
        config = self.config
        whole = config.rope.rotary_dim == config.head_dim
        return self._may_pack and self.dtype == DTYPES["bfloat16"] and config.head_dim in PACKED_HEAD_DIMS and whole

    def unpacked_bytes(self, kv_heads: int, tokens: int, max_model_len: int) -> int:
        """What the engine keeps for what the prompts of a step of ``tokens`` read, where the cache is packed."""
        if not self.packs:
            return 0
        kept = min(MOST_UNPACKED * tokens, tokens + max_model_len) + tokens  # some blocks are not full
        return kept * kv_heads * self.config.head_dim * 2 * 2

    def sampling_bytes(self, plan: PartitionPlan, rank: int, seqs: int) -> int:
        """What the engine keeps for sampling: the logits of a captured step, those that the host has a part in, all
        ranks' where they are gathered, and what the general sampler takes."""
        vocab, tp_size = plan.shape(rank, LM_HEAD)[0], plan.tp_size
        logits = -(-seqs // 64) * 64 * vocab * DTYPE_BITS[self.dtypes[LM_HEAD]] // 8
        row = SAMPLER_BYTES_A_TOKEN * tp_size * vocab
        gathered = 0 if tp_size == 1 else (1 + tp_size) * logits
        return 2 * logits + gathered + min(seqs, max(1, SAMPLER_BYTES // row)) * row

    def activation_bytes(self, plan: PartitionPlan, rank: int, tokens: int, seqs: int) -> int:
        """An estimate of the largest step's tensors, for ``tokens`` of ``seqs`` sequences, when most of them live.

        That is in the MLP: residual, its input and its partial sum [T, H], gate and up [T, 2W], their product [T,
        W]; or at the end, when each sequence's logits [R, V] are there in the model's dtype and twice in float32.
        """
        config = self.config
        size = DTYPE_BITS[self.dtypes[LM_HEAD]] // 8
        width = plan.shape(rank, "model.layers.0.mlp.down_proj.weight")[1]
        heads = plan.heads[rank]
        attention = (2 * len(heads.query) + 2 * len(heads.kv)) * config.head_dim
        block = tokens * size * (3 * config.hidden_size + max(3 * width, attention))
        rows, vocab = min(seqs, tokens), plan.shape(rank, LM_HEAD)[0]
        head = tokens * size * 2 * config.hidden_size + rows * vocab * (size + 2 * 4)
        return max(block, head)
