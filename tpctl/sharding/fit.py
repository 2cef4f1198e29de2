"""The memory planner: which tensor-parallel sizes work for a model, how evenly, and what fits beside the weights.

Weights come from the partition plan and are exact: the numbers are what ``tpctl shard`` writes. The rest
follows the engine's own accounting (``engine``): of a GPU's memory it uses a share, from which weights, the
activations of the largest step and a reserve are taken; the KV cache gets what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from tpctl.checkpoint.cast import FLOATS
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.errors import PartitionError, UsageError
from tpctl.models.config import ModelConfig
from tpctl.models.specs import DTYPES
from tpctl.models.weights import LM_HEAD, ignored_tensors
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.sharding.parts import assign_parts, part_files
from tpctl.sharding.shard import DEFAULT_PART_SIZE, source_plan

CONTEXT_BYTES = 512 << 20
"""What a process takes on a GPU before it holds a tensor: CUDA context, cuBLAS and NCCL."""

RESERVE_BYTES = 256 << 20
"""Left free by the engine for CUDA graphs and fragmentation."""

_ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Budget:
    """What a GPU offers and what is asked of it; bytes and tokens."""

    gpu_memory: int = 80 << 30
    utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048


@dataclass(frozen=True)
class RankFit:
    """One rank of a size. ``file_bytes`` are those of its part files, ``weight_bytes`` those of its tensors.

    ``kv_cache_bytes`` is what is left for the KV cache; negative where the rest alone is too much.
    """

    rank: int
    parameters: int
    weight_bytes: int
    file_bytes: int
    query_heads: int
    kv_heads: int
    kv_bytes_per_token: int
    activation_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class SizeFit:
    """A tensor-parallel size.

    Attributes:
        verdict: ``"even"`` (all ranks hold the same), ``"uneven"``.
        imbalance: the largest rank's weight bytes over the mean; a step waits for that rank.
        kv_copies: how many ranks hold each KV head.
        weight_bytes, kv_bytes_per_token: of the largest rank.
        kv_tokens: tokens that the KV cache holds, the least over the ranks; 0 where the model does not fit.
        max_context: the longest sequence that fits, at most the model's own limit.
        concurrency: sequences of ``max_model_len`` tokens that fit together.
        needed: the least GPU memory in bytes that holds one sequence of ``max_model_len`` tokens.
    """

    tp_size: int
    verdict: str
    imbalance: float
    kv_copies: float
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_context: int
    concurrency: int
    needed: int


@dataclass(frozen=True)
class FitReport:
    """A model's sizes. ``exact`` says whether its tensors were read from headers or follow from its config.

    ``limit`` is the smallest size that cannot work, ``limit_reason`` why. ``ranks`` details ``tp_size``,
    which is the size asked for, or else the smallest that fits (the largest there is, if none does).
    """

    model: str
    revision: str | None
    model_type: str
    parameters: int
    source_bytes: int
    dtype: str
    exact: bool
    gpu_memory: int
    utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    sizes: tuple[SizeFit, ...]
    limit: int
    limit_reason: str
    tp_size: int
    ranks: tuple[RankFit, ...]


def plan_model(
    metadata: ModelMetadata, budget: Budget, *, tp_size: int | None = None, dtype: str = "auto"
) -> FitReport:
    """Say how ``metadata``'s model can be cut and what fits.

    Args:
        tp_size: the size to detail.
        dtype: as of ``tpctl shard``: cast floats to it, or ``"auto"``.

    Raises:
        CheckpointError, UnsupportedModelError: the config or the headers are unsound or unknown.
        PartitionError: ``tp_size`` cannot work.
        UsageError: ``dtype`` is unknown, or more tokens are asked for than the model allows.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    config = ModelConfig.load(metadata.folder)
    length = budget.max_model_len or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {length} is more than the model's {config.max_position_embeddings}; use at most that"
        )
    model = _Model(config, metadata, None if dtype == "auto" else DTYPES[dtype])
    budget = replace(budget, max_model_len=length)
    limit, reason = model.limit()
    sizes = [_size(model, budget, tp) for tp in _candidates(config.num_heads, limit - 1, tp_size)]
    if tp_size is None:
        tp_size = next((size.tp_size for size in sizes if size.concurrency), sizes[-1].tp_size)
    plan = model.plan(tp_size)
    return FitReport(
        model=metadata.id,
        revision=metadata.revision,
        model_type=config.model_type,
        parameters=sum(prod(shape) for shape in plan.source_shapes.values()),
        source_bytes=sum(tensor_nbytes(model.source_dtype(n), s) for n, s in plan.source_shapes.items()),
        dtype=config.dtype if dtype == "auto" else dtype,
        exact=metadata.tensors is not None,
        gpu_memory=budget.gpu_memory,
        utilization=budget.utilization,
        max_model_len=length,
        max_num_batched_tokens=budget.max_num_batched_tokens,
        sizes=tuple(sizes),
        limit=limit,
        limit_reason=reason,
        tp_size=tp_size,
        ranks=tuple(_ranks(model, budget, plan)),
    )


def _candidates(num_heads: int, largest: int, wanted: int | None) -> list[int]:
    """The sizes to show: small ones, those that divide the heads or are powers of two, and the wanted one."""
    shown = {*range(1, 9), 16, 32, 64, 128, 256, *(tp for tp in range(9, 17) if num_heads % tp == 0)}
    return sorted({tp for tp in shown if tp <= largest} | ({wanted} if wanted else set()))


class _Model:
    """A model's plans, and the dtype that each tensor has and will have."""

    def __init__(self, config: ModelConfig, metadata: ModelMetadata, cast: str | None) -> None:
        self.config = config
        self._tensors = metadata.tensors
        self._cast = cast
        if metadata.tensors is not None:
            shapes = {name: tensor.shape for name, tensor in metadata.tensors.items()}
            self.plan(1).check_source(shapes, ignored_tensors(config))

    def plan(self, tp_size: int) -> PartitionPlan:
        return source_plan(self.config, self._tensors or (), tp_size)

    def plan_of_one_layer(self, tp_size: int) -> PartitionPlan:
        """The plan with the first layer alone, which stands for all: layers differ in their windows only."""
        config = replace(self.config, num_layers=1, windows=self.config.windows[:1])
        return source_plan(config, self._tensors or (), tp_size)

    def source_dtype(self, name: str) -> str:
        return DTYPES[self.config.dtype] if self._tensors is None else self._tensors[name].dtype

    def dtypes(self, plan: PartitionPlan) -> dict[str, str]:
        """The dtype of every stored tensor."""
        stored = {}
        for split in plan.splits:
            dtype = self.source_dtype(split.blocks[0].source)
            stored[split.name] = self._cast if self._cast and dtype in FLOATS else dtype
        return stored

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

    def kv_bytes_per_token(self, kv_heads: int) -> int:
        dtype = self._cast or DTYPES[self.config.dtype]
        return 2 * self.config.num_layers * kv_heads * self.config.head_dim * _ITEMSIZE[dtype]


def _size(model: _Model, budget: Budget, tp_size: int) -> SizeFit:
    plan = model.plan_of_one_layer(tp_size)
    ranks = _ranks(model, budget, plan, layers=model.config.num_layers)
    sizes = [rank.weight_bytes for rank in ranks]
    length = budget.max_model_len or 1
    tokens = max(0, min(rank.kv_cache_bytes // rank.kv_bytes_per_token for rank in ranks))
    taken = (int(budget.gpu_memory * budget.utilization) - rank.kv_cache_bytes for rank in ranks)
    needed = max(use + length * rank.kv_bytes_per_token for use, rank in zip(taken, ranks, strict=True))
    even = len({(rank.weight_bytes, rank.query_heads, rank.kv_heads) for rank in ranks}) == 1
    return SizeFit(
        tp_size=tp_size,
        verdict="even" if even else "uneven",
        imbalance=max(sizes) * tp_size / sum(sizes),
        kv_copies=sum(rank.kv_heads for rank in ranks) / model.config.num_kv_heads,
        weight_bytes=max(sizes),
        kv_bytes_per_token=max(rank.kv_bytes_per_token for rank in ranks),
        kv_tokens=tokens,
        max_context=min(tokens, model.config.max_position_embeddings),
        concurrency=tokens // length,
        needed=int(needed / budget.utilization),
    )


def _ranks(model: _Model, budget: Budget, plan: PartitionPlan, layers: int = 1) -> list[RankFit]:
    """Every rank's numbers. Where ``plan`` has one layer that stands for ``layers``, file sizes are left at
    0."""
    dtypes = model.dtypes(plan)
    written = [0] * plan.tp_size if layers > 1 else _file_bytes(plan, dtypes)
    found = []
    for rank, shard in enumerate(plan.shards):
        weights = parameters = 0
        for name, stored in shard.items():
            times = layers if name.startswith("model.layers.") else 1
            weights += times * tensor_nbytes(dtypes[name], stored.shape)
            parameters += times * stored.numel
        heads = plan.heads[rank]
        activations = _activation_bytes(model, budget, plan, rank)
        share = int(budget.gpu_memory * budget.utilization)
        found.append(
            RankFit(
                rank=rank,
                parameters=parameters,
                weight_bytes=weights,
                file_bytes=written[rank],
                query_heads=len(heads.query),
                kv_heads=len(heads.kv),
                kv_bytes_per_token=model.kv_bytes_per_token(len(heads.kv)),
                activation_bytes=activations,
                kv_cache_bytes=share - weights - activations - RESERVE_BYTES - CONTEXT_BYTES,
            )
        )
    return found


def _file_bytes(plan: PartitionPlan, dtypes: Mapping[str, str]) -> list[int]:
    """Bytes of each rank's part files, headers included, as ``tpctl shard`` writes them by default."""
    parts = assign_parts(plan.shards, dtypes, DEFAULT_PART_SIZE)
    known: dict[tuple[Shape, ...], int] = {}
    sizes = []
    for rank, shard in enumerate(plan.shards):
        key = tuple(stored.shape for stored in shard.values())
        if key not in known:  # ranks that hold the same shapes have the same headers
            known[key] = sum(file.header.file_size for file in part_files(rank, shard, dtypes, parts))
        sizes.append(known[key])
    return sizes


def _activation_bytes(model: _Model, budget: Budget, plan: PartitionPlan, rank: int) -> int:
    """An estimate of the largest step's tensors, at the moment when most of them live.

    That is in the MLP: residual, its input and its partial sum [T, H], gate and up [T, 2W], their product [T,
    W]; or at the end, when each sequence's logits [R, V] are there in the model's dtype and twice in float32.
    """
    config, tokens = model.config, budget.max_num_batched_tokens
    size = _ITEMSIZE[model.dtypes(plan)[LM_HEAD]]
    width = plan.shape(rank, "model.layers.0.mlp.down_proj.weight")[1]
    heads = plan.heads[rank]
    attention = (2 * len(heads.query) + 2 * len(heads.kv)) * config.head_dim
    block = tokens * size * (3 * config.hidden_size + max(3 * width, attention))
    rows = min(budget.max_num_seqs, tokens)
    vocab = plan.shape(rank, LM_HEAD)[0]
    head = tokens * size * 2 * config.hidden_size + rows * vocab * (size + 2 * 4)
    return max(block, head)
