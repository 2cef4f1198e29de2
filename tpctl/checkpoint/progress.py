"""How a piece of work tells how far it has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a piece of work has come: ``done`` of ``total`` bytes, and what is being done."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...
