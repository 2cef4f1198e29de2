"""Host memory: the least of what the machine and every control group above the process leave. And a GPU's share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import make_checkpoint
from tpctl.accounting import RESERVE
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.memory.gpu import GpuShare
from tpctl.engine.memory.host import available_host_memory
from tpctl.engine.runners import memory_plan
from tpctl.engine.runners.loading import Beside
from tpctl.engine.runners.memory_plan import check_cache, plain_budget
from tpctl.errors import EngineError
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.settings import EngineConfig

GIB = 1 << 30
MEMINFO = f"MemTotal: {32 * GIB // 1024} kB\nMemAvailable: {16 * GIB // 1024} kB\nHugePages_Total: 0\n"
V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def lay(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def group(folder: str, names: tuple[str, str], limit: object, used: int) -> dict[str, object]:
    return {f"sys/fs/cgroup/{folder}/{names[0]}": limit, f"sys/fs/cgroup/{folder}/{names[1]}": used}


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        ("0::/", {}, 16 * GIB),
        ("0::/a/b", group("a/b", V2, 8 * GIB, 3 * GIB), 5 * GIB),
        ("0::/a/b", group("a/b", V2, "max", GIB) | group("a", V2, 4 * GIB, GIB), 3 * GIB),
        ("0::/a", group("a", V2, 64 * GIB, GIB), 16 * GIB),
        ("0::/a", group("a", V2, GIB, 2 * GIB), 0),
        ("0::/a", group("a", V2, "nonsense", 2 * GIB), 16 * GIB),
        ("0::/hosts/path", group(".", V2, 6 * GIB, GIB), 5 * GIB),
        ("0::/a\n3:cpu:/a", group("unified/a", V2, 2 * GIB, GIB), GIB),
        ("0::/\n5:cpu,memory:/a", group("memory/a", V1, 7 * GIB, GIB), 6 * GIB),
        ("5:memory:/a:b", group("memory/a:b", V1, 2**63 - 4096, GIB), 16 * GIB),
        ("5:memory:/a", group("memory/a", V1, 4 * GIB, 4 * GIB) | {
            "sys/fs/cgroup/memory/a/memory.stat": f"active_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}"
        }, 2 * GIB),
        ("0::/a", group("a", V2, 4 * GIB, 4 * GIB) | {
            "sys/fs/cgroup/a/memory.stat": f"anon {GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}"
        }, 3 * GIB),
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(tmp_path: Path, cgroup: str, groups: dict[str, object], expected: int) -> None:
    root = lay(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **groups})
    assert available_host_memory(root) == expected


def test_nothing_known_is_four_gib(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) == 4 * GIB
    assert available_host_memory() > 0


@pytest.mark.parametrize(
    ("free", "utilization", "expected"),
    [(80, 0.5, 40), (60, 0.5, 20), (10, 0.875, 0), (10, 0.75, -10), (60, 1.0, 60)],
)
def test_what_others_hold_counts_against_the_share(free: int, utilization: float, expected: int) -> None:
    assert GpuShare(80 * GIB, free * GIB, utilization).nbytes == expected * GIB


def test_engines_on_one_host_divide_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_host_memory", lambda: 64 * GIB)
    assert plain_budget(loaded(device="cpu", size=2)) == 8 * GIB
    assert plain_budget(loaded(device="cpu", size=2, engines_on_host=4)) == 2 * GIB


def loaded(
    *, device: str, size: int = 1, rank: int = 1, layers: int = 32, share: GpuShare | None = None, **settings: Any
) -> Any:
    given = {"kv_cache_memory": None, "max_model_len": None, "max_num_seqs": 3, "engines_on_host": 1, **settings}
    return SimpleNamespace(
        group=SimpleNamespace(rank=rank, device=torch.device(device), size=size),
        settings=SimpleNamespace(**given),
        config=SimpleNamespace(num_layers=layers),
        share=share,
    )


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    held = [5 * GIB, 17 * GIB]  # by torch, before and after
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    said = r"rank 1 holds 20\.0 GiB .* 60\.0 of 80\.0 GiB free, 20\.0 of them within --gpu-memory-utilization 0\.5;"
    share = GpuShare.of(torch.device("cuda"), 0.5)
    with pytest.raises(EngineError, match=said):
        share.check_weights(1, 20 * GIB)
    share.check_weights(1, 19 * GIB)
    held.pop(0)
    assert plain_budget(loaded(device="cuda", share=share)) == (8 * GIB - RESERVE) // 2  # not what the host has
    # NCCL and loaded kernels take memory too, of which torch knows nothing.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (47 * GIB, 80 * GIB))
    assert plain_budget(loaded(device="cuda", share=share)) == (7 * GIB - RESERVE) // 2
    large = loaded(device="cuda", share=share, layers=80)  # whose graphs are larger
    assert plain_budget(large) == (7 * GIB - RESERVE - (48 << 24)) // 2
    assert plain_budget(loaded(device="cuda", kv_cache_memory=5)) == 5


_NO_ROOM = (
    r"rank 1 cannot hold a KV cache of 4\.00 GiB \(--kv-cache-memory 64\.00 GiB, but no more than 3 sequences of 2048 "
    r"tokens can use\): its GPU has 4\.00 GiB left for it; lower --kv-cache-memory, --max-num-seqs or --max-model-len"
)


def test_a_cache_that_was_asked_for_and_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"kv_cache_memory": 64 * GIB, "layers": 2, "size": 2}
    block = 2 * 2 * 8 * 128 * 256 * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB + RESERVE, 80 * GIB))
    check_cache(loaded(device="cuda", **asked), 4 * GIB, 2048, GIB)
    with pytest.raises(EngineError, match=_NO_ROOM):
        check_cache(loaded(device="cuda", **asked), 4 * GIB + block, 2048, GIB)
    monkeypatch.setattr("tpctl.engine.runners.memory_plan.available_host_memory", lambda: 8 * GIB)
    check_cache(loaded(device="cpu", rank=0, **asked), 4 * GIB, 2048, 0)
    with pytest.raises(
        EngineError, match=r"rank 0 .* of 8\.00 GiB .*: its part of this machine.s memory has 4\.00 GiB"
    ):
        check_cache(loaded(device="cpu", rank=0, **asked), 8 * GIB, 2048, 0)


def test_what_fails_beside_the_loading_is_raised_when_it_is_waited_for() -> None:
    def fails() -> None:
        raise OSError("NCCL cannot be reached")

    beside = Beside(fails)
    with pytest.raises(OSError, match="NCCL cannot be reached"):
        beside.wait()
    done: list[int] = []
    Beside(lambda: done.append(1)).wait()
    assert done == [1]


def test_rotary_tables_are_no_longer_than_a_cache_can_be(tmp_path: Path) -> None:
    make_checkpoint("llama2", tmp_path / "model", max_position_embeddings=1 << 25)
    shard_checkpoint(tmp_path / "model", tmp_path / "shards", 1)
    runner = make_runner(EngineConfig(tmp_path / "shards", 1, kv_cache_memory=1 << 20, block_size=4), TPGroup())
    assert runner.memory.max_model_len <= len(runner.loaded.rotaries[0].cos) < 5000
