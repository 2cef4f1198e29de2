"""The commands that cases are made of."""

from __future__ import annotations

Command = tuple[str, ...]
PROVE: tuple[Command, ...] = (
    ("inspect-shards", "out", "--verify", "--source", "model"),
    ("merge", "out", "-o", "merged"),
)
"""What shows that shards in ``out`` are right."""
CHAT: Command = ("chat", "model", "-m", "hi", "--seed", "1")
BATCH: Command = ("batch", "lines.jsonl", "--model", "model", "-o", "rows.jsonl")
PLAN: Command = ("plan", "model", "--json")


def shard_and_prove(tp: int, *more: str) -> tuple[Command, ...]:
    return (("shard", "model", "--tp", str(tp), "-o", "out", *more), *PROVE)
