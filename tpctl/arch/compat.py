"""What other engines need of a shard folder that they load with ``load_format="sharded_state"``.

Stored names, row order and file names are theirs already. Neither engine takes an uneven split. vLLM (0.32)
also wants four scales a layer, which are 1 where nothing is quantised; SGLang (0.5.23) refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping

from tpctl.arch.block import linears
from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.errors import PartitionError, UnsupportedModelError, UsageError
from tpctl.partition.plan import PartitionPlan, PlannedTensor
from tpctl.partition.split import Rule

ENGINES = ("vllm", "sglang")
PROVEN: Mapping[str, tuple[str, ...]] = {"vllm": ("qwen3_moe",), "sglang": ()}
"""Families that tpctl does not run itself, and that the engine was seen to load (examples/vllm_sharded_state.py)."""

_VLLM_SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")


def check_compat(engine: str, config: ModelConfig, plan: PartitionPlan) -> None:
    """Check that ``engine`` is known and can load what ``plan`` makes.

    Raises:
        UsageError: the engine is unknown.
        PartitionError: the split is uneven; the message names the sizes that are not.
        UnsupportedModelError: nobody has tried it with such a model.
    """
    if engine not in ENGINES:
        raise UsageError(f"--compat {engine} is unknown; use {' or '.join(ENGINES)}")
    _check_proven(engine, config)
    if (uneven := _uneven(plan)) is not None:
        even = [tp for tp in range(1, config.blueprint.max_tp + 1) if _is_even(config, tp)]
        raise PartitionError(
            f"{engine} loads only even splits, but at tp {plan.tp_size} the ranks' {uneven} differ in shape; "
            f"use --tp {', '.join(map(str, even))}"
        )


def _check_proven(engine: str, config: ModelConfig) -> None:
    """Refuse what nobody has seen ``engine`` load."""
    blueprint = config.blueprint
    held = (linear.storage for layer in blueprint.layers for part in layer.parts for linear in linears(part))
    why = next((f"quantised weights ({one.format})" for one in held if not one.is_dense), None)
    if why is None and not config.family.runs and config.model_type not in PROVEN[engine]:
        why = blueprint.why_not_run()
    if why is None and config.cutting.expert_parallel > 1:
        why = "experts that are dealt to the ranks"
    if why is not None:
        raise UnsupportedModelError(f"--compat {engine} is not known to work for a model that has {why}; leave it out")


def scales(engine: str | None, config: ModelConfig) -> tuple[PlannedTensor, ...]:
    """The scalars of value 1 (F32) that ``engine`` expects on every rank, beyond the model's weights."""
    if engine != "vllm":
        return ()
    names = (
        f"{config.blueprint.prefix.format(layer)}self_attn.attn.{scale}"
        for layer in range(config.num_layers)
        for scale in _VLLM_SCALES
    )
    return tuple(PlannedTensor(name, Rule.REPLICATED, 0, (), ()) for name in names)


def _is_even(config: ModelConfig, tp_size: int) -> bool:
    try:
        return _uneven(build_plan(config, tp_size)) is None
    except PartitionError:
        return False


def _uneven(plan: PartitionPlan) -> str | None:
    """A stored tensor whose shape is not the same on every rank."""
    first = plan.shards[0]
    return next((name for name in first if any(s[name].shape != first[name].shape for s in plan.shards)), None)
