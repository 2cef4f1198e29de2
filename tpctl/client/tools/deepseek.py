"""DeepSeek V3 and V3.1, and Kimi K2: a name and its arguments between marks, in a block of several.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}
<｜tool▁call▁end｜><｜tool▁calls▁end｜>  (on one line)

In V3 and R1 a type stands in the place of the name, and the arguments are a block of code:

<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜>

Kimi's names are functions.NAME:INDEX, and that is the call's id, too. Source: the models' chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpctl.client.tools.json_call import read_arguments
from tpctl.client.tools.lark import Lark
from tpctl.client.tools.reader import Malformed, Reader, Reading

_FENCE = "\n```json\n"


@dataclass(frozen=True)
class Blocks:
    """Calls between marks.

    Attributes:
        marks: of the block's beginning and end, a call's, and between name and arguments.
        typed: the template writes a type before the name; what comes is read either way.
        numbered: names are ``functions.NAME:INDEX``.
    """

    name: str
    marks: tuple[str, ...]
    typed: bool = False
    numbered: bool = False

    bare = ""
    short_ids = False

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.marks[0], self.marks[2])

    def calls(self, reader: Reader, opened: str) -> Reading[None]:
        begin, end, call_begin, call_end, between = self.marks
        if opened == begin:
            yield from reader.take(call_begin)
        while True:
            yield from reader.space()
            yield from self._call(reader, (yield from reader.name(between)).strip())
            yield from reader.take(call_end)
            reader.end()
            if (yield from reader.passed(call_begin, end)) != call_begin:
                return

    def grammar(self, lark: Lark, *, single: bool) -> str:
        begin, end, call_begin, call_end, between = map(lark.mark, self.marks)
        bodies = []
        for name, rule in lark.arguments():
            if self.numbered:
                bodies.append(f"{lark.text(f'functions.{name}:')} /[0-9]{{1,3}}/ {between} {rule}")
            elif self.typed:
                bodies.append(f'"function" {between} {lark.text(f"{name}{_FENCE}")} {rule} "\\n```"')
            else:
                bodies.append(f"{lark.text(name)} {between} {rule}")
        one = f"{call_begin} {lark.one_of(bodies)} {call_end}"
        several = lark.listed(one, lark.text("\n") if self.typed else "", single=single)
        return f"{begin} {several} {end}"

    def _call(self, reader: Reader, name: str) -> Reading[None]:
        if self.numbered:
            reader.begin(_bare_name(name), name)
            yield from read_arguments(reader)
            return
        fenced = name == "function" and name not in reader.names
        if fenced:
            name = (yield from reader.all_until("\n")).strip()
            yield from reader.take("```json")
        reader.begin(name)
        yield from read_arguments(reader)
        if fenced:
            yield from reader.take("```")


def _bare_name(name: str) -> str:
    """``functions.get_weather:0`` without what stands around the name."""
    kind, dot, rest = name.partition(".")
    bare, colon, index = rest.rpartition(":")
    if kind != "functions" or not (dot and colon and index.isdigit()):
        raise Malformed
    return bare


def _deepseek(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"<｜{name.replace(' ', '▁')}｜>" for name in names)


DEEPSEEK = _deepseek(("tool calls begin", "tool calls end", "tool call begin", "tool call end", "tool sep"))
KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)
