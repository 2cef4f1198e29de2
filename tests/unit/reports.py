"""Inspection reports straight from a plan, for pictures of models of any size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.arch.source_plan import as_held, build_plan
from tpctl.sharding.showing.meaning import Meaning, meanings
from tpctl.sharding.showing.report import InspectReport, RankReport, tensor_report


def make_report(
    config: dict[str, Any],
    tp_size: int,
    *,
    ranks: Sequence[int] | None = None,
    source: str = "org/model",
    cutting: Cutting = Cutting(),
) -> tuple[InspectReport, ModelConfig]:
    """What inspecting the shards of ``config``'s model would report."""
    model = ModelConfig.from_dict(config, cutting=cutting)
    return report_of(model, tp_size, ranks=ranks, source=source, cutting=cutting), model


def report_of(
    model: ModelConfig,
    tp_size: int,
    *,
    ranks: Sequence[int] | None = None,
    source: str = "org/model",
    cutting: Cutting = Cutting(),
) -> InspectReport:
    """The same of a model that may have any blueprint."""
    plan = build_plan(model, tp_size)
    meaning = meanings(as_held(model, plan.source_shapes).blueprint)
    dtypes = {split.name: split.dtypes[0] if split.dtypes else "BF16" for split in plan.splits}
    reports = []
    for rank in range(tp_size) if ranks is None else ranks:
        file = f"model-rank-{rank}-part-0.safetensors"
        means = {name: meaning.get(name, Meaning()) for name in plan.shards[rank]}
        tensors = tuple(
            tensor_report(name, stored, file, dtypes[name], means[name]) for name, stored in plan.shards[rank].items()
        )
        reports.append(
            RankReport(
                rank=rank,
                files=(file,),
                nbytes=sum(tensor.nbytes for tensor in tensors),
                parameters=int(sum(prod(tensor.shape) * means[tensor.name].weights for tensor in tensors)),
                tensors=tensors,
            )
        )
    sizes = [rank.nbytes for rank in reports]
    return InspectReport(
        folder="shards",
        source=source,
        revision=None,
        model_type=model.model_type,
        tp_size=tp_size,
        dtype=None,
        compat=None,
        expert_parallel=cutting.expert_parallel,
        even=cutting.even,
        source_shapes=dict(plan.source_shapes),
        ranks=tuple(reports),
        extra=(),
        absent=(),
        strays=(),
        imbalance=max(sizes) * len(sizes) / sum(sizes),
        replicated_bytes=0,
        verified=None,
    )
