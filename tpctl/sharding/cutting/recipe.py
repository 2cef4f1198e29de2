"""What a shard folder is to contain, decided before a byte of it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpctl.arch.compat import check_compat
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.manifest.records import CopiedFile, Source
from tpctl.partition.plan import PartitionPlan, PlannedTensor, check_ranks
from tpctl.sharding.moving.expected import Expected
from tpctl.sharding.moving.layout import Stored


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a shard folder's content, except the tensors' bytes.

    Attributes:
        shards: the stored tensors of every rank, by name.
        fills: the value of stored tensors that are not made of pieces.
        ranks: the ranks to write.
        dtypes: the safetensors dtype of each stored tensor.
        dtype: what floats were cast to on the way from the source, for the manifest.
        inputs: the tensors to read for each stored tensor.
        extra: tensors of the source that no rank needs, kept for ``merge``.
        small_files: the files to copy, with what they must be where that is known.
        cutting: how experts were dealt, for the manifest.
        may_overflow: values that a cast takes beyond the range of its dtype become infinite, instead of an error.
        identity: differs whenever what is read differs; a killed run is resumed only under the same one.
    """

    shards: tuple[Mapping[str, PlannedTensor], ...]
    fills: Mapping[str, int]
    ranks: tuple[int, ...]
    source: Source
    model_type: str
    dtype: str | None
    max_part_size: int
    compat: str | None
    dtypes: Mapping[str, str]
    inputs: Mapping[str, tuple[Stored, ...]]
    extra: tuple[Stored, ...]
    small_files: Mapping[Path, CopiedFile | None]
    identity: str
    cutting: Cutting = Cutting()  # noqa: RUF009 (it is frozen)
    may_overflow: bool = False


def make_recipe(
    config: ModelConfig,
    plan: PartitionPlan,
    *,
    source: Source,
    dtype: str | None,
    max_part_size: int,
    ranks: Sequence[int] | None,
    compat: str | None,
    dtypes: Mapping[str, str],
    inputs: Mapping[str, tuple[Stored, ...]],
    extra: Sequence[Stored],
    small_files: Mapping[Path, CopiedFile | None],
    identity: str,
    cutting: Cutting = Cutting(),
    may_overflow: bool = False,
    without: str = "leave --compat out",
) -> Recipe:
    """The recipe for ``plan``, with what another engine needs added where ``compat`` names one.

    Args:
        without: what messages say makes a folder for no other engine.

    Raises:
        PartitionError: a rank does not exist, or ``compat`` does not take this split.
        UsageError: ``compat`` is unknown.
    """
    if compat is not None:
        check_compat(compat, config, plan, {one.name for one in extra}, without)
    expected = Expected.of(config, plan, compat)
    more = expected.fills.keys()
    return Recipe(
        shards=expected.shards,
        fills=expected.fills,
        ranks=check_ranks(ranks, plan.tp_size),
        source=source,
        model_type=config.model_type,
        dtype=dtype,
        max_part_size=max_part_size,
        compat=compat,
        dtypes={**dtypes, **dict.fromkeys(more, "F32")},
        inputs={**inputs, **dict.fromkeys(more, ())},
        extra=tuple(extra),
        small_files=small_files,
        identity=identity,
        cutting=cutting,
        may_overflow=may_overflow,
    )
