"""How large a model's tensors are on each rank: weights exactly, the KV cache by token, activations by estimate.

A plan with one layer of each sort stands for all layers that are cut alike; only their dtypes may differ.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod

from tpctl.accounting import (
    KeptLayer,
    KvForm,
    KvLayout,
    KvNeed,
    LayerPools,
    kv_need,
    latent_room,
    layer_pools,
    layout_of,
    net_chunk_bytes,
    net_chunks,
    pools_of,
    state_bytes,
    unpacked_tokens,
)
from tpctl.arch.block import Attention, Experts, Gated, Mixer, linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.config import ModelConfig
from tpctl.arch.delta_net import DeltaNet, state_sizes
from tpctl.arch.growth import growth as growth_of
from tpctl.arch.latent import Attending, LatentAttention
from tpctl.arch.linear import Linear
from tpctl.arch.predictor import PREFIX
from tpctl.arch.quantised import Cutting, cut_by
from tpctl.arch.source_plan import (
    DEFAULT_PART_SIZE,
    as_held,
    check_scaled,
    checked_source_plan,
    source_plan,
    source_splits,
    stored_dtype,
)
from tpctl.attention_choice import KINDS, Choice, Heads, choose
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.partition.dtypes import DTYPE_BITS, DTYPES, TORCH_NAMES
from tpctl.partition.plan import PartitionPlan, PlannedTensor
from tpctl.partition.split import Rule, TensorSplit, source_shapes
from tpctl.planning.dealt import DealtBytes
from tpctl.planning.predictor_sizes import PredictorSizes, kept_of
from tpctl.planning.sorts import Sorts
from tpctl.sharding.moving.parts import assign_parts, part_files

Cuttings = Callable[[int], Cutting]
"""How a model is cut at each size."""


def as_usual(tp_size: int) -> Cutting:
    """No experts dealt, borders where blocks end."""
    return Cutting()


class ModelSizes:
    """The sizes of one model.

    Args:
        cast: safetensors dtype that floats are cast to.
        kv_cache_dtype, backend: as the engine's.

    Attributes:
        config: of the model alone, without a layer that predicts one token more.
        predictor: of that layer.
        dtypes: the safetensors dtype of every stored tensor, that layer's too.
        source_bytes: of the checkpoint's tensors that the model is made of.
        parameters, active_parameters: weights, whatever they are stored as; and those that a token meets.

    Raises:
        CheckpointError: the checkpoint's headers do not fit its config.
        UnsupportedModelError: weights are no floats, or codes without scales.
    """

    def __init__(
        self,
        config: ModelConfig,
        metadata: ModelMetadata,
        cast: str | None,
        kv_cache_dtype: str = "auto",
        cutting: Cuttings = as_usual,
        backend: str = "auto",
    ) -> None:
        whole = as_held(config, metadata.tensors or ())
        self.config = replace(whole, blueprint=whole.blueprint.without_predictor())
        self._cutting, self._kv_cache_dtype, self._backend = cutting, kv_cache_dtype, backend
        found = None if metadata.tensors is None else {name: info.dtype for name, info in metadata.tensors.items()}
        if metadata.tensors is not None:
            checked_source_plan(config, {name: tensor.shape for name, tensor in metadata.tensors.items()}, 1)
        splits = source_splits(config, found or ())
        dtypes = {split.name: _source_dtypes(split, found, DTYPES[config.dtype]) for split in splits}
        check_scaled(config, splits, dtypes)
        self.dtypes = {split.name: stored_dtype(split, dtypes[split.name], cast) for split in splits}
        self.predictor = PredictorSizes(whole, found or (), self.dtypes, cutting)
        splits = [split for split in splits if not split.name.startswith(PREFIX)]
        dtype_of = {source: dtype for read in dtypes.values() for source, dtype in read.items()}
        kinds = Counter((dtype_of[name], shape) for name, shape in source_shapes(splits).items())  # experts are alike
        self.source_bytes = sum(count * tensor_nbytes(*kind) for kind, count in kinds.items())
        self._sorts = Sorts.of(self.config.blueprint, splits, found or ())
        self._bits: dict[str, int] = defaultdict(int)  # of one element in all layers that a name stands for
        self._times: dict[str, int] = defaultdict(int)
        for name, first in self._sorts.stands_for.items():
            self._bits[first] += DTYPE_BITS[self.dtypes[name]]
            self._times[first] += 1
        self._weights, self._chosen, self._growth = self._meanings()
        self._dealt: dict[Cutting, DealtBytes] = {}
        self._needs: dict[tuple[int, int], tuple[KvLayout, list[KvNeed]]] = {}
        self.parameters = self.active_parameters = 0
        for split in self._small_splits(Cutting()):
            count = prod(split.whole) * self._weights[split.name]
            chosen = count if split.stack is None else count / split.stack.count * self._chosen[split.name]
            self.parameters += int(count * self._times[split.name])
            self.active_parameters += int(chosen * self._times[split.name])

    def small_plan(self, tp_size: int) -> PartitionPlan:
        """The plan with one layer of each sort. Raises ``PartitionError`` if the model cannot be cut so."""
        return source_plan(self._small(self._cutting(tp_size)), self._sorts.names, tp_size)

    def dealt(self, tp_size: int) -> DealtBytes:
        """What gives each rank's bytes at ``tp_size``, without a plan. Raises as ``small_plan``."""
        cutting = self._cutting(tp_size)
        if cutting not in self._dealt:
            splits = self._small_splits(cutting)
            looked_up = [] if self.config.blueprint.tied else [self.config.blueprint.embedding]
            looked_up += [f"{table.name}.weight" for table in self._tables]
            self._dealt[cutting] = DealtBytes(splits, self._bits, self._chosen, looked_up)
        return self._dealt[cutting]

    def expert_groups(self, tp_size: int) -> int:
        """Groups of ranks that whole experts are dealt to."""
        return self._cutting(tp_size).expert_parallel

    @property
    def small_blueprint(self) -> Blueprint:
        """The model with one layer of each sort."""
        return self._sorts.small(self.config.blueprint)

    def _small(self, cutting: Cutting) -> ModelConfig:
        small = self.small_blueprint
        blueprint = small if cutting == Cutting() else cut_by(small, cutting)
        return replace(self.config, blueprint=blueprint, cutting=cutting)

    def _small_splits(self, cutting: Cutting) -> list[TensorSplit]:
        return source_splits(self._small(cutting), self._sorts.names)

    def _meanings(self) -> tuple[Mapping[str, float], Mapping[str, int], Mapping[str, int]]:
        """How many weights an element of each tensor of ``small_plan`` is; of experts how many a token takes; and how
        many times its bytes it takes when it runs, where that is more."""
        blueprint = self.small_blueprint
        parts = [("", part) for part in blueprint.beside]
        for number, layer in enumerate(blueprint.layers):
            parts += [(blueprint.prefix.format(number), part) for part in layer.parts]
        owners = {
            f"{prefix}{linear.name}{linear.joiner}": (linear, part)
            for prefix, part in parts
            for linear in linears(part)
        }
        weights: dict[str, float] = {}
        chosen: dict[str, int] = {}
        growth: dict[str, int] = {}
        stands_in = {first: self.dtypes[name] for name, first in self._sorts.stands_for.items()}
        for split in self._small_splits(Cutting()):
            owner = next((owner for owner in owners if split.name.startswith(owner)), None)
            kind = "" if owner is None else split.name.removeprefix(owner)
            weights[split.name] = int(kind in ("", "bias"))
            if owner is not None:
                linear, part = owners[owner]
                if (entry := next((one for one in linear.storage if one.name == kind), None)) is not None:
                    weights[split.name] = entry.weights
                    stored = DTYPE_BITS[stands_in[split.name]]
                    growth[split.name] = growth_of(part, linear, entry, stored, DTYPE_BITS[self.dtype])
                if linear.stack is not None and isinstance(part, Experts):
                    chosen[split.name] = part.per_token
        return weights, chosen, growth

    @property
    def dtype(self) -> str:
        """The safetensors dtype that the engine runs the model in: that of the head, as it takes it from the shards."""
        return self.dtypes[self.config.blueprint.head]

    def weights(self, plan: PartitionPlan, rank: int) -> tuple[int, int]:
        """Bytes and parameters of all layers on ``rank`` of ``plan``, a small one."""
        shard = plan.shards[rank].items()
        nbytes = sum(stored.numel * self._bits[name] for name, stored in shard) // 8
        return nbytes, int(sum(stored.numel * self._times[name] * self._weights[name] for name, stored in shard))

    def growth_bytes(self, plan: PartitionPlan, rank: int) -> int:
        """What all layers take on ``rank`` of ``plan``, a small one, beyond their stored bytes when they run."""
        shard = plan.shards[rank].items()
        return sum(stored.numel * self._bits[name] * (self._growth.get(name, 1) - 1) for name, stored in shard) // 8

    def file_bytes(self, plan: PartitionPlan, ranks: Sequence[int]) -> list[int]:
        """Bytes of the part files of ``ranks``, headers included, as ``tpctl shard`` writes them by default.

        Args:
            ranks: one of each sort that ``plan``, a small one, has, since together they decide where a part ends.
        """
        more = self.predictor.shards(plan.tp_size)
        shards = [{**self._all_layers(plan.shards[rank]), **more[rank]} for rank in ranks]
        parts = assign_parts(shards, self.dtypes, DEFAULT_PART_SIZE)
        files = (part_files(rank, shard, self.dtypes, parts) for rank, shard in zip(ranks, shards, strict=True))
        return [sum(file.header.file_size for file in found) for found in files]

    def _all_layers(self, shard: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
        """A shard of a small plan with every layer's names; the pieces stay those of the first of its sort."""
        return {name: shard[first] for name, first in self._sorts.stands_for.items()}

    def heads(self, tp_size: int) -> list[tuple[int, int]]:
        """Query and KV heads of each rank, of the layer where it has most; of layers that keep something of a token, if
        there are any. Raises ``PartitionError`` if some layer's heads cannot be dealt to so many."""
        shares = {number: mixer.shares(tp_size) for number, mixer in enumerate(self._mixers)}
        keep = [number for number, mixer in enumerate(self._mixers) if keeps(mixer)]
        return [
            (max(len(one.query) for one in of_rank), max(len(one.kv) for one in of_rank))
            for of_rank in zip(*(shares[number] for number in keep or shares), strict=True)
        ]

    def kv_need(self, tp_size: int, rank: int, longest: int) -> KvNeed:
        """What sequences of up to ``longest`` tokens take of a GPU's KV cache: latents, which all heads share, on every
        rank; of a recurrent layer nothing."""
        return self._kv(tp_size, longest)[1][rank]

    def kv_pools(self, tp_size: int, longest: int) -> int:
        """How many pools of KV blocks there are then, each with block tables of its own."""
        return len(self._kv(tp_size, longest)[0].windows)

    def _kv(self, tp_size: int, longest: int) -> tuple[KvLayout, list[KvNeed]]:
        if (tp_size, longest) not in self._needs:
            ranks, (block, slides, _) = self._kept(tp_size), KINDS[self.choice.backend]
            kinds = list(dict.fromkeys(ranks))  # most ranks keep the same
            whole = LayerPools((None,), (0,) * len(kinds[0]))
            pools = layer_pools(kinds, longest, self.kv_form) if slides else whole
            found = [pools_of(kind, pools, block, self.itemsize, self.kv_form) for kind in kinds]
            layout = layout_of(found, block)
            needs = {kind: kv_need(one, layout) for kind, one in zip(kinds, found, strict=True)}
            self._needs[tp_size, longest] = layout, [needs[kind] for kind in ranks]
        return self._needs[tp_size, longest]

    def _kept(self, tp_size: int) -> list[tuple[KeptLayer, ...]]:
        """What each layer keeps of a token, on each rank."""
        heads: dict[tuple[int, int], list[int]] = {}
        found: list[list[KeptLayer]] = [[] for _ in range(tp_size)]
        for mixer in self.mixers:
            key = mixer.num_heads, mixer.num_kv_heads
            if key not in heads:
                heads[key] = [len(share.kv) for share in mixer.shares(tp_size)]
            for layers, count in zip(found, heads[key], strict=True):
                if keeps(mixer):
                    layers.append(kept_of(mixer, count))
        return [tuple(layers) for layers in found]

    def slot_bytes(self, tp_size: int, rank: int) -> int:
        """What recurrent layers keep of one sequence."""
        nets = state_sizes(self.config.blueprint, rank, tp_size)
        return state_bytes((net.kept for net in nets), self.itemsize)

    @cached_property
    def choice(self) -> Choice:
        """How GPUs attend, and keep keys and values. Raises ``UsageError`` if they cannot as is asked for."""
        heads = [Heads.of(mixer) for mixer in self._mixers if isinstance(mixer, Attending) and mixer.reads is None]
        dtype = TORCH_NAMES.get(self.dtype, self.dtype)
        return choose(self._backend, self._kv_cache_dtype, "cuda", dtype, heads)

    @property
    def kv_form(self) -> KvForm:
        """As of ``choice``."""
        return self.choice.kv_form

    def unpacked_bytes(self, tp_size: int, rank: int, tokens: int, max_model_len: int) -> int:
        """What the engine keeps for what the prompts of a step of ``tokens`` read, where the cache is not as it is, or
        holds vectors that keys and values are made of."""
        latent = next((one for one in self._mixers if isinstance(one, LatentAttention)), None)
        if latent is not None:
            heads = len(latent.shares(tp_size)[rank].query)
            room = latent_room(tokens, max_model_len, latent.kept, heads * latent.sizes.made)
            return (room.read + room.made) * self.itemsize
        if self.kv_form == "model":
            return 0
        kept = unpacked_tokens(tokens, max_model_len) + tokens  # some blocks are not full
        return kept * max(heads * dim for heads, dim in self._kv_heads(tp_size, rank)) * 2 * 2

    def activation_bytes(self, plan: PartitionPlan, rank: int, tokens: int, seqs: int, longest: int) -> int:
        """An estimate of the largest step's tensors, for ``tokens`` of ``seqs`` sequences of up to ``longest``, when
        most of them live.

        That is in the MLP: residual, its input and its partial sum [T, H], gate and up [T, 2W], their product [T, W],
        and embeddings that layers have of their own; in a gated delta net, whose chunks take memory beside; or at the
        end, when each sequence's logits [R, V] are there in the model's dtype and twice in float32.
        """
        blueprint, size = self._small(self._cutting(plan.tp_size)).blueprint, self.itemsize
        parts = [part for layer in blueprint.layers for part in layer.parts]
        chunks = net_chunks(min(tokens, longest))
        step = max(
            tokens * size * _width(part, plan.tp_size, rank)
            + chunks * (_chunk_bytes(part, plan.tp_size, rank, size) if isinstance(part, DeltaNet) else 0)
            for part in parts
        )
        step += tokens * size * (3 * blueprint.hidden_size + sum(table.inputs for table in self._tables))
        rows, vocab = min(seqs, tokens), plan.shape(rank, blueprint.head)[0]
        head = tokens * size * 2 * blueprint.hidden_size + rows * vocab * (size + 2 * 4)
        return max(step, head)

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def mixers(self) -> list[Attention | Mixer]:
        """What mixes tokens, of each layer."""
        return [layer.mixer for layer in self.config.blueprint.layers]

    @property
    def recurrent(self) -> int:
        """How many layers are recurrent."""
        return sum(isinstance(mixer, Mixer) and mixer.recurrent for mixer in self.mixers)

    @property
    def _tables(self) -> list[Linear]:
        """Embeddings that layers have of their own."""
        beside = self.config.blueprint.beside
        return [part for part in beside if isinstance(part, Linear) and part.rule is Rule.VOCAB]

    @property
    def reading(self) -> int:
        """How many layers read the keys and values of an earlier one."""
        return sum(isinstance(mixer, Attention) and not keeps(mixer) for mixer in self.mixers)

    @cached_property
    def _mixers(self) -> list[Attention | Mixer]:
        """Those of one layer of each sort."""
        return [self.config.blueprint.layers[first].mixer for first in self._sorts.firsts]

    def _kv_heads(self, tp_size: int, rank: int) -> list[tuple[int, int]]:
        """KV heads of ``rank`` and their dimensions, of each layer with attention that keeps its own."""
        held: dict[tuple[int, int], int] = {}
        found = []
        for mixer in self.mixers:
            if isinstance(mixer, Attention) and keeps(mixer):
                heads = mixer.num_heads, mixer.num_kv_heads
                if heads not in held:
                    held[heads] = len(mixer.shares(tp_size)[rank].kv)
                found.append((held[heads], mixer.head_dim))
        return found


def _source_dtypes(split: TensorSplit, found: Mapping[str, str] | None, usual: str) -> dict[str, str]:
    """The dtypes of a split's source tensors: the checkpoint's; without one, the first that the format has."""
    if found is not None:
        return {source: found[source] for source in split.sources}
    return dict.fromkeys(split.sources, usual if split.dtypes is None else split.dtypes[0])


def keeps(mixer: Attention | Mixer) -> bool:
    """Whether it keeps something of every token."""
    return mixer.reads is None if isinstance(mixer, Attention) else mixer.kept > 0


def _chunk_bytes(part: DeltaNet, tp_size: int, rank: int, itemsize: int) -> int:
    net = part.sizes_of(rank, tp_size)
    return net_chunk_bytes(net.key_heads, net.value_heads, net.key_dim, net.value_dim, itemsize)


def _width(part: object, tp_size: int, rank: int) -> int:
    """What ``rank`` keeps of a token while it computes ``part`` of a layer, in values, beside residual and sums.

    Of experts all that a token takes may be on one rank, where they are dealt whole.
    """
    if isinstance(part, Attention):
        share = part.shares(tp_size)[rank]
        kv = (len(part.held) - 1) * len(share.kv)
        return ((3 if part.gate else 2) * len(share.query) + kv) * part.head_dim
    if isinstance(part, Gated):
        return 3 * len(part.down.input_cut.ranges(part.down.inputs, tp_size)[rank])
    if isinstance(part, Experts):
        width = 3 * len(part.down.input_cut.ranges(part.down.inputs, tp_size)[rank])
        return part.per_token * width + (0 if part.shared is None else _width(part.shared, tp_size, rank))
    if isinstance(part, Mixer):
        return sum(len(one.cut.ranges(one.length, tp_size)[rank]) for linear in linears(part) for one in linear.parts)
    return 0
