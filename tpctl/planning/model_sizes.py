"""How large a model's tensors are on each rank: weights exactly, the KV cache by token, activations by estimate.

A plan with one layer of each sort stands for all layers that are cut alike; only their dtypes may differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tpctl.accounting import (
    PACKED_HEAD_DIMS,
    gathered_logits,
    kv_bytes_per_token,
    sampled_rows,
    sampler_bytes,
    unpacked_tokens,
)
from tpctl.arch.block import Attention, Experts, Gated, Layer
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import (
    DEFAULT_PART_SIZE,
    as_held,
    checked_source_plan,
    source_plan,
    source_splits,
    stored_dtype,
)
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.errors import PartitionError
from tpctl.partition.dtypes import DTYPE_BITS, DTYPES
from tpctl.partition.plan import PartitionPlan, PlannedTensor
from tpctl.partition.split import source_shapes
from tpctl.sharding.moving.parts import assign_parts, part_files


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
        self.config = as_held(config, metadata.tensors or ())
        self._tensors = metadata.tensors
        self._may_pack = may_pack
        if metadata.tensors is not None:
            checked_source_plan(config, {name: tensor.shape for name, tensor in metadata.tensors.items()}, 1)
        splits = source_splits(config, self._tensors or ())
        self.source_shapes = source_shapes(splits)
        self._source_dtypes = {
            source: self._dtype_of(source, split.dtypes) for split in splits for source in split.sources
        }
        self.dtypes = {
            split.name: stored_dtype(split, {source: self._source_dtypes[source] for source in split.sources}, cast)
            for split in splits
        }
        self._stands_for = self._stand_ins(split.name for split in splits)
        self._bits: dict[str, int] = defaultdict(int)  # of one element in all layers that a name stands for
        self._times: dict[str, int] = defaultdict(int)
        for name, first in self._stands_for.items():
            self._bits[first] += DTYPE_BITS[self.dtypes[name]]
            self._times[first] += 1

    def small_plan(self, tp_size: int) -> PartitionPlan:
        """The plan with one layer of each sort. Raises ``PartitionError`` if the model cannot be cut so."""
        blueprint = self.config.blueprint
        layers = tuple(blueprint.layers[layer] for layer in blueprint.alike)
        return source_plan(
            replace(self.config, blueprint=replace(blueprint, layers=layers)), self._tensors or (), tp_size
        )

    def _stand_ins(self, names: Iterable[str]) -> dict[str, str]:
        """For each stored tensor the one of ``small_plan`` that is cut like it."""
        blueprint = self.config.blueprint
        found = {name: name for name in names}
        for sort, layers in enumerate(blueprint.alike.values()):
            for layer in layers:
                prefix, small = blueprint.prefix.format(layer), blueprint.prefix.format(sort)
                found |= {prefix + split.name: small + split.name for split in blueprint.layers[layer].splits}
        return found

    def source_dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor of the checkpoint; without one, the first that its format has."""
        return self._source_dtypes[name]

    def _dtype_of(self, name: str, known: tuple[str, ...] | None) -> str:
        if self._tensors is not None:
            return self._tensors[name].dtype
        return DTYPES[self.config.dtype] if known is None else known[0]

    @property
    def dtype(self) -> str:
        """The safetensors dtype that the engine runs the model in: that of the head, as it takes it from the shards."""
        return self.dtypes[self.config.blueprint.head]

    def limit(self) -> tuple[int, str]:
        """The smallest size that cannot work, and why."""
        largest = self.config.blueprint.max_tp
        reason = f"a query head is not divided, and there are {largest}"
        while True:
            try:
                self.small_plan(largest)
                return largest + 1, reason
            except PartitionError as error:
                if largest == 1:
                    raise
                largest, reason = largest - 1, str(error)

    def weights(self, plan: PartitionPlan, rank: int) -> tuple[int, int]:
        """Bytes and parameters of all layers on ``rank`` of ``plan``, a small one."""
        shard = plan.shards[rank].items()
        nbytes = sum(stored.numel * self._bits[name] for name, stored in shard) // 8
        return nbytes, sum(stored.numel * self._times[name] for name, stored in shard)

    def file_bytes(self, plan: PartitionPlan, ranks: Sequence[int]) -> list[int]:
        """Bytes of the part files of ``ranks``, headers included, as ``tpctl shard`` writes them by default.

        Args:
            ranks: one of each sort that ``plan``, a small one, has, since together they decide where a part ends.
        """
        shards = [self._all_layers(plan.shards[rank]) for rank in ranks]
        parts = assign_parts(shards, self.dtypes, DEFAULT_PART_SIZE)
        files = (part_files(rank, shard, self.dtypes, parts) for rank, shard in zip(ranks, shards, strict=True))
        return [sum(file.header.file_size for file in found) for found in files]

    def _all_layers(self, shard: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
        """A shard of a small plan with every layer's names; the pieces stay those of the first of its sort."""
        return {name: shard[first] for name, first in self._stands_for.items()}

    def heads(self, tp_size: int, rank: int) -> tuple[int, int]:
        """Query and KV heads of ``rank``, of the layer where it has most."""
        shares = [layer.mixer.shares(tp_size)[rank] for layer in self._sorts()]
        return max(len(share.query) for share in shares), max(len(share.kv) for share in shares)

    def kv_bytes_per_token(self, tp_size: int, rank: int) -> int:
        return kv_bytes_per_token(self._kv_heads(tp_size, rank), self._itemsize, packed=self.packs)

    @property
    def packs(self) -> bool:
        """Whether GPUs keep bfloat16 keys and values in 12 bits."""
        fit = all(
            isinstance(mixer, Attention)
            and mixer.rope.rotary_dim == mixer.head_dim
            and mixer.head_dim in PACKED_HEAD_DIMS
            for mixer in (layer.mixer for layer in self._sorts())
        )
        return self._may_pack and self.dtype == DTYPES["bfloat16"] and fit

    def unpacked_bytes(self, tp_size: int, rank: int, tokens: int, max_model_len: int) -> int:
        """What the engine keeps for what the prompts of a step of ``tokens`` read, where the cache is packed."""
        if not self.packs:
            return 0
        kept = unpacked_tokens(tokens, max_model_len) + tokens  # some blocks are not full
        return kept * max(heads * dim for heads, dim in self._kv_heads(tp_size, rank)) * 2 * 2

    def sampling_bytes(self, plan: PartitionPlan, rank: int, seqs: int) -> int:
        """What the engine keeps for sampling: the logits of a captured step, those that the host has a part in, all
        ranks' where they are gathered, and what the general sampler takes."""
        vocab, tp_size = plan.shape(rank, self.config.blueprint.head)[0], plan.tp_size
        logits = sampled_rows(seqs) * vocab * self._itemsize
        return 2 * logits + gathered_logits(logits, tp_size) + sampler_bytes(seqs, tp_size * vocab)

    def activation_bytes(self, plan: PartitionPlan, rank: int, tokens: int, seqs: int) -> int:
        """An estimate of the largest step's tensors, for ``tokens`` of ``seqs`` sequences, when most of them live.

        That is in the MLP: residual, its input and its partial sum [T, H], gate and up [T, 2W], their product [T,
        W]; or at the end, when each sequence's logits [R, V] are there in the model's dtype and twice in float32.
        """
        blueprint, size = self.config.blueprint, self._itemsize
        widest = 0
        for layer in self._sorts():
            mixer, share = layer.mixer, layer.mixer.shares(plan.tp_size)[rank]
            if isinstance(mixer, Attention):
                widest = max(widest, (2 * len(share.query) + 2 * len(share.kv)) * mixer.head_dim)
            for part in layer.parts:
                if isinstance(part, Gated | Experts):
                    width = len(part.down.input_cut.ranges(part.down.inputs, plan.tp_size)[rank])
                    widest = max(widest, 3 * width * (part.per_token if isinstance(part, Experts) else 1))
        step = tokens * size * (3 * blueprint.hidden_size + widest)
        rows, vocab = min(seqs, tokens), plan.shape(rank, blueprint.head)[0]
        head = tokens * size * 2 * blueprint.hidden_size + rows * vocab * (size + 2 * 4)
        return max(step, head)

    @property
    def _itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    def _sorts(self) -> list[Layer]:
        """One layer of each sort."""
        return [self.config.blueprint.layers[layer] for layer in self.config.blueprint.alike]

    def _kv_heads(self, tp_size: int, rank: int) -> list[tuple[int, int]]:
        """KV heads of ``rank`` and their dimensions, of each layer."""
        found = []
        for first, layers in self.config.blueprint.alike.items():
            mixer = self.config.blueprint.layers[first].mixer
            heads = len(mixer.shares(tp_size)[rank].kv)
            dim = mixer.head_dim if isinstance(mixer, Attention) else mixer.kept // 2
            found += [(heads, dim)] * len(layers)
        return found
