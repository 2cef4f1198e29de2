"""The memory planner: which tensor-parallel sizes work for a model, how evenly, and what fits beside the weights.

Weights come from the partition plan and are exact: the numbers are what ``tpctl shard`` writes. The rest
follows the engine's own accounting (``accounting``): of a GPU's memory it uses a share, from which weights, the
activations of the largest step and a reserve are taken; the KV cache gets what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from tpctl.accounting import PACKED_HEAD_DIMS, reserve
from tpctl.arch.config import ModelConfig
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.errors import UsageError
from tpctl.partition.dtypes import DTYPES, TORCH_NAMES
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.planning.model_sizes import ModelSizes

CONTEXT_BYTES = 768 << 20
"""What a process takes on a GPU besides tensors: CUDA context, loaded kernels and libraries (755 MiB on an H100)."""

PEER_BYTES = 800 << 20
"""What more than one rank needs on top: NCCL's buffers and the memory that peers write to (810 MiB for two H100s)."""


@dataclass(frozen=True)
class Budget:
    """What a GPU offers and what is asked of it; bytes and tokens. ``kv_cache_dtype``: as the engine's."""

    gpu_memory: int = 80 << 30
    utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    kv_cache_dtype: str = "auto"


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

    On each GPU the process itself takes ``context_bytes`` (at ``tp_size``) and ``reserve_bytes`` are kept for CUDA
    graphs and fragmentation; both are estimates. ``limit`` is the smallest size that cannot work, ``limit_reason`` why.
    ``ranks`` details ``tp_size``, which is the size asked for, or else the smallest that fits (the largest there
    is, if none does).
    """

    model: str
    revision: str | None
    model_type: str
    parameters: int
    source_bytes: int
    dtype: str
    kv_cache_dtype: str
    exact: bool
    gpu_memory: int
    utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    context_bytes: int
    reserve_bytes: int
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
        UsageError: ``dtype`` is unknown, more tokens are asked for than the model allows, or a packed KV cache that it
            cannot have.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    config = ModelConfig.load(metadata.folder)
    length = budget.max_model_len or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {length} is more than the model's {config.max_position_embeddings}; use at most that"
        )
    cast = metadata.cast if dtype == "auto" else DTYPES[dtype]
    model = ModelSizes(config, metadata, cast, budget.kv_cache_dtype != "model")
    run_dtype = TORCH_NAMES.get(model.dtype, model.dtype)
    if budget.kv_cache_dtype == "packed" and not model.packs:
        raise UsageError(
            f"--kv-cache-dtype packed needs bfloat16 and heads of {', '.join(map(str, PACKED_HEAD_DIMS))} dimensions, "
            f"all of them rotated; this model runs in {run_dtype} with heads of "
            f"{config.blueprint.blocks[0].attention.head_dim}, use auto or model"
        )
    budget = replace(budget, max_model_len=length)
    limit, reason = model.limit()
    sizes = [_size(model, budget, tp) for tp in _candidates(config.blueprint.max_tp, limit - 1, tp_size)]
    if tp_size is None:
        tp_size = next((size.tp_size for size in sizes if size.concurrency), sizes[-1].tp_size)
    return FitReport(
        model=metadata.id,
        revision=metadata.revision,
        model_type=config.model_type,
        parameters=sum(prod(shape) for shape in model.source_shapes.values()),
        source_bytes=sum(tensor_nbytes(model.source_dtype(n), s) for n, s in model.source_shapes.items()),
        dtype=run_dtype,
        kv_cache_dtype="packed" if model.packs else run_dtype,
        exact=metadata.tensors is not None,
        gpu_memory=budget.gpu_memory,
        utilization=budget.utilization,
        max_model_len=length,
        max_num_batched_tokens=budget.max_num_batched_tokens,
        context_bytes=_context_bytes(tp_size),
        reserve_bytes=reserve(config.num_layers),
        sizes=tuple(sizes),
        limit=limit,
        limit_reason=reason,
        tp_size=tp_size,
        ranks=tuple(_ranks(model, budget, model.small_plan(tp_size), files=True)),
    )


def _candidates(num_heads: int, largest: int, wanted: int | None) -> list[int]:
    """The sizes to show: small ones, those that divide the heads or are powers of two, and the wanted one."""
    shown = {*range(1, 9), 16, 32, 64, 128, 256, *(tp for tp in range(9, 17) if num_heads % tp == 0)}
    return sorted({tp for tp in shown if tp <= largest} | ({wanted} if wanted else set()))


def _size(model: ModelSizes, budget: Budget, tp_size: int) -> SizeFit:
    ranks = _ranks(model, budget, model.small_plan(tp_size))
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
        kv_copies=sum(rank.kv_heads for rank in ranks) / model.heads(1, 0)[1],
        weight_bytes=max(sizes),
        kv_bytes_per_token=max(rank.kv_bytes_per_token for rank in ranks),
        kv_tokens=tokens,
        max_context=min(tokens, model.config.max_position_embeddings),
        concurrency=tokens // length,
        needed=int(needed / budget.utilization),
    )


def _ranks(model: ModelSizes, budget: Budget, plan: PartitionPlan, *, files: bool = False) -> list[RankFit]:
    """Every rank's numbers, from a small plan; file sizes are left at 0 unless ``files`` asks for them."""
    alike: dict[tuple[Shape, ...], list[int]] = {}  # most ranks hold the same, which is counted once
    for rank, shard in enumerate(plan.shards):
        alike.setdefault(tuple(stored.shape for stored in shard.values()), []).append(rank)
    firsts = [ranks[0] for ranks in alike.values()]
    written = model.file_bytes(plan, firsts) if files else [0] * len(firsts)
    share = int(budget.gpu_memory * budget.utilization)
    reserved = reserve(model.config.num_layers)
    found: dict[int, RankFit] = {}
    for (first, *others), file_bytes in zip(alike.values(), written, strict=True):
        weights, parameters = model.weights(plan, first)
        query_heads, kv_heads = model.heads(plan.tp_size, first)
        tokens, length = budget.max_num_batched_tokens, budget.max_model_len or model.config.max_position_embeddings
        activations = model.activation_bytes(plan, first, tokens, budget.max_num_seqs)
        activations += model.unpacked_bytes(plan.tp_size, first, tokens, length)
        activations += model.sampling_bytes(plan, first, budget.max_num_seqs)
        fit = RankFit(
            rank=first,
            parameters=parameters,
            weight_bytes=weights,
            file_bytes=file_bytes,
            query_heads=query_heads,
            kv_heads=kv_heads,
            kv_bytes_per_token=model.kv_bytes_per_token(plan.tp_size, first),
            activation_bytes=activations,
            kv_cache_bytes=share - weights - activations - reserved - _context_bytes(plan.tp_size),
        )
        found |= {rank: replace(fit, rank=rank) for rank in (first, *others)}
    return [found[rank] for rank in range(plan.tp_size)]


def _context_bytes(tp_size: int) -> int:
    return CONTEXT_BYTES + (PEER_BYTES if tp_size > 1 else 0)
