"""What an engine tells of itself and of its tokens: the records inside ``Ready``, ``Stats`` and ``Output``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class EngineInfo:
    """How an engine runs, as rank 0 reports it once it is ready.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of weights and activations, by torch's name.
        expert_parallel: groups of ranks that whole experts are dealt to.
        kv_cache_dtype: that of keys and values; ``"packed"`` is bfloat16 in 12 bits, ``"fp8"`` e4m3 with scales.
        block_size: tokens in a KV block.
        num_blocks: KV blocks, the minimum over the ranks; where layers have windows, slabs, each of which holds some
            blocks of one kind of layer.
        speculation: what proposes tokens: ``"mtp"``, ``"ngram"``, or ``"off"``.
        num_states: sequences whose states recurrent layers have room for; 0: the model has no such layers.
        max_model_len: tokens of prompt and answer at most, which the KV cache may have lowered.
        wanted_model_len: the same, had the KV cache room for it.
        kv_cache_bytes: of a rank.
        all_reduce: what sums over GPUs; ``None`` on a CPU and for one rank.
        scheduling_policy: the one in effect, which may be another than was asked for.
        weight_bytes: of rank 0.
        vocab_size: tokens that the model knows; 0: it was not said.
        timings: seconds that each part of the start took.
    """

    device: str
    dtype: str
    tp_size: int
    attention_backend: str
    kv_cache_dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    wanted_model_len: int
    kv_cache_bytes: int
    all_reduce: str | None
    scheduling_policy: str
    weight_bytes: int
    timings: dict[str, float]
    max_num_seqs: int
    expert_parallel: int = 1
    num_states: int = 0
    vocab_size: int = 0
    speculation: str = "off"


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine started, and what it holds now.

    Attributes:
        prompt_tokens: of all requests taken in.
        computed_tokens: those that went through the model, again after a preemption.
        paced_steps: steps that computed a few prompt tokens beside decodes (``makespan``).
        prefix_cache_queried_tokens: prompt tokens that were looked for in the prefix cache; ``_hit_tokens`` were there.
        evictions: cached KV blocks that were given to other tokens.
        device_memory: bytes of GPU memory that tensors take, the maximum over the ranks; 0 on a CPU.
        reserved_memory: the same with what torch keeps for later ones.
        running: requests that hold KV blocks; ``waiting``: that wait for some.
        held_steps: steps that were started shortly before the one that ran was to end (``late_launch``);
            ``late_steps`` of them behind its end.
        draft_tokens: tokens that were proposed and computed; ``accepted_tokens`` of them became part of an answer.
    """

    steps: int
    prompt_tokens: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    paced_steps: int
    prefix_cache_queried_tokens: int
    prefix_cache_hit_tokens: int
    evictions: int
    num_blocks: int
    free_blocks: int
    device_memory: int
    reserved_memory: int
    running: int = 0
    waiting: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    held_steps: int = 0
    late_steps: int = 0


class TokenLogprob(NamedTuple):
    """The log-probability of a token, and the likeliest ones at its place as (token id, log-probability).

    A tuple, as ``Output`` is: JSON takes both as they are, and every token of a step passes there.
    """

    logprob: float
    top: list[tuple[int, float]]
