"""Some cells of the kill matrix, without load; ``kill_matrix.py`` runs all of them by hand."""

from __future__ import annotations

import pytest

from tests.distributed import kill_matrix
from tests.distributed.kill_matrix import REASONS, run_cell
from tpctl.checkpoint.sources import ResolvedSource
from tpctl.sharding.cache import ensure_sharded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "phase"), [("parent", "prefill"), ("agent", "loading"), ("rank0", "decode"), ("rank1", "idle")]
)
def test_the_reason_is_said_and_nobody_is_left(
    demo: ResolvedSource, target: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_matrix, "LIMIT", 120.0)  # how long it takes is not judged on a busy machine
    cell = run_cell(ensure_sharded(demo, 2), target, phase)
    assert cell.reason.startswith(REASONS.get(target, ""))
    assert bool(cell.reason) == (target in REASONS)
    assert cell.orphans == 0
