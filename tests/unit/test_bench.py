"""What ``tpctl bench`` refuses to call a figure."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.bench import measure
from tpctl.errors import EngineError


class _Client:
    """An engine with a context of 16 tokens that is asked for nothing."""

    def __init__(self, config: Any) -> None:
        pass

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_ready(self) -> dict[str, Any]:
        return {"max_model_len": 16}


def test_time_per_token_needs_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EngineClient", _Client)
    config: Any = None
    with pytest.raises(EngineError, match="8 prompt tokens and 9 to generate are more than the 16 of --max-model-len"):
        measure.latency(config, 8, 8, 1)
