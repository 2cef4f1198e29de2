"""Fields of a request's body, read one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tpctl.client.schema_words import LENIENT
from tpctl.errors import RequestError, shorten, shown
from tpctl.wire.guide import BESIDE_TOOLS, TwoForms

_FIRST = re.compile(rf"\w+(?= is |: |{BESIDE_TOOLS}: )")  # the field that a message begins with

_LONGEST = 80  # characters of a field's name, which may be anything
_STRICT = frozenset({"text.format"})
"""Other names of ``response_format`` where "strict" may stand beside the schema."""


class FieldError(RequestError):
    """A field of a body cannot be had as it is.

    Attributes:
        param: its name.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = shorten(param, _LONGEST)


class UnreadVariable(RequestError):
    """A chat template does not read a variable."""

    def __init__(self, message: str, variable: str) -> None:
        super().__init__(message)
        self.variable = variable


@contextmanager
def asked_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name what somebody asked for as he did, and advise what can be said there.

    Args:
        names: what it was asked for as, by the name of the field or the template's variable that it became.
    """
    try:
        yield
    except UnreadVariable as error:
        if (name := names.get(error.variable)) is None:
            raise
        said = f"{name} is given, but the model's chat template reads no {error.variable}; leave it out"
        raise FieldError(said, name) from None
    except TwoForms as error:
        one, other = (names.get(name, name) for name in error.names)
        raise FieldError(str(TwoForms(one, other)), other) from None
    except RequestError as error:
        said = str(error)
        found = _FIRST.match(said)
        if found is None or (name := names.get(found[0])) is None:
            raise
        said = name + said[found.end() :]
        if found[0] == "response_format" and name not in _STRICT:
            said = said.replace(LENIENT, f"ask by response_format, and {LENIENT}")
        raise FieldError(said, "tools" if said.startswith(f"{name}{BESIDE_TOOLS}") else name) from None


def given(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is not given."""
    return {name: value for name, value in entry.items() if value is not None}


def refuse(body: dict[str, Any], names: Mapping[str, tuple[Any, ...]]) -> None:
    """Take fields out of ``body`` that ask for nothing.

    Args:
        names: of fields, with the values that ask for nothing.

    Raises:
        FieldError: one has another value.
    """
    for name, harmless in names.items():
        if name in body and not _among(value := body.pop(name), harmless):
            raise FieldError(f"{name} is {shown(value)}, which tpctl cannot do; leave it out", name)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``; raises ``FieldError``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FieldError(f"{name} is {shown(value)}, but must be a whole number from {least} to {most}", name)
    return value


def flag(value: Any, name: str, hint: str = "") -> bool:
    """``value`` if it is true or false; raises ``FieldError``."""
    if not isinstance(value, bool):
        raise FieldError(f"{name} is {shown(value)}, but must be true or false{hint}", name)
    return value


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """As JSON has it, where 1 is 1.0 and not true."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values)
