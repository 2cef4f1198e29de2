"""Fields of a model's JSON files, read strictly: every value has the kind and the range that it needs, or is refused.

A missing field has the value that the family's configuration class in transformers gives it. ``null`` means "none"
only where that class takes it so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from tpctl.errors import CheckpointError, shown

MOST = 2**31 - 1


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object.

    Attributes:
        defaults: what missing fields are.
        nullable: fields whose ``null`` means "none"; that of others is refused as any other wrong value.
        file: what messages call the file.
        read: the names that somebody has asked for so far.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nullable: Collection[str] = ()
    file: str = "config.json"
    read: set[str] = field(default_factory=set, compare=False)

    def __contains__(self, key: str) -> bool:
        self.read.add(key)
        return key in self.values

    def get(self, key: str) -> Any:
        """The field as it stands in the file, or its default."""
        self.read.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key)

    def either(self, key: str, other: str) -> str:
        """Which of two names of one field the file has; ``key`` where it has neither.

        Raises:
            CheckpointError: it has both, and they differ.
        """
        self.read.update((key, other))
        if key in self.values and other in self.values and self.values[key] != self.values[other]:
            raise CheckpointError(
                f"{self.file}: {key} is {shown(self.values[key])} and {other}, which is the same, is "
                f"{shown(self.values[other])}; keep the one that is meant"
            )
        return other if other in self.values and key not in self.values else key

    def within(self, values: Mapping[str, Any], **defaults: Any) -> Fields:
        """The fields of an inner object of the same file."""
        return replace(self, values=values, defaults=defaults, nullable=(), read=set())

    def whole(self, key: str, *, least: int = 1, most: int = MOST) -> int:
        """A whole number."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def optional_whole(self, key: str, *, least: int = 1, most: int = MOST) -> int | None:
        """A whole number, or ``None`` where ``null`` or a default says so."""
        if self.get(key) is None and (key in self.nullable or key not in self.values):
            return None
        return self.whole(key, least=least, most=most)

    def number(self, key: str, *, least: float, most: float) -> float:
        """A finite number."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not _between(value, least, most):
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A copy of the object that the field holds; empty where it is missing or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return dict(value or {})

    def inside(self, key: str) -> Fields:
        """The fields of the object that the field holds, of which none has a default."""
        return self.within(self.mapping(key))

    def wholes(self, key: str, *, most: int = MOST) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is missing or null."""
        value = self.get(key)
        found = value if isinstance(value, list) else [] if value is None else [None]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= most for n in found):
            raise self.wrong(key, f"a list of whole numbers up to {most}")
        return tuple(found)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where it is missing or null."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise self.wrong(key, "a list of names")
        return tuple(value or ())

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """A token id, a list of them, or null; every one is in the vocabulary."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.wrong(key, "a token id or a list of them")
        if outside := [item for item in ids if not 0 <= item < vocab_size]:
            raise CheckpointError(
                f"{self.file}: {key} is {shown(outside[0])}, but the vocabulary has the tokens 0 to {vocab_size - 1}"
            )
        return list(ids)

    def wrong(self, key: str, needed: str) -> CheckpointError:
        """What is wrong with a field that is not ``needed``."""
        return CheckpointError(f"{self.file}: {key} is {shown(self.get(key))}, but {needed} is needed")


def _between(value: float, least: float, most: float) -> bool:
    return (isinstance(value, int) or isfinite(value)) and least <= value <= most
