"""Inspection reports straight from a plan, for pictures of models of any size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.safetensors import tensor_nbytes
from tpctl.partition.plan import PlannedTensor
from tpctl.sharding.showing.inspect import InspectReport, PieceReport, RankReport, TensorReport


def make_report(
    config: dict[str, Any], tp_size: int, *, ranks: Sequence[int] | None = None, source: str = "org/model"
) -> tuple[InspectReport, ModelConfig]:
    """What inspecting the shards of ``config``'s model would report."""
    model = ModelConfig.from_dict(config)
    plan = build_plan(model, tp_size)
    reports = []
    for rank in range(tp_size) if ranks is None else ranks:
        tensors = tuple(_tensor(stored, rank) for stored in plan.shards[rank].values())
        reports.append(
            RankReport(
                rank=rank,
                files=(f"model-rank-{rank}-part-0.safetensors",),
                nbytes=sum(tensor.nbytes for tensor in tensors),
                parameters=sum(prod(tensor.shape) for tensor in tensors),
                tensors=tensors,
            )
        )
    sizes = [rank.nbytes for rank in reports]
    report = InspectReport(
        folder="shards",
        source=source,
        revision=None,
        model_type=model.model_type,
        tp_size=tp_size,
        dtype=None,
        compat=None,
        source_shapes=dict(plan.source_shapes),
        ranks=tuple(reports),
        absent=(),
        strays=(),
        imbalance=max(sizes) * len(sizes) / sum(sizes),
        replicated_bytes=0,
        verified=None,
    )
    return report, model


def _tensor(stored: PlannedTensor, rank: int) -> TensorReport:
    pieces = tuple(
        PieceReport(
            piece.source,
            piece.label,
            tuple((first, first + size) for first, size in zip(piece.start, piece.shape, strict=True)),
        )
        for piece in stored.pieces
    )
    return TensorReport(
        name=stored.name,
        file=f"model-rank-{rank}-part-0.safetensors",
        rule=stored.rule.value,
        dim=stored.dim,
        dtype="BF16",
        shape=stored.shape,
        nbytes=tensor_nbytes("BF16", stored.shape),
        padding=stored.padding,
        fill=0,
        pieces=pieces,
    )
