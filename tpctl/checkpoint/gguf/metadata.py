"""The keys of a GGUF file, each asked for by the type it must have, and those that nobody asked for."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from math import isclose, isfinite

from tpctl.checkpoint.gguf.header import GgufError, Value
from tpctl.errors import shorten

_DESCRIBING = ("general", "quantize")
"""Groups of keys that say where a file comes from; unlike the rest they may hold anything."""


class Metadata:
    """A file's keys. Whoever asks for one has understood it; ``check_understood`` refuses the others.

    A key that begins with a dot is the architecture's own: ``.block_count`` of a Llama is ``llama.block_count``.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self._asked: set[str] = set()
        self.architecture = ""
        self.architecture = self.text("general.architecture")

    def full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def has(self, key: str) -> bool:
        return self.full(key) in self._values

    def named(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix``."""
        return [key for key in self._values if key.startswith(prefix)]

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 to 2^31 - 1; of an array of one per layer, the value that all layers have."""
        value = self._one(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self._bad(key, value, "a whole number of less than 2^31")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self._bad(key, value, "a positive number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise self._bad(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._bad(key, value, "text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self._bad(key, value, "a list of texts")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self._get(key, None)
        if not isinstance(value, array):
            raise self._bad(key, value, "a list of numbers")
        return list(value)

    def only(self, key: str, *neutral: float, why: str = "") -> None:
        """Refuse a setting that has another value than those which change nothing."""
        if not self.has(key):
            return
        value = self._one(key, None)
        if isinstance(value, int | float) and any(isclose(value, number, rel_tol=1e-5) for number in neutral):
            return
        shown = shorten(value, 40) if isinstance(value, str) else value
        raise GgufError(f"{self.full(key)} is {shown}, which cannot be converted{why}; {OTHER}")

    def ignore(self, *keys: str) -> None:
        """Nothing that tpctl does depends on these."""
        self._asked.update(self.full(key) for key in keys)

    def check_understood(self) -> None:
        """Refuse a file with settings that nobody asked for.

        Keys of other groups than the architecture's, the tokenizer's, a split's and an adapter's are labels that
        whoever made the file put there.
        """
        groups = (self.architecture, "tokenizer", "split", "adapter")
        unknown = [key for key in self._values if key not in self._asked and key.partition(".")[0] in groups]
        if unknown:
            names = ", ".join(shorten(key, 80) for key in unknown[:3])
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise GgufError(f"it has settings that tpctl does not know ({names}{more}); {OTHER}")

    def _get(self, key: str, default: Value | None) -> Value:
        key = self.full(key)
        self._asked.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise GgufError(f"it has no {key}, which is needed; convert the model again")
        return value

    def _one(self, key: str, default: Value | None) -> Value:
        value = self._get(key, default)
        if not isinstance(value, array):
            return value
        if len(set(value)) != 1:
            raise GgufError(f"{self.full(key)} differs between layers, which is not supported; {OTHER}")
        first: int | float = value[0]
        return first

    def _bad(self, key: str, value: Value, needed: str) -> GgufError:
        shown = f"a list of {len(value)}" if isinstance(value, list | array) else shorten(repr(value), 60)
        return GgufError(f"{self.full(key)} is {shown}, but {needed} is needed")


OTHER = "use the model's safetensors checkpoint"
