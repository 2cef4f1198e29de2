"""Command lines: every option of every command, as the program itself lists them, with values that nobody means."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import typer
from hypothesis import strategies as st

from tests.fuzz.bases import SHARDS
from tests.fuzz.case import Case
from tests.fuzz.mutations import Draw
from tpctl.cli.app import app

NEEDED: dict[str, tuple[str, ...]] = {
    "batch": ("lines.jsonl", "--model", "model"),
    "bench latency": ("model",),
    "bench quality": ("model",),
    "bench startup": ("model",),
    "bench throughput": ("model",),
    "chat": ("model", "-m", "hi"),
    "download": ("model",),
    "inspect-shards": ("shards",),
    "merge": ("shards", "-o", "merged"),
    "plan": ("model",),
    "reshard": ("shards", "--tp", "1", "-o", "out"),
    "shard": ("model", "--tp", "2", "-o", "out"),
    "upload": ("shards", "org/name"),
}
"""What makes each command right. ``doctor`` takes nothing that could be wrong, and starts a process with torch."""

_NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "4",
    "5",
    "1.5",
    "1e3",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "٣",
    "1_000",
    "",
    " 1",
    "9" * 30,
    "9" * 5000,
    "2147483648",
]
_SIZES = [
    "5GB",
    "1KB",
    "1000",
    "999",
    "0",
    "-1GB",
    "1e9GB",
    "1.5GiB",
    "5 gb",
    "5XB",
    "GB",
    "9" * 400 + "TB",
    "1." + "0" * 30 + "B",
    "１GB",
    "5GB\n",
]
_RANKS = [
    "0",
    "1",
    "0-1",
    "0,1",
    "1,0",
    "0,0",
    "2",
    "0-99999999999",
    "1-0",
    "-1",
    "a",
    ",",
    "",
    "0-",
    "0 - 1",
    "٠",
    "0,1,0-1",
]
_NAMES = [
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "model",
        "shards",
        "lines.jsonl",
        "out",
        "out/",
        "out/deep/er",
        "model/config.json",
        "nowhere",
        "a/b",
        "a/b/c",
    ),
    *(
        "~",
        "~nobody/x",
        "-",
        "--",
        "*",
        "x" * 300,
        "x/" * 3000,
        "a\nb",
        "\x1b[31mred",
        "\udcff",
        "日本",
        "a b",
        "/dev/null",
        "/dev/full",
    ),
    *(
        "/proc/self/mem",
        "/proc/x",
        "org/name",
        "org/name@main",
        "org/na me",
        "@",
        "pypi:",
        "pypi:-x",
        "x.gguf",
        "x.safetensors",
        "model.gguf",
    ),
    *(
        "hf://org/name",
        "https://example.org/x",
        "con",
        "model/model.safetensors",
        "shards/tpctl.json",
        "./model",
        "model/../model",
        "loop",
    ),
]
_WORDS = [
    "auto",
    "float32",
    "bfloat16",
    "float16",
    "int4",
    "cpu",
    "sdpa",
    "triton",
    "fcfs",
    "makespan",
    "vllm",
    "sglang",
    "model",
    "packed",
    "fp8",
    "short",
    "nano",
]

_KINDS: list[tuple[tuple[str, ...], list[str]]] = [
    (("part_size", "memory"), _SIZES),
    (("ranks",), _RANKS),
    (("dtype", "device", "backend", "policy", "compat", "workload", "shape"), _WORDS),
    (("tp", "rank", "max", "min", "num", "size", "top", "tokens", "runs", "seed"), _NUMBERS),
    (("temperature", "penalty", "utilization"), _NUMBERS),
]
"""Values by parts of an option's name; the first that fits counts."""


@cache
def commands() -> dict[str, list[Any]]:
    """Each command's parameters, by its whole name."""

    def walk(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in sorted(group.commands.items()):
            if hasattr(command, "commands"):
                yield from walk(command, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", command

    return {name: command.params for name, command in walk(typer.main.get_command(app)) if name in NEEDED}


def _values(parameter: Any) -> st.SearchStrategy[str]:
    """What an option may be given: mostly something of its own kind."""
    own: list[str] = next((values for words, values in _KINDS if any(word in parameter.name for word in words)), _NAMES)
    mixed = st.sampled_from([*_NAMES, *_NUMBERS, *_SIZES, *_WORDS])
    strange = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=6)
    return st.one_of(st.sampled_from(own), st.sampled_from(own), st.sampled_from(own), mixed, strange)


@st.composite
def option_cases(draw: Draw) -> Case:
    name = draw(st.sampled_from(sorted(commands())))
    words = [*name.split(), *NEEDED[name]]
    for parameter in draw(st.lists(st.sampled_from(commands()[name]), min_size=1, max_size=4)):
        if parameter.param_type_name == "argument":
            place = len(name.split())
            words[place] = draw(_values(parameter))
            continue
        option = draw(st.sampled_from(parameter.opts))
        if getattr(parameter, "is_flag", False):
            words.append(option if draw(st.integers(0, 9)) else f"{option}={draw(st.sampled_from(_WORDS))}")
            continue
        value = draw(_values(parameter))
        words += draw(
            st.sampled_from([[option, value], [f"{option}={value}"] if option.startswith("--") else [option + value]])
        )
    if not draw(st.integers(0, 19)):
        first = len(name.split()) + (NEEDED[name][0] == "model")  # without MODEL the demo would be fetched
        if first < len(words):
            del words[draw(st.integers(first, len(words) - 1))]
    if not draw(st.integers(0, 19)):
        words.append(draw(st.sampled_from(["--nothing", "-", "--", "-x", "extra", "--help", "", "--version", "-o"])))
    stdin = draw(st.sampled_from([b"", b"hi\n", b'{"prompt": "x"}\n', b"\xff\x00", b"a\nb\n/exit\n"]))
    return Case("options", SHARDS, (), (tuple(words),), stdin)
