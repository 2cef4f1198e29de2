"""The runner in plain torch: which kind a model wants."""

from __future__ import annotations

import time

from tpctl.distributed import TPGroup
from tpctl.engine.runners.loading import load
from tpctl.engine.runners.memory_plan import plain_budget, plan_memory
from tpctl.engine.runners.predicting import PredictingRunner
from tpctl.engine.runners.runner import ModelRunner
from tpctl.layers.compute import Compute
from tpctl.wire.settings import EngineConfig


def make_plain_runner(settings: EngineConfig, group: TPGroup) -> ModelRunner:
    """A runner in plain torch, on any device (collective). Errors as ``load`` and ``plan_memory``."""
    loaded = load(settings, group)
    started = time.perf_counter()
    loaded.model.use(Compute(group))
    loaded.timings["weights"] = round(loaded.timings["weights"] + time.perf_counter() - started, 3)
    kind = ModelRunner if loaded.model.mtp is None else PredictingRunner
    return kind(loaded, plan_memory(loaded, plain_budget(loaded)))
