"""``tpctl bench quality --against``: what is wrong with the model compared with names its own options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.quality_runs import InProcess
from tests.unit.quality_runs import made as made  # the fixtures
from tests.unit.quality_runs import run as run
from tpctl.bench import quality as bench
from tpctl.errors import EngineError, PartitionError, ShardFolderError, TpctlError, UsageError
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("whole --against-tp 64", PartitionError, "size 64 does not fit 8 query heads; use --against-tp 1 to 8$"),
        ("whole --against-ep 2", PartitionError, "^the model has no experts that .*; use --against-ep 1$"),
        ("whole --against rounded --against-ep 2", PartitionError, "^rounded: the model has .*; use --against-ep 1$"),
        ("whole --against-kv-cache-dtype packed", UsageError, "^--against-kv-cache-dtype packed needs a GPU; on a CPU"),
        (
            "whole --tp 1 --against shards",
            ShardFolderError,
            "but tp 1 is asked for; use --against-tp 2, or make a new one: `tpctl reshard shards --tp 1 -o FOLDER`$",
        ),
        ("whole --against long --max-model-len 100", UsageError, "^long: --max-model-len 100 .* 64"),
        ("whole --against long --context 64", UsageError, "more than 63, one less than the limit of long; lower it"),
        ("whole --tp 1 --ep 2 --against rounded --against-ep 1", PartitionError, "; leave --ep and --expert-par"),
    ],
)
def test_what_is_wrong_with_the_model_compared_with_names_its_options(
    line: str, kind: type[TpctlError], said: str, run: Callable[..., Any], made: dict[str, Any]
) -> None:
    if not Path("shards").exists():
        shard_checkpoint(made["folder"] / "whole", Path("shards"), 2)
        shutil.copytree("whole", "long")
        config = json.loads(Path("long/config.json").read_text())
        Path("long/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with pytest.raises(kind, match=said):
        run(line)


def test_a_fault_while_the_model_compared_with_runs_names_its_options(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(InProcess):
        def __init__(self, config: EngineConfig) -> None:
            raise EngineError(f"the weights of {config.dtype} cannot be run; use --dtype float32")

    monkeypatch.setattr(bench, "EngineClient", Failing)
    with pytest.raises(EngineError, match=r"^the weights of float16 cannot be run; use --against-dtype float32$"):
        run("whole --against-dtype float16")
    with pytest.raises(EngineError, match=r"^the weights of auto cannot be run; use --dtype float32$"):
        run("whole")
