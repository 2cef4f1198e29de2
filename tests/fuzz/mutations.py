"""How something right becomes wrong: strategies that change JSON values, bytes, and the form of a file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.case import Change
from tests.fuzz.jsontext import Again, Raw, encode

Draw = Any
"""What hypothesis hands to a ``composite`` strategy."""

NUMBERS: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**9, 10**18),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e18, 1e308, -1e308),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e-999"), Raw("9", count=5000)),
]
TEXTS: list[Any] = [
    *("", " ", "a", "0", "1", "true", "null", "nan", "é", "日本", "\U0001f600", "x" * 1_000_000, "../x", "/etc/passwd"),
    *("a/b", ".", "..", "~", "model.safetensors", "config.json", "\x1b[31mred", "\x1b]0;title\x07", "a\nb", "a\r\nb"),
    *("a\x00b", "\x7f", "\x9b31m", "\u2028", "\u202eabc", "%s%n", "{}", "{{ 1 }}", "$HOME", "-o", "--force", "a" * 300),
    *(Raw('"\\ud800"'), Raw('"\\udfff\\ud800"'), Raw('"\\u0000"'), Raw('"\\x"'), Raw('"\x01"'), Raw("'a'")),
]
CONTAINERS: list[Any] = [
    *([], {}, [None], [[]], [0], [1, "a"], {"a": {}}, {"": None}, {"type": None}, [{}], list(range(1000)), ["a"] * 3),
    *(Raw("[", "]", 100_000), Raw('{"a":', "", 100_000), Raw("[", "", 100_000), Raw('{"a":1,', "}", 2)),
    *(Raw("[1,2"), Raw('{"a"}'), Raw("nul"), Raw("[1,]"), Raw("")),
]
WILD = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(CONTAINERS),
    st.integers(-10, 10),
    st.floats(),
    st.text(max_size=8),
)
"""A JSON value that nobody expects."""

_STEPS = ("set", "near", "delete", "rename", "double", "swap", "wrap", "grow")


def near(draw: Draw, value: Any) -> Any:
    """Something like ``value``, which a check may mistake for it."""
    if isinstance(value, bool) or value is None:
        return draw(st.sampled_from([True, False, None, 0, 1, "true", "false", "", []]))
    if isinstance(value, int | float):
        ways = [value + 1, value - 1, value * 2, -value, value * 10**6, float(value), str(value), [value], value + 0.5]
        return draw(st.sampled_from([*ways, value / 2, value // 2, {"value": value}, Raw(f"{value}.0e0")]))
    if isinstance(value, str):
        ways = [value + " ", value.upper(), value[1:], value[:-1], value + "\n", value + "\x00", [value], "x" + value]
        return draw(st.sampled_from([*ways, value * 2, {"content": value}]))
    if isinstance(value, list):
        return draw(st.sampled_from([value[1:], value[:-1], value * 2, value[::-1], dict.fromkeys(map(str, value))]))
    if isinstance(value, dict):
        return draw(st.sampled_from([list(value), list(value.values()), {k: value[k] for k in reversed(value)}]))
    return None


def place(draw: Draw, value: Any) -> list[tuple[Any, Any]]:
    """A random way down into ``value``: pairs of a container and a key of it; empty for the whole."""
    way: list[tuple[Any, Any]] = []
    while isinstance(value, dict | list) and value and (not way or draw(st.integers(0, 3))):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        # By an even choice lists of thousands would be all that is ever changed; the first few stand for the others.
        key = draw(st.sampled_from(keys[:40]))
        way.append((value, key))
        value = value[key]
    return way


@st.composite
def json_values(
    draw: Draw, base: Any, fields: Mapping[str, Sequence[Any]] | None = None, most: int = 3
) -> tuple[Any, str]:
    """``base`` with one to ``most`` changes, and those in words.

    Args:
        fields: of a ``base`` that is an object, entries that matter, each with values that are half right.
    """
    value = copy.deepcopy(base)
    said = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, most]))):
        if fields and draw(st.integers(0, 2)):
            name = draw(st.sampled_from(sorted(fields)))
            new = copy.deepcopy(draw(st.sampled_from(list(fields[name])) if draw(st.integers(0, 3)) else WILD))
            said.append(f"{name} = {_short(new)}")
            if isinstance(value, dict):
                value[name] = new
            continue
        if not draw(st.integers(0, 60)):
            value = draw(WILD)
            said.append(f"all = {_short(value)}")
            continue
        said.append(_change(draw, value))
    return value, "; ".join(said)


def _change(draw: Draw, value: Any) -> str:
    """One change somewhere in ``value``, in place; what it was."""
    way = place(draw, value)
    if not way:
        return "nothing"
    holder, key = way[-1]
    name = ".".join(str(key.key if isinstance(key, Again) else key) for _, key in way)
    step = draw(st.sampled_from(_STEPS))
    if step == "set":
        holder[key] = draw(WILD)
        return f"{name} = {_short(holder[key])}"
    if step == "near":
        holder[key] = near(draw, holder[key])
        return f"{name} = {_short(holder[key])}"
    if step == "delete":
        del holder[key]
        return f"no {name}"
    if step == "swap":
        other, there = place(draw, value)[-1]
        holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
        return f"{name} and {there} swapped"
    if step == "wrap":
        holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, {str(key): holder[key]}]))
        return f"{name} wrapped"
    if isinstance(holder, list):
        holder.insert(draw(st.integers(0, len(holder))), draw(WILD) if step == "grow" else copy.deepcopy(holder[key]))
        return f"{name} one more"
    if step == "rename":
        new = draw(st.sampled_from([f"{key} ", f"x{key}", "", "\x1b[31m", "a\nb", "é" * 300, "__proto__"]))
        holder[new] = holder.pop(key)
        return f"{name} renamed {_short(new)}"
    if step == "double" and isinstance(key, str):
        holder[Again(key)] = draw(WILD)
        return f"{name} again = {_short(holder[Again(key)])}"
    new = draw(st.text(max_size=5))
    holder[new] = draw(WILD)
    return f"{name}: beside it {new!r} = {_short(holder[new])}"


@st.composite
def json_bytes(draw: Draw, value: Any) -> bytes:
    """The text of a JSON value, written in one of the ways that people write it."""
    text = encode(value, ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    return text.encode("utf-8", "surrogatepass")


@st.composite
def broken_bytes(draw: Draw, content: bytes) -> tuple[bytes, str]:
    """``content`` as a bad disk, a bad editor or a bad download leaves it; and how."""
    at = draw(st.integers(0, len(content)))
    ways: dict[str, bytes] = {
        "a byte order mark": b"\xef\xbb\xbf" + content,
        "UTF-16": content.decode("utf-8", "replace").encode("utf-16"),
        f"cut at {at}": content[:at],
        f"bytes that are not UTF-8 at {at}": content[:at] + b"\xff\xfe" + content[at:],
        f"half a pair at {at}": content[:at] + b"\xed\xa0\x80" + content[at:],
        f"a NUL at {at}": content[:at] + b"\x00" + content[at:],
        f"bit {at % 8} of byte {at} flipped": _flipped(content, at),
        "empty": b"",
        "white space": b" \n" * 1000,
        "twice": content + content,
        "with something behind it": content + b"}\n",
        "line ends of Windows": content.replace(b"\n", b"\r\n"),
        "a page of HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "100,000 brackets": b"[" * 100_000,
    }
    how = draw(st.sampled_from(list(ways)))
    return ways[how], how


def _flipped(content: bytes, at: int) -> bytes:
    if at >= len(content):
        return content
    return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]


_SPARSE = 1_200_000_000
"""Bytes of a file that has none on the disk: more than a command may keep in memory."""
FORMS = ("remove", "folder", "fifo", "loop", "dangling", "zero", "unreadable", "sparse")


@st.composite
def forms(draw: Draw, path: str, but: str = "") -> Change:
    """The file at ``path`` in a form that no file should have, other than ``but``."""
    kind = draw(st.sampled_from([form for form in FORMS if form != but]))
    return Change(path, kind, size=_SPARSE if kind == "sparse" else 0)


@st.composite
def json_files(draw: Draw, path: str, base: Any, fields: Mapping[str, Sequence[Any]] | None = None) -> Change:
    """A change to the JSON file at ``path``: mostly to what it says, at times to its bytes or its form."""
    way = draw(st.integers(0, 19))
    if way == 0:
        return draw(forms(path))
    if way <= 2:
        content, why = draw(broken_bytes(encode(base, indent=2).encode()))
        return Change(path, "write", content, why=why)
    value, why = draw(json_values(base, fields))
    return Change(path, "write", draw(json_bytes(value)), why=why)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Raw) else f"Raw({value.before[:40]!r}, {value.after!r}, {value.count})"
    return text if len(text) < 120 else f"{text[:80]}… ({len(text):,} characters)"
