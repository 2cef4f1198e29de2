"""Host memory: the least of what the machine and every control group above the process leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.engine.memory import available_host_memory

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
