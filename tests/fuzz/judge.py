"""What is a fault, whatever the case: tracebacks, other exit codes, time, memory, traces, messages that are none."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from tests.fuzz.case import Case, Outcome
from tests.fuzz.runner import SECONDS
from tests.fuzz.sandbox import MEMORY

LONGEST = 1500
"""Characters of a message that somebody can still be expected to read; paths of 300 may stand in it."""

_PLAIN_TEXT = frozenset({"inspect-shards", "plan", "shard", "merge", "reshard"})
_OUTPUT = {"merge": ("merged",), "shard": ("out",), "reshard": ("out",), "batch": ("rows.jsonl",)}


@dataclass(frozen=True)
class Fault:
    """``kind`` and ``where`` tell one fault from another; ``said`` is for whoever mends it."""

    kind: str
    where: str
    said: str

    @property
    def signature(self) -> str:
        return f"{self.kind} [{self.where}]"


def judge(case: Case, outcome: Outcome) -> list[Fault]:
    """Everything that is wrong with what a command did."""
    name = outcome.command[0]
    found: list[Fault] = []

    def fault(kind: str, said: str, where: str = "") -> None:
        found.append(Fault(kind, where or name, said))

    for what in outcome.outside:
        fault("written elsewhere", what)
    if outcome.failure is not None:
        kind = outcome.failure.split(" (")[0].split(":")[0]
        fault(kind, f"{outcome.failure} {outcome.stderr[-500:]}", f"{name} {outcome.place}".strip())
        return found
    if outcome.code not in (0, 1, 2):
        fault("exit code", f"exit code {outcome.code}: {outcome.stderr[-300:]}")
    if outcome.seconds > SECONDS:
        fault("time", f"{outcome.seconds:.1f} s")
    if outcome.peak > MEMORY:
        fault("memory", f"{outcome.peak / 1e6:.0f} MB")
    for what in outcome.notes:
        fault("left behind", what)
    found += _messages(case, outcome)
    if changed := [path for path in outcome.changed if not _allowed(case, outcome, path)]:
        fault("files touched", f"exit {outcome.code}, but {', '.join(changed[:5])} appeared, went or changed")
    return found


def _messages(case: Case, outcome: Outcome) -> list[Fault]:
    name, lines = outcome.command[0], outcome.stderr.split("\n")
    found: list[Fault] = []
    if outcome.stderr and lines.pop():
        found.append(Fault("message", name, f"stderr does not end with a line end: {outcome.stderr[-200:]!r}"))
    if "Traceback (most recent call last)" in outcome.stderr:
        found.append(Fault("traceback in a message", name, outcome.stderr[-500:]))
    for line in lines:
        if strange := sorted({character for character in line if _steers(character)}):
            found.append(Fault("control characters in a message", name, f"{strange} in {line[:300]!r}"))
        if len(line) > LONGEST + 3 * sum(len(word) for word in outcome.command):
            found.append(Fault("long message", name, f"{len(line)} characters: {line[:200]!r} … {line[-100:]!r}"))
    said = [line for line in lines if line.startswith("tpctl: ")]
    # A batch that ran says how it went; what is wrong stands in its rows.
    ran = name == "batch" and any(re.match(r"[\d,]+ prompts? in ", line) for line in lines)
    if outcome.code in (1, 2) and not said and not ran and "--help" not in outcome.command:
        found.append(Fault("no message", name, f"exit {outcome.code}, stderr {outcome.stderr[:200]!r}"))
    if outcome.code in (1, 2) and said and not lines[-1].startswith("tpctl: "):
        found.append(Fault("message of several lines", name, outcome.stderr[:500]))
    if outcome.code in (1, 2) and outcome.stdout and not ran:
        found.append(Fault("output before an error", name, outcome.stdout[:200]))
    shown = outcome.stdout if name in _PLAIN_TEXT and "--json" not in outcome.command else ""
    if strange := sorted({character for character in shown if _steers(character) and character != "\n"}):
        found.append(Fault("control characters in the output", name, f"{strange} in {outcome.stdout[:300]!r}"))
    return found


def _steers(character: str) -> bool:
    """Whether a character does something to a terminal, or to the order of a line, instead of standing in it."""
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp") and character != "\t"
    ) or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _allowed(case: Case, outcome: Outcome, path: str) -> bool:
    """Whether a command may change what lies there: its own cache, and where it succeeds what it was told to write."""
    if path == "cache" or path.startswith("cache/"):
        return True
    if outcome.code == 0 or (outcome.command[0] == "batch" and outcome.code == 1):
        if path == "work":
            return True
        if case.target == "options" and not path.startswith(("work/model/", "work/shards/", "home/", "tmp/")):
            return True
        targets = [word for place, word in enumerate(outcome.command) if outcome.command[place - 1] in ("-o", "--html")]
        return any(path == f"work/{target}" or path.startswith(f"work/{target}/") for target in targets)
    return False
