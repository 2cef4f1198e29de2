"""``config.json`` parsed from a dictionary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.described import described
from tests.unit.synthetic import make_config
from tpctl.arch.config import ModelConfig


def parse(family: str = "llama", **changes: Any) -> SimpleNamespace:
    raw = make_config(family, **changes)
    return described(ModelConfig.from_dict({key: value for key, value in raw.items() if value is not ...}))
