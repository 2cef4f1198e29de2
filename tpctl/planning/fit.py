"""The memory planner: which tensor-parallel sizes work for a model, how evenly, and what fits beside the weights.

Weights come from the partition plan and are exact: the numbers are what ``tpctl shard`` writes. The rest
follows the engine's own accounting (``accounting``): of a GPU's memory it uses a share, from which weights, what steps
take (``step_sizes``) and a reserve are taken; the KV cache gets what is left, by the reference's attention half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tpctl.accounting import KvNeed, cache_for, gathering_cache, reserve, state_slots
from tpctl.arch.block import Attention
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import towers
from tpctl.attention_choice import KINDS
from tpctl.checkpoint.metadata import ModelMetadata
from tpctl.errors import PartitionError, UsageError
from tpctl.partition.dtypes import DTYPES, TORCH_NAMES
from tpctl.partition.plan import PartitionPlan, Shape
from tpctl.planning.check import SizeCheck, check_sizes
from tpctl.planning.gpus import GPUS, Gpu
from tpctl.planning.model_sizes import Cuttings, ModelSizes, as_usual, keeps
from tpctl.planning.report import FitReport, RankFit, SizeFit
from tpctl.planning.step_sizes import steps_bytes

CONTEXT_BYTES = 768 << 20
"""What a process takes on a GPU besides tensors: CUDA context, loaded kernels and libraries (755 MiB on an H100)."""

PEER_BYTES = 800 << 20
"""What more than one rank needs on top: NCCL's buffers and the memory that peers write to (810 MiB for two H100s)."""


@dataclass(frozen=True)
class Budget:
    """What a GPU offers and what is asked of it; bytes and tokens. ``kv_cache_dtype``, ``attention_backend``: as the
    engine's.

    ``gpu``: the name of one in ``GPUS``, whose memory is that of ``gpu_memory`` where this is ``None``.
    """

    gpu: str | None = None
    gpu_memory: int | None = None
    utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"

    @property
    def known(self) -> Gpu | None:
        """The GPU that is named."""
        if self.gpu is not None and self.gpu not in GPUS:
            raise UsageError(f"--gpu {self.gpu} is unknown; use {', '.join(GPUS)}, or --gpu-memory")
        return None if self.gpu is None else GPUS[self.gpu]

    @property
    def memory(self) -> int:
        """Of a GPU, in bytes."""
        if self.gpu_memory is not None:
            return self.gpu_memory
        return (80 << 30) if self.known is None else self.known.memory


def plan_model(
    metadata: ModelMetadata,
    budget: Budget,
    *,
    tp_size: int | None = None,
    dtype: str = "auto",
    cutting: Cuttings = as_usual,
) -> FitReport:
    """Say how ``metadata``'s model can be cut and what fits.

    Args:
        tp_size: the size to detail.
        dtype: as of ``tpctl shard``: cast floats to it, or ``"auto"``.
        cutting: how experts are dealt, and where borders may be, at each size.

    Raises:
        CheckpointError, UnsupportedModelError: the config or the headers are unsound or unknown.
        PartitionError: ``tp_size`` cannot work.
        UsageError: ``dtype`` or the GPU is unknown, more tokens are asked for than the model allows, or a packed or FP8
            KV cache or an attention backend that it cannot have.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    budget = replace(budget, gpu_memory=budget.memory)
    config = ModelConfig.load(metadata.folder)
    length = budget.max_model_len or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise UsageError(
            f"--max-model-len {length} is more than the model's {config.max_position_embeddings}; use at most that"
            + (f": {config.beyond}" if config.beyond else "")
        )
    cast = metadata.cast if dtype == "auto" else DTYPES[dtype]
    model = ModelSizes(config, metadata, cast, budget.kv_cache_dtype, cutting, budget.attention_backend)
    run_dtype = TORCH_NAMES.get(model.dtype, model.dtype)
    form = model.kv_form
    budget = replace(budget, max_model_len=length)
    checks, limit, reason = _checks(model)
    works = [check.tp_size for check in checks if check.verdict != "impossible"]
    sizes = [_size(model, budget, checks[tp - 1]) for tp in _candidates(config.blueprint.max_tp, works)]
    if tp_size is None:
        tp_size = next((size.tp_size for size in sizes if size.concurrency), sizes[-1].tp_size)
    elif tp_size not in _candidates(config.blueprint.max_tp, works):
        sizes = sorted(
            [*sizes, _size(model, budget, next(iter(check_sizes(model, [tp_size]))))], key=lambda size: size.tp_size
        )
    windows = [
        mixer.window
        for mixer in model.mixers
        if isinstance(mixer, Attention)
        and keeps(mixer)
        and mixer.window
        and mixer.window < length
        and KINDS[model.choice.backend].slides
    ]
    return FitReport(
        model=metadata.id,
        revision=metadata.revision,
        model_type=config.model_type,
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        source_bytes=model.source_bytes,
        dtype=run_dtype,
        kv_cache_dtype=run_dtype if form == "model" else form,
        attention_backend=model.choice.backend,
        exact=metadata.tensors is not None,
        gpu=budget.gpu,
        gpu_memory=budget.memory,
        utilization=budget.utilization,
        max_model_len=length,
        max_num_batched_tokens=budget.max_num_batched_tokens,
        context_bytes=_context_bytes(tp_size),
        reserve_bytes=reserve(config.num_layers),
        layers=config.num_layers,
        not_run=config.blueprint.why_not_run(),
        not_on_gpus=config.blueprint.why_not_on("cuda"),
        beside=len(towers(config, metadata.tensors or ())),
        recurrent=model.recurrent,
        reading=model.reading,
        windowed=len(windows),
        window=max(windows, default=None),
        sizes=tuple(sizes),
        checks=tuple(checks[: limit - 1]),
        limit=limit,
        limit_reason=reason,
        tp_size=tp_size,
        ranks=tuple(_ranks(model, budget, model.small_plan(tp_size), files=True)),
        expert_parallel=cutting(tp_size).expert_parallel,
        even=cutting(tp_size).even,
    )


def _checks(model: ModelSizes) -> tuple[tuple[SizeCheck, ...], int, str]:
    """Every size up to the number of heads; the smallest beyond which none works, and why."""
    most = model.config.blueprint.max_tp
    checks = check_sizes(model, range(1, most + 1))
    works = [check.tp_size for check in checks if check.verdict != "impossible"]
    if not works:
        raise PartitionError(str(checks[0].why))
    limit = works[-1] + 1
    reason = f"a query head is not divided, and there are {most}" if limit > most else str(checks[limit - 1].why)
    return checks, limit, reason


def _candidates(num_heads: int, works: Sequence[int]) -> list[int]:
    """The sizes to show of those that work: small ones, and those that divide the heads or are powers of two."""
    shown = {*range(1, 9), 16, 32, 64, 128, 256, *(tp for tp in range(9, 17) if num_heads % tp == 0)}
    return [tp for tp in works if tp in shown]


def _size(model: ModelSizes, budget: Budget, check: SizeCheck) -> SizeFit:
    if check.why is not None:
        raise PartitionError(check.why)
    ranks = _ranks(model, budget, model.small_plan(check.tp_size))
    length = budget.max_model_len or 1
    needs = [model.kv_need(check.tp_size, rank.rank, length) for rank in ranks]
    caches = [max(0, rank.kv_cache_bytes) for rank in ranks]
    tokens = min(_tokens(need, cache, model) for need, cache in zip(needs, caches, strict=True))
    share, seqs = int(budget.memory * budget.utilization), budget.max_num_seqs
    slots = [model.slot_bytes(check.tp_size, rank.rank) for rank in ranks]
    times = 1 if KINDS[model.choice.backend].paged else 2  # of which the cache may have half
    needed = max(
        share - times * (rank.kv_cache_bytes + rank.state_bytes - cache_for(need.sequence(length), slot, seqs))
        for rank, need, slot in zip(ranks, needs, slots, strict=True)
    )
    fit = [cache // max(1, need.sequence(length)) for need, cache in zip(needs, caches, strict=True)]
    together = min([*fit, *(rank.states for rank, slot in zip(ranks, slots, strict=True) if slot)])
    known = budget.known
    return SizeFit(
        tp_size=check.tp_size,
        verdict=check.verdict,
        imbalance=check.imbalance,
        kv_copies=check.kv_copies,
        weight_bytes=max(rank.weight_bytes for rank in ranks),
        kv_bytes_per_token=max(rank.kv_bytes_per_token for rank in ranks),
        window_bytes=max(rank.window_bytes for rank in ranks),
        kv_tokens=tokens,
        max_context=min(tokens, model.config.max_position_embeddings),
        concurrency=together,
        needed=int(needed / budget.utilization),
        read_bytes=check.read_bytes,
        token_seconds=None if known is None else check.read_bytes / known.bandwidth,
    )


def _ranks(model: ModelSizes, budget: Budget, plan: PartitionPlan, *, files: bool = False) -> list[RankFit]:
    """Every rank's numbers, from a small plan; sizes of files, and of a predictor, are left at 0 unless ``files`` asks
    for them."""
    alike: dict[tuple[Shape, ...], list[int]] = {}  # most ranks hold the same, which is counted once
    for rank, shard in enumerate(plan.shards):
        alike.setdefault(tuple(stored.shape for stored in shard.values()), []).append(rank)
    firsts = [ranks[0] for ranks in alike.values()]
    written = model.file_bytes(plan, firsts) if files else [0] * len(firsts)
    share = int(budget.memory * budget.utilization)
    reserved = reserve(model.config.num_layers)
    heads = model.heads(plan.tp_size)
    found: dict[int, RankFit] = {}
    for (first, *others), file_bytes in zip(alike.values(), written, strict=True):
        (weights, parameters), growth = model.weights(plan, first), model.growth_bytes(plan, first)
        query_heads, kv_heads = heads[first]
        tokens, length = budget.max_num_batched_tokens, budget.max_model_len or model.config.max_position_embeddings
        left = share - weights - growth - reserved - _context_bytes(plan.tp_size)
        if KINDS[model.choice.backend].paged:
            activations = steps_bytes(model, plan, first, tokens, budget.max_num_seqs, length)
            left -= activations
        else:
            cache = gathering_cache(left) or left // 2  # negative, where the rest alone is too much
            activations, left = max(0, left - cache), cache
        slot, need = model.slot_bytes(plan.tp_size, first), model.kv_need(plan.tp_size, first, length)
        states = state_slots(left, slot, budget.max_num_seqs)
        fit = RankFit(
            rank=first,
            parameters=parameters,
            weight_bytes=weights,
            file_bytes=file_bytes,
            query_heads=query_heads,
            kv_heads=kv_heads,
            kv_bytes_per_token=need.token,
            window_bytes=need.sequence(length) - length * need.token,
            activation_bytes=activations,
            kv_cache_bytes=left - states * slot,
            growth_bytes=growth,
            states=states,
            state_bytes=states * slot,
            predictor_bytes=model.predictor.nbytes(plan.tp_size, first) if files else 0,
            predictor_kv_bytes_per_token=model.predictor.token_bytes(plan.tp_size, first, model.itemsize),
        )
        found |= {rank: replace(fit, rank=rank) for rank in (first, *others)}
    return [found[rank] for rank in range(plan.tp_size)]


def _tokens(need: KvNeed, cache: int, model: ModelSizes) -> int:
    """Tokens that a cache holds; where layers have windows, of one sequence."""
    if need.windows:
        return need.longest(cache, model.config.max_position_embeddings)
    return cache // max(1, need.token)


def _context_bytes(tp_size: int) -> int:
    return CONTEXT_BYTES + (PEER_BYTES if tp_size > 1 else 0)
