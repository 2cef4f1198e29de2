"""What a plan of a model's memory says, as data: the sizes, and the ranks of one of them."""

from __future__ import annotations

from dataclasses import dataclass

from tpctl.planning.check import SizeCheck


@dataclass(frozen=True)
class RankFit:
    """One rank of a size. ``file_bytes`` are those of its part files, ``weight_bytes`` those of its tensors, which take
    ``growth_bytes`` more when they run.

    ``activation_bytes`` are what steps take: the largest one, what captured ones share, tables and sampling; by the
    reference's attention the half of what is left that is not for the cache.

    A token takes ``kv_bytes_per_token`` of the KV cache, in the layers that see all tokens, and a sequence at most
    ``window_bytes`` in the others. ``kv_cache_bytes`` is what is left for the KV cache beside ``state_bytes``, which
    ``states`` of recurrent layers take; negative where the rest alone is too much. None of these count a layer that
    predicts one token more, which is loaded only where it drafts tokens, and then takes ``predictor_bytes``, and
    ``predictor_kv_bytes_per_token`` of the cache; ``file_bytes`` do.
    """

    rank: int
    parameters: int
    weight_bytes: int
    file_bytes: int
    query_heads: int
    kv_heads: int
    kv_bytes_per_token: int
    window_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    growth_bytes: int
    states: int
    state_bytes: int
    predictor_bytes: int = 0
    predictor_kv_bytes_per_token: int = 0


@dataclass(frozen=True)
class SizeFit:
    """A tensor-parallel size.

    Attributes:
        verdict: ``"even"`` (all ranks hold the same), ``"uneven"``.
        imbalance: the largest rank's weight bytes over the mean; a step waits for that rank.
        kv_copies: how many ranks hold each KV head.
        weight_bytes, kv_bytes_per_token, window_bytes: of the largest rank.
        kv_tokens: tokens that the KV cache holds, the least over the ranks, of one sequence where layers have windows;
            0 where the model does not fit.
        max_context: the longest sequence that fits, at most the model's own limit.
        concurrency: sequences of ``max_model_len`` tokens that fit together.
        needed: the least GPU memory in bytes that holds one sequence of ``max_model_len`` tokens.
        read_bytes: of the weights that the rank with most reads for one token of one sequence.
        token_seconds: how long that takes the GPU that was named; no token takes less.
    """

    tp_size: int
    verdict: str
    imbalance: float
    kv_copies: float
    weight_bytes: int
    kv_bytes_per_token: int
    window_bytes: int
    kv_tokens: int
    max_context: int
    concurrency: int
    needed: int
    read_bytes: int
    token_seconds: float | None


@dataclass(frozen=True)
class FitReport:
    """A model's sizes. ``exact`` says whether its tensors were read from headers or follow from its config.

    On each GPU the process itself takes ``context_bytes`` (at ``tp_size``) and ``reserve_bytes`` are kept for CUDA
    graphs and fragmentation; both are estimates. ``limit`` is the smallest size that cannot work, ``limit_reason`` why.
    ``ranks`` details ``tp_size``, which is the size asked for, or else the smallest that fits (the largest there
    is, if none does), cut with ``expert_parallel`` and ``even`` as a manifest has them. ``checks`` has every size below
    ``limit``. ``active_parameters`` are those that a token meets.
    ``not_run`` is what tpctl would have to know to run the model, not only cut it; ``not_on_gpus`` to run it on them.
    ``beside`` counts tensors of what sees or hears, which are left out; ``recurrent`` layers that keep a state of
    constant size for each sequence and no keys and values; ``reading`` those that read an earlier one's keys and values
    and keep none; ``windowed`` those that look back
    no further than ``window`` tokens.
    """

    model: str
    revision: str | None
    model_type: str
    parameters: int
    active_parameters: int
    source_bytes: int
    dtype: str
    kv_cache_dtype: str
    attention_backend: str
    exact: bool
    gpu: str | None
    gpu_memory: int
    utilization: float
    max_model_len: int
    max_num_batched_tokens: int
    context_bytes: int
    reserve_bytes: int
    layers: int
    not_run: str | None
    not_on_gpus: str | None
    beside: int
    recurrent: int
    reading: int
    windowed: int
    window: int | None
    sizes: tuple[SizeFit, ...]
    checks: tuple[SizeCheck, ...]
    limit: int
    limit_reason: str
    tp_size: int
    ranks: tuple[RankFit, ...]
    expert_parallel: int
    even: bool
