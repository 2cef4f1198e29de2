"""JSON text that ``json.dumps`` would not write: deep nesting, doubled keys, numbers of 5,000 digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that stands for itself: ``before``, ``count`` times, and then as often ``after``."""

    before: str
    after: str = ""
    count: int = 1

    def __str__(self) -> str:
        return self.before * self.count + self.after * self.count


@dataclass(frozen=True)
class Again:
    """A key that is in the object already."""

    key: str


def encode(value: Any, *, ascii: bool = True, indent: int | None = None, canonical: bool = False) -> str:
    """JSON of a value in which ``Raw`` stands for itself and ``Again`` for one more entry of that key.

    Args:
        canonical: as a manifest is written.
    """
    texts: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            texts.append(str(value))
            return f"\x00{len(texts) - 1}\x00"
        if isinstance(value, dict):
            entries = {}
            for key, item in value.items():
                if isinstance(key, Again):
                    texts.append(json.dumps(key.key))
                    entries[f"\x00{len(texts) - 1}\x00"] = plain(item)
                else:
                    entries[key] = plain(item)
            return entries
        return [plain(item) for item in value] if isinstance(value, list) else value

    found = plain(value)
    text = _canonical(found) if canonical else json.dumps(found, ensure_ascii=ascii, indent=indent)
    for number, raw in enumerate(texts):
        text = text.replace(f'"\\u0000{number}\\u0000"', raw)
    return text


def seal(value: dict[str, Any]) -> str:
    """A manifest's text with the digest that is right for it."""
    content = {key: item for key, item in value.items() if key != "sha256"}
    digest = sha256(encode(content, canonical=True).encode("utf-8", "surrogatepass")).hexdigest()
    return encode({**content, "sha256": digest}, canonical=True)


def _canonical(value: Any, depth: int = 4) -> str:
    """The manifest's layout: objects and lists of the first four levels have a line for each entry."""
    encoded = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

    def dump(value: Any, level: int) -> str:
        if not isinstance(value, dict | list) or not value or level == depth:
            return encoded(value)
        inner, outer = "\n" + " " * (level + 1), "\n" + " " * level
        if isinstance(value, list):
            return f"[{inner}" + f",{inner}".join(dump(item, level + 1) for item in value) + f"{outer}]"
        return (
            f"{{{inner}"
            + f",{inner}".join(f"{encoded(k)}:{dump(v, level + 1)}" for k, v in value.items())
            + outer
            + "}"
        )

    return dump(value, 0) + "\n"
