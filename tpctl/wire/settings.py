"""Everything a worker needs to know to start. Torch-free: the command line writes it, every rank reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tpctl.errors import UsageError

DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION_BACKENDS = ("auto", "sdpa", "triton", "flash-attn")
POLICIES = ("fcfs", "makespan", "auto")
SPECULATIONS = ("off", "ngram", "mtp", "auto")
KV_CACHE_DTYPES = ("auto", "model", "packed", "fp8")

CPU_SEQS, CPU_TOKENS = 64, 4096
GPU_SEQS, GPU_TOKENS = 512, 16384
"""Sequences and tokens of a step where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class EngineChoices:
    """What of an engine is as somebody asks for it, on every machine.

    Attributes:
        dtype: ``"auto"`` (as stored; float16 runs as float32 on a CPU), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        max_model_len: longest prompt plus answer in tokens; ``None`` takes the model's own limit, lowered to what
            the KV cache holds.
        block_size: tokens in a KV block; ``None`` lets the attention backend choose.
        kv_cache_memory: bytes of KV cache per rank; ``None`` measures what is free.
        kv_cache_dtype: ``"model"`` (that of activations), ``"packed"`` (bfloat16 in 12 bits,
            ``kernels.attention.packed_kv``), ``"fp8"`` (``kernels.attention.fp8_vectors``), or ``"auto"``: packed where
            that can be.
        gpu_memory_utilization: share of a GPU's memory that weights, activations and KV cache may take together.
        attention_backend: ``"auto"`` or a backend's name.
        enforce_eager: capture no CUDA graphs.
        scheduling_policy: ``"fcfs"``, first come, first served; or ``"makespan"``, which on GPUs may start requests
            later and in another order, so that all of a job's end sooner (``engine.scheduling.pacing``); or ``"auto"``,
            makespan where a rank's layers are large enough to gain by it.
        late_launch: on GPUs start a step only shortly before the one that runs ends, so that a request which comes
            meanwhile is in it (``engine.launch_time``); where all requests are handed in at once it gains nothing.
        speculate: propose tokens and compute several of an answer in a step, which changes none of them
            (``engine.scheduling.speculation``): ``"mtp"``, by the model's own layer that predicts more; ``"ngram"``,
            those that followed before; ``"auto"``, the first of these that can be had; or ``"off"``.
        engines_on_host: engines that share this machine's memory: on a CPU each takes its part of what is free.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = None
    kv_cache_memory: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    enforce_eager: bool = False
    scheduling_policy: str = "fcfs"
    late_launch: bool = False
    speculate: str = "off"
    engines_on_host: int = 1

    @property
    def choices(self) -> dict[str, Any]:
        """They alone, by name."""
        return {choice.name: getattr(self, choice.name) for choice in fields(EngineChoices)}


@dataclass(frozen=True, kw_only=True)
class EngineSettings(EngineChoices):
    """How an engine computes, whichever model and shards it is given.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        max_num_seqs: sequences computed together at most.
        max_num_batched_tokens: tokens computed in one step at most; longer prompts are prefilled in chunks.
        enable_prefix_caching: share the KV blocks of equal prefixes.

    Raises:
        UsageError: a setting is unknown, does not suit the device, or contradicts another one.
    """

    device: str = "cpu"
    max_num_seqs: int = CPU_SEQS
    max_num_batched_tokens: int = CPU_TOKENS
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for what, known in (("device", DEVICES), ("dtype", DTYPES), ("attention backend", ATTENTION_BACKENDS)):
            value = getattr(self, what.replace(" ", "_"))
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}; use {', '.join(known)}")
        if self.scheduling_policy not in POLICIES:
            raise UsageError(f"unknown scheduling policy {self.scheduling_policy!r}; use {', '.join(POLICIES)}")
        if self.speculate not in SPECULATIONS:
            raise UsageError(f"unknown speculation {self.speculate!r}; use {', '.join(SPECULATIONS)}")
        if self.device == "cpu" and self.attention_backend not in ("auto", "sdpa"):
            raise UsageError(f"--attention-backend {self.attention_backend} needs a GPU; on a CPU use auto or sdpa")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UsageError(f"unknown KV cache dtype {self.kv_cache_dtype!r}; use {', '.join(KV_CACHE_DTYPES)}")
        if self.device == "cpu" and self.kv_cache_dtype == "packed":
            raise UsageError("--kv-cache-dtype packed needs a GPU; on a CPU use auto, model or fp8")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs "
                f"{self.max_num_seqs}: a step could not serve every sequence; raise the one or lower the other"
            )

    def longest(self, limit: int, beyond: str = "") -> int:
        """Tokens of prompt and answer at most: what is asked for, else ``limit``, which is the model's own; ``beyond``
        says what keeps it from more, where its file promises more.

        Raises:
            UsageError: more is asked for than the model takes.
        """
        if self.max_model_len is None:
            return limit
        if not 2 <= self.max_model_len <= limit:
            raise UsageError(
                f"--max-model-len {self.max_model_len} is not between 2 and {limit}, the model's own limit"
                + (f": {beyond}" if beyond else "")
            )
        return self.max_model_len


@dataclass(frozen=True)
class EngineConfig(EngineSettings):
    """One engine: its shards, and the settings it runs with.

    Attributes:
        shard_dir: a shard folder cut for ``tp_size`` ranks.
        model_dir: the folder that the user gave or that was fetched, if ``shard_dir`` is one of the cache.
    """

    shard_dir: Path
    tp_size: int
    model_dir: Path | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @property
    def text_dir(self) -> Path:
        """Where the front reads tokenizer, template and generation settings. The cache's shards have copies, but a
        message has to name the file that can be corrected."""
        return self.model_dir or self.shard_dir

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        values = asdict(self)
        first = {"shard_dir": str(values.pop("shard_dir")), "tp_size": values.pop("tp_size")}
        folder = values.pop("model_dir")
        return {**first, **values, "model_dir": None if folder is None else str(folder)}

    @classmethod
    def load(cls, path: Path) -> EngineConfig:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """The settings that ``to_dict`` gave."""
        paths = {name: Path(values[name]) for name in ("shard_dir", "model_dir") if values[name] is not None}
        return cls(**{**values, **paths})
