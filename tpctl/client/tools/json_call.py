"""A call as one JSON object: {"name": …, "arguments": {…}}, with ``parameters`` for the latter in Llama's."""

from __future__ import annotations

from collections.abc import Callable

from tpctl.client.tools.json_value import encoded
from tpctl.client.tools.reader import Malformed, Reader, Reading, decoded

_ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("id", "type")  # that some models write, and that say nothing


def read_call(reader: Reader) -> Reading[None]:
    """Read such an object. The arguments are told as they come, once the name is known.

    Raises:
        Malformed: it is none, or has other members: it may be an answer that happens to be JSON.
    """
    yield from reader.take("{")
    name: str | None = None
    held: list[str] = []
    argued = False
    while True:
        yield from reader.space()
        key = yield from reader.value()
        yield from reader.take(":")
        yield from reader.space()
        if key == "name" and name is None:
            name = yield from reader.value()
            if not isinstance(name, str):
                raise Malformed
            reader.begin(name)
            for text in held:
                reader.argue(text)
        elif key in _ARGUMENTS and not argued:
            argued = True
            yield from read_arguments(reader, held.append if name is None else reader.argue)
        elif key in _BESIDE:
            yield from reader.value()
        else:
            raise Malformed
        if (yield from reader.take(",", "}")) == "}":
            break
    if name is None:
        raise Malformed
    if not argued:
        reader.argue("{}")


def read_arguments(reader: Reader, tell: Callable[[str], object] | None = None) -> Reading[None]:
    """Read the arguments of a call: an object, or the text of one, or nothing. Raises ``Malformed``."""
    say = tell or reader.argue
    yield from reader.space()
    if reader.text.startswith("{"):
        yield from reader.json(say)
        return
    value = yield from reader.value()
    if isinstance(value, str):
        value = decoded(value or "{}")
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise Malformed
    say(encoded(value))


def json_head(name: str, arguments: str = "arguments") -> str:
    """What stands before a call's arguments."""
    return f'{{"name": "{name}", "{arguments}": '
