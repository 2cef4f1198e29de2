"""What a soak test looks at, and what it ends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.distributed.server_process import ServerProcess

LOOKS = 3
"""Rounds whose least memory is compared with the least of as many before. A round that needed more at a time leaves
memory in pieces, so that one look after it shows more, though no more is in use; of a leak the least grows as well."""

MOST_ROUNDS = 16
"""In which memory has to stop growing."""

LATER = 0.5
"""Seconds by which a server's first token may come later than ``chat``'s."""


def check(right: bool, said: str) -> None:
    """End with what is wrong, if it is."""
    if not right:
        raise SystemExit(f"WRONG: {said}")


def is_whole(raw: bytes, tokens: int) -> bool:
    """Whether a stream came to its end with all tokens. Not each has a chunk: an end-of-sequence token has no text, nor
    has a part of a character."""
    marks = (b"HTTP/1.1 200", b'"finish_reason":"length"', b'"completion_tokens":%d,' % tokens, b"data: [DONE]")
    return all(mark in raw for mark in marks) and b'{"error":' not in raw


def check_start(pairs: Sequence[tuple[float, float]]) -> str:
    """Seconds to the first token of a server and of ``chat``, taken in turns; what they come to."""
    served, chatted = (median(side) for side in zip(*pairs, strict=True))
    said = f"medians: serve {served:.2f} s, chat {chatted:.2f} s"
    check(served <= chatted + LATER, f"{said}; serve may take {LATER} s more")
    return said


def growth(rounds: Sequence[Mapping[int, int]], more: Mapping[int, int]) -> str:
    """Which process still grows, without what the first round takes, as all is used once then; "" if none does.

    Args:
        rounds: bytes of each process by its id, after each round.
        more: bytes by which some may grow besides.
    """
    if len(rounds) < 1 + 2 * LOOKS:
        return f"{len(rounds)} rounds are too few to tell"
    first, *others = rounds[1:]
    for one in others:
        if one.keys() != first.keys():
            return f"processes came or went: {sorted(first)}, {sorted(one)}"
    for pid in first:
        before = min(one[pid] for one in rounds[-2 * LOOKS : -LOOKS])
        now = min(one[pid] for one in rounds[-LOOKS:])
        if now > 1.02 * before + (4 << 20) + more.get(pid, 0):
            return f"{pid} grew from {before} to {now} bytes within {LOOKS} rounds"
    return ""


class Memory:
    """What each process of a server holds, round by round."""

    def __init__(self, server: ServerProcess, cache: int) -> None:
        """``cache``: bytes of a rank's KV cache, of which it has touched all only after a while."""
        self._server = server
        self._cache = cache
        self._rounds: list[dict[int, int]] = []

    def look(self) -> str:
        """Now, as megabytes: the server's, and those of its children, the largest first."""
        server = self._server
        found = {pid: server.memory(pid) for pid in (server.process.pid, *children(server))}
        self._rounds.append(found)
        own, *others = (f"{bytes_ / 1e6:.1f}" for bytes_ in found.values())
        return f"server {own} MB, others {' '.join(sorted(others, key=float, reverse=True))}"

    def steady(self) -> bool:
        """Whether there were rounds enough to say that nothing grows."""
        return not self._growth()

    def check(self) -> None:
        """End if something still grows."""
        check(not (said := self._growth()), said)

    def _growth(self) -> str:
        return growth(self._rounds, dict.fromkeys(self._server.workers(), self._cache))


def children(server: ServerProcess) -> list[int]:
    """Ids of all processes that the server started, and those of theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [server.process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return sorted(found[1:])
