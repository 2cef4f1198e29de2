"""What a soak test looks at, and what it ends on."""

from __future__ import annotations

import json
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

KEPT = 512 << 20
"""Bytes by which a rank may grow beside its KV cache. torch keeps something for each number of tokens that a step has
had, less and less of it is new: of two layers 426 MB in 16 rounds of 500 streams, after which it still became more."""

LATER = 0.5
"""Seconds by which a server's first token may come later than ``chat``'s."""


def check(right: bool, said: str) -> None:
    """End with what is wrong, if it is."""
    if not right:
        raise SystemExit(f"WRONG: {said}")


def is_whole(raw: bytes, tokens: int) -> bool:
    """Whether a response in chunks, up to the end of its connection, is one stream of one answer that came to its end:
    each event is whole and of that answer, one says why it ended and has no text behind it, the last but one counts all
    tokens, and nothing is behind the last. Not each token has a chunk: an end-of-sequence token has no text, nor has a
    part of a character."""
    head, _, body = raw.partition(b"\r\n\r\n")
    try:
        *events, done, rest = unchunked(body).decode().split("\n\n")
        found = [json.loads(event.removeprefix("data: ")) for event in events]
        *chunks, last = found
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        right = (
            head.startswith(b"HTTP/1.1 200 ") and (done, rest) == ("data: [DONE]", ""),
            len({one["id"] for one in found}) == 1 and not any("error" in one for one in found),
            [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"],
            any(choice["text"] for choice in choices) and last["choices"] == [],
            last["usage"]["completion_tokens"] == tokens,
        )
    except (ValueError, KeyError, TypeError):  # what is half there, or of another form
        return False
    return all(right)


def unchunked(body: bytes) -> bytes:
    """What chunks hold (RFC 9112, 7.1). Raises ``ValueError``: there is no last one, or more behind it."""
    found, at, size = [], 0, -1
    while size:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        found.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
        if body[at - 2 : at] != b"\r\n":
            raise ValueError("a chunk is cut off")
    if at != len(body):
        raise ValueError("there is something behind the last chunk")
    return b"".join(found)


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
        more: bytes by which some may grow besides, in all.
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
        left = max(0, more.get(pid, 0) - max(0, before - first[pid]))
        if now > 1.02 * before + (4 << 20) + left:
            return f"{pid} grew from {before} to {now} bytes within {LOOKS} rounds"
    return ""


class Memory:
    """What each process of a server holds, round by round."""

    def __init__(self, server: ServerProcess, cache: int, *, helpers: bool = False) -> None:
        """Prepare.

        Args:
            cache: bytes of a rank's KV cache, of which it has touched all only after a while.
            helpers: whether there are processes beside the ranks that come and go, which are not looked at.
        """
        self._server = server
        self._cache = cache
        self._helpers = helpers
        self._rounds: list[dict[int, int]] = []

    def look(self) -> str:
        """Now, as megabytes: the server's, and those of its children, the largest first."""
        server = self._server
        others = server.workers() if self._helpers else children(server)
        found = {pid: server.memory(pid) for pid in (server.process.pid, *others)}
        self._rounds.append(found)
        own, *more = (f"{bytes_ / 1e6:.1f}" for bytes_ in found.values())
        return f"server {own} MB, others {' '.join(sorted(more, key=float, reverse=True))}"

    def steady(self) -> bool:
        """Whether there were rounds enough to say that nothing grows but a rank, within what it may."""
        return not self._growth()

    def check(self) -> None:
        """End if something still grows, and be it a rank that has grown by more than its KV cache and ``KEPT``."""
        said = self._growth()
        check(not said, said)

    def _growth(self) -> str:
        return growth(self._rounds, dict.fromkeys(self._server.workers(), self._cache + KEPT))


class Helpers:
    """Threads of a server's and of its ranks', and the processes beside them, round by round."""

    def __init__(self, server: ServerProcess, most: int) -> None:
        """``most``: processes that there may be."""
        self._server = server
        self._most = most
        self._rounds: list[int] = []

    def look(self) -> str:
        """Now, when nothing is at work."""
        server, workers = self._server, self._server.workers()
        count = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in (server.process.pid, *workers))
        self._rounds.append(count)
        beside = [pid for pid in children(server) if pid not in workers]
        check(len(beside) <= self._most, f"{len(beside)} processes beside the ranks, of {self._most} at most: {beside}")
        return f"{count} threads, {len(beside)} processes beside the ranks"

    def check(self) -> None:
        """End if there are ever more threads: each is started when it is first needed."""
        more = more_threads(self._rounds)
        check(not more, more)


def more_threads(rounds: Sequence[int]) -> str:
    """Whether each of the last rounds has more than any before; "": no."""
    before, now = max(rounds[:-LOOKS]), min(rounds[-LOOKS:])
    return f"threads became more and more: {list(rounds)}" if now > before else ""


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
