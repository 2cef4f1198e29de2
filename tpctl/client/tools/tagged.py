"""Calls whose arguments are written one by one between tags: Qwen3-Coder, Qwen3.5, Seed-OSS, MiniMax-M2 and GLM-4.5.

<tool_call>                              <minimax:tool_call>                       <tool_call>get_weather
<function=get_weather>                   <invoke name="get_weather">               <arg_key>city</arg_key>
<parameter=city>                         <parameter name="city">Paris</parameter>  <arg_value>Paris</arg_value>
Paris                                    </invoke>                                 </tool_call>
</parameter>                             </minimax:tool_call>
</function>
</tool_call>

Such texts have no types: they come from the tools' schemas. Source: the models' chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.client.tools.json_value import encoded
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Malformed, Reader, Reading
from tpctl.client.tools.typed import as_json, types_of
from tpctl.errors import RequestError, shown

Pair = tuple[str, str]

_OF_TEXTS = frozenset({"type", "title", "description", "default", "examples"})
"""Words of a text's schema that ask for nothing else."""


@dataclass(frozen=True)
class Tagged:
    """Functions and parameters in tags that have their names.

    Attributes:
        block: the tags around it all; ``function``: around a function's name, ``parameter`` around a parameter's.
        close: what ends a function, and a parameter.
        lines: a value stands on lines of its own.
        shared: several calls have one block.
    """

    name: str
    block: Pair
    function: Pair
    parameter: Pair
    close: Pair
    lines: bool
    shared: bool = False

    bare = ""
    short_ids = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.block, *self.close)

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.block[0], self.function[0])

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        if opened == self.block[0]:
            yield from reader.take(self.function[0])
        while True:
            name = yield from reader.name(self.function[1])
            arguments = Arguments(reader, name)
            while (yield from reader.take(self.parameter[0], self.close[0])) == self.parameter[0]:
                key = yield from reader.all_until(self.parameter[1])
                yield from arguments.read(key, self.close[1], trim=self.lines)
            arguments.end()
            if (yield from reader.passed(self.function[0], self.block[1])) != self.function[0]:
                return

    def grammar(self, lark: Lark, *, single: bool) -> str:
        opened, closed = map(lark.mark, self.block)
        line = "\n" if self.lines else ""
        bodies = []
        for name in lark.schemas:
            parts = [lark.text(f"{self.function[0]}{name}{self.function[1]}\n")]
            for key, end, optional in values(lark, name, line, self.close[1]):
                one = f'{lark.text(f"{self.parameter[0]}{key}{self.parameter[1]}{line}")} {end} "\\n"'
                parts.append(f"({one})?" if optional else one)
            bodies.append(" ".join([*parts, lark.mark(self.close[0])]))
        one = lark.one_of(bodies)
        if not self.shared:
            return lark.listed(f'{opened} "\\n" {one} "\\n" {closed}', '"\\n"', single=single)
        several = lark.listed(one, '"\\n"', single=single)
        return f'{opened} "\\n" {several} "\\n" {closed}'


@dataclass(frozen=True)
class Keyed:
    """GLM's: keys and values between tags."""

    name = "glm"
    marks = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    opens = ("<tool_call>",)
    bare = ""
    short_ids = False

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        _, close, key_open, key_close, value_open, value_close = self.marks
        yield from reader.space()
        name = ""
        while (yield from reader.at(key_open, close, "\n")) is None:
            if reader.ended or name + reader.text[:1] not in (known[: len(name) + 1] for known in reader.names):
                raise Malformed
            name += reader.drop(1)
        arguments = Arguments(reader, name)
        while (yield from reader.take(key_open, close)) == key_open:
            key = yield from reader.all_until(key_close)
            yield from reader.take(value_open)
            yield from arguments.read(key.strip(), value_close)
        arguments.end()

    def grammar(self, lark: Lark, *, single: bool) -> str:
        opened, closed, key_open, key_close, value_open, _ = map(lark.mark, self.marks)
        bodies = []
        for name in lark.schemas:
            parts = [lark.text(f"{name}\n")]
            for key, end, optional in values(lark, name, "", self.marks[5]):
                one = f'{key_open} {lark.text(key)} {key_close} "\\n" {value_open} {end} "\\n"'
                parts.append(f"({one})?" if optional else one)
            bodies.append(" ".join(parts))
        return lark.listed(f"{opened} {lark.one_of(bodies)} {closed}", '"\\n"', single=single)


class Arguments:
    """The arguments of a call, put together as one JSON object, with texts told as they come."""

    def __init__(self, reader: Reader, name: str) -> None:
        """Begin a call. Raises ``Malformed``."""
        reader.begin(name)
        self._reader = reader
        self._properties = properties(reader.names[name])
        self._keys: set[str] = set()

    def read(self, key: str, end: str, *, trim: bool = False) -> Reading[None]:
        """Read a value up to the mark ``end``. Raises ``Malformed``."""
        if key in self._keys:
            raise Malformed
        self._reader.argue(("{" if not self._keys else ", ") + encoded(key) + ": ")
        self._keys.add(key)
        types = types_of(self._properties.get(key))
        if types == {"string"}:
            self._reader.argue('"')
            yield from self._reader.until(end, lambda text: self._reader.argue(_inner(text)), trim=trim)
            self._reader.argue('"')
        else:
            text = yield from self._reader.all_until(end, trim=trim)
            self._reader.argue(as_json(text, types))

    def end(self) -> None:
        self._reader.argue("}" if self._keys else "{}")
        self._reader.end()


def properties(schema: Any) -> Mapping[str, Any]:
    """The schemas of an object's members."""
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def values(lark: Lark, name: str, before: str, close: str) -> list[tuple[str, str, bool]]:
    """The arguments of a function: the key of each, what is written up to and with its end, and whether it may be left
    out. ``before`` stands before the end, the mark ``close``.

    Raises:
        RequestError: the schema is strict, and asks of a text what cannot be enforced.
    """
    schema, strict = lark.schemas[name], name in lark.strict
    required = schema.get("required") or ()
    found = []
    for key, own in properties(schema).items():
        own = own if isinstance(own, Mapping) else {}
        types, end = types_of(own), f"{lark.text(before)} {lark.mark(close)}" if before else lark.mark(close)
        choices = own.get("enum") or ([own["const"]] if "const" in own else [])
        if types and "string" not in types:
            defined = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
            said = f"{lark.json({**defined, **own}, strict=strict)} {end}"
        elif choices:
            texts = (one if isinstance(one, str) else encoded(one) for one in choices)
            said = f"{lark.one_of(map(lark.text, texts))} {end}"
        else:
            if strict and (not types or (more := sorted(own.keys() - _OF_TEXTS))):
                what = "no type" if not types else more[0]
                raise RequestError(f"{name}: {shown(key)} has {what}, which cannot be enforced in texts between tags")
            said = lark.up_to(before, close)
        found.append((key, said, key not in required))
    return found


def _inner(text: str) -> str:
    """Text within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


QWEN_XML = Tagged(
    "qwen-xml",
    ("<tool_call>", "</tool_call>"),
    ("<function=", ">"),
    ("<parameter=", ">"),
    ("</function>", "</parameter>"),
    lines=True,
)
SEED = Tagged(
    "seed",
    ("<seed:tool_call>", "</seed:tool_call>"),
    ("<function=", ">"),
    ("<parameter=", ">"),
    ("</function>", "</parameter>"),
    lines=False,
)
MINIMAX = Tagged(
    "minimax",
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ('<invoke name="', '">'),
    ('<parameter name="', '">'),
    ("</invoke>", "</parameter>"),
    lines=False,
    shared=True,
)
