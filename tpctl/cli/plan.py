"""``tpctl plan``: what a model needs, before anything is downloaded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated

import typer

from tpctl.cli.console import print_json
from tpctl.cli.options import AttentionBackend, CuttingOptions, DType, KvCacheDType, grouped
from tpctl.cli.units import parse_bytes
from tpctl.errors import UsageError, format_bytes
from tpctl.quantizing.schemes import Method
from tpctl.wire.settings import GPU_SEQS, GPU_TOKENS

LEAST_GPU = 1 << 30
"""Bytes: less is a unit mistaken or forgotten."""


class GpuName(StrEnum):
    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    l40s = "l40s"
    rtx4090 = "rtx4090"


@grouped
def plan(
    model: Annotated[str, typer.Argument(help="As of `tpctl shard`; a folder with a config.json is enough.")],
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Show this size rank by rank.")] = None,
    cut: CuttingOptions = CuttingOptions(),
    gpu: Annotated[GpuName | None, typer.Option(help="Also say how fast a token can be on this GPU.")] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of one GPU, with its unit. Default: that of --gpu, else 80GiB."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of a GPU's memory to use.")
    ] = 0.9,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one sequence. Default: the model's limit.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = GPU_SEQS,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in one step.")] = GPU_TOKENS,
    kv_cache_dtype: Annotated[
        KvCacheDType,
        typer.Option(
            help="fp8: in 8 bits a value, rounded; packed: bfloat16 in 12; model: as it is, for other backends than "
            "triton."
        ),
    ] = KvCacheDType.auto,
    attention_backend: Annotated[
        AttentionBackend,
        typer.Option(help="auto: triton; sdpa, in plain torch, takes half of what is left for the cache."),
    ] = AttentionBackend.auto,
    quantize: Annotated[
        Method | None, typer.Option(help=f"Plan what `tpctl shard --quantize` would make: {', '.join(Method)}.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Cast floats to it; auto: as stored.")] = DType.auto,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; default: the one `hf auth login` stored.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Say which tensor-parallel sizes work, what each costs, what fits, and what other engines refuse.

    It reads headers, never weights.
    """
    from tpctl.arch.quantised import Cutting
    from tpctl.checkpoint.metadata import read_metadata
    from tpctl.cli.plan_report import print_report
    from tpctl.planning.fit import Budget, plan_model
    from tpctl.quantizing.planned import quantised_metadata
    from tpctl.sharding.moving.files import few_collections

    memory = None if gpu_memory is None else parse_bytes(gpu_memory, "GiB")
    if memory is not None and memory < LEAST_GPU:
        raise UsageError(
            f"--gpu-memory {gpu_memory} is {format_bytes(memory)}, less than any GPU has; write it like 80GiB"
        )
    if quantize is not None and dtype is not DType.auto:
        raise UsageError(f"--quantize {quantize} and --dtype {dtype} cannot both be had; leave one of them out")
    cut.cutting(1)  # what contradicts itself is refused before anything is fetched
    budget = Budget(
        gpu=None if gpu is None else str(gpu),
        gpu_memory=memory,
        utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype=str(kv_cache_dtype),
        attention_backend=str(attention_backend),
    )
    with few_collections():
        metadata = read_metadata(model, revision=revision, token=token)
        was = Cutting(metadata.expert_parallel, metadata.even)  # of shards: as `tpctl reshard` would cut them
        with nullcontext(metadata) if quantize is None else quantised_metadata(metadata, quantize) as described:
            report = plan_model(
                described, budget, tp_size=tp, dtype=dtype.value, cutting=lambda size: cut.cutting(size, was)
            )
    report = replace(report, exact=metadata.tensors is not None)  # what --quantize would make has made-up headers
    if json:
        print_json(asdict(report))
    else:
        print_report(report)
