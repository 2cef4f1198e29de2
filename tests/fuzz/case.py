"""One case, and what came of it. Both travel between two processes, and are shown to whoever has to mend a fault."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SHOWN = 300
"""Bytes of a file that a failure shows."""


@dataclass(frozen=True, repr=False)
class Change:
    """One file of the case's folder that is not as it should be.

    Attributes:
        path: relative to the folder that the commands run in.
        kind: ``"write"`` puts ``content`` there. The others are forms that a name can have: ``"remove"``, ``"folder"``,
            ``"fifo"``, ``"loop"`` (a link to itself), ``"dangling"``, ``"zero"`` (a link to /dev/zero),
            ``"unreadable"``, ``"cut"`` (to ``size`` bytes), ``"sparse"`` (lengthened to ``size`` bytes),
            ``"flip"`` (bit ``size``).
        why: what was done to the content, in words.
    """

    path: str
    kind: str = "write"
    content: bytes = b""
    size: int = 0
    why: str = ""

    def __repr__(self) -> str:
        parts = [self.path, self.kind]
        if self.kind == "write":
            parts.append(shown(self.content))
        if self.kind in ("cut", "sparse", "flip"):
            parts.append(f"{self.size:,}")
        if self.why:
            parts.append(f"# {self.why}")
        return f"<{' '.join(parts)}>"


@dataclass(frozen=True)
class Case:
    """A folder ``model`` (or ``shards``), changes to it, and commands that are run one after the other in one folder.

    A command after one that failed is not run. ``base`` names what lies there before the changes.
    """

    target: str
    base: str
    changes: tuple[Change, ...]
    commands: tuple[tuple[str, ...], ...]
    stdin: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What one command did.

    Attributes:
        code: the exit code; ``None`` where the process died or never ended.
        failure: an exception that nobody caught, or how the process ended; its last own line in ``place``.
        seconds: on the clock.
        peak: most bytes of memory of the process, or of a process that it started.
        changed: names below the case's folder that appeared, went or differ.
        outside: what was written elsewhere, each with what was done.
        notes: what else is against the rules (torch imported).
        engine: the configuration that an engine was started with, and the requests that it was given.
    """

    command: tuple[str, ...]
    code: int | None
    stdout: str = ""
    stderr: str = ""
    failure: str | None = None
    place: str = ""
    seconds: float = 0.0
    peak: int = 0
    changed: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)


def shown(content: bytes) -> str:
    """``content`` in a line that can be read."""
    if len(content) <= _SHOWN:
        return repr(content)
    half = _SHOWN // 2
    return f"{content[:half]!r} … {len(content):,} bytes … {content[-half:]!r}"
