"""Who may import whom, read from the source; and that the command line's front stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from tests.unit.test_cli import commands
from tpctl.cli.app import app

ROOT = Path(__file__).parent.parent.parent / "tpctl"
DOCUMENT = ROOT.parent / "docs" / "architecture.md"
_ROW = re.compile(r"^\| `([a-z_.]+)` \|.*\| ([^|]*?) ?\|$")


def rules() -> dict[str, tuple[str, ...]]:
    """What each room may import besides itself and ``errors``: the table of docs/architecture.md, in its order."""
    table: dict[str, tuple[str, ...]] = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if row := _ROW.match(line):
            table[row[1]] = ("",) if row[2] == "everything" else tuple(re.findall(r"`([a-z_.]+)`", row[2]))
    return table


MAY_IMPORT = {**rules(), "start": ("cli",), "__main__": ("start",), "": ("client.llm", "wire.sampling")}
# Modules that may name torch or transformers at all; those with a star only inside functions.
HEAVY = {"distributed", "shared_memory", "kernels", "layers", "models", "engine", "launch.agent*"}
LIGHT = ("engine.scheduling",)


FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): file
    for file in sorted(ROOT.rglob("*.py"))
}
"""The file of each module."""


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    return tuple((name, ast.parse(file.read_text(encoding="utf-8"))) for name, file in FILES.items())


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def room(name: str) -> str:
    """The room that a module, or what is imported of it, belongs to: the most special name that holds it."""
    return next(key for key in sorted(MAY_IMPORT, key=len, reverse=True) if within(name, key))


def test_rooms_stand_above_those_that_know_them() -> None:
    names = list(rules())
    assert len(names) > 30
    for place, name in enumerate(names[:-1]):
        above = names[:place]
        for known in MAY_IMPORT[name]:
            assert any(within(known, one) or within(one, known) for one in above), f"{name} knows {known}, below it"


def floors() -> list[str]:
    """The rooms in floors, the highest first: each knows only such as lie below it, and stands as low as it can."""
    floor: dict[str, int] = {}
    for name in rules():
        below = [one for one in floor if any(within(known, one) or within(one, known) for known in MAY_IMPORT[name])]
        floor[name] = 1 + max((floor[one] for one in below), default=-1)
    numbers = range(max(floor.values()), -1, -1)
    return [f"{number:2}  {'  '.join(name for name in floor if floor[name] == number)}" for number in numbers]


def test_the_drawing_is_of_the_table() -> None:
    drawn = "\n".join(floors())
    assert f"```\n{drawn}\n```" in DOCUMENT.read_text(encoding="utf-8"), f"docs/architecture.md wants\n{drawn}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also inside functions."""
    names = {f"tpctl.{name}".rstrip("."): tree for name, tree in modules()}
    left = {
        name: {target if target in names else target.rpartition(".")[0] for target in imported(tree)} & names.keys()
        for name, tree in names.items()
    }
    assert len(left) > 400
    while free := [name for name, targets in left.items() if not targets & (left.keys() - {name})]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def circle(arrows: set[tuple[str, str]]) -> set[str]:
    """The nodes that reach themselves, and those that lead only to such."""
    left = {start: {end for one, end in arrows if one == start} for start, _ in arrows}
    while free := [name for name, ends in left.items() if not ends & left.keys()]:
        for name in free:
            del left[name]
    return {*left}


def beside(modules: set[tuple[str, str]], package: str) -> set[tuple[str, str]]:
    """What imports what in ``package``, of what lies directly in it: a file, or a folder as one."""

    def part(name: str) -> str:
        return name.removeprefix(f"{package}.").partition(".")[0]

    inner = {(one, other) for one, other in modules if within(one, package) and within(other, package)}
    named = {(part(one), part(other)) for one, other in inner if package not in (one, other)}
    return {(one, other) for one, other in named if one != other}


def test_no_folder_imports_itself_by_way_of_what_lies_beside_it() -> None:
    """A folder that knows files beside it, which know it, would hide arrows that run back up: they share a room."""
    arrows = set()
    for name, tree in modules():
        for target in imported(tree):
            inner = target.removeprefix("tpctl.")
            if inner != target:
                arrows.add((name, inner if inner in FILES else inner.rpartition(".")[0]))
    assert circle(beside({("a.b", "a.c.d"), ("a.c.e", "a.b")}, "a")) == {"b", "c"}
    packages = {name.rpartition(".")[0] for name in FILES}
    assert len(packages) > 30
    assert {name: sorted(found) for name in packages if (found := circle(beside(arrows, name)))} == {}


def test_every_folder_is_a_room() -> None:
    """A new package must find its place in the table. ``kernels`` is only a shelf; some share their parent's row."""
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.rglob("__init__.py")} - {""}
    assert {name for name in folders if room(name) != name} == {
        "kernels",
        "checkpoint.gguf",
        "arch.families",
        "arch.formats",
        "batch.formats",
        "client.tools",
        "layers.attention",
        "layers.delta_net",
        "layers.weights",
    }


def test_every_grant_is_used() -> None:
    used = {(room(name), target.removeprefix("tpctl.")) for name, tree in modules() for target in imported(tree)}
    for name, granted in rules().items():
        for known in granted:
            assert any(own == name and within(target, known) for own, target in used), f"{name} uses no {known}"


@pytest.mark.parametrize("package", sorted({name.partition(".")[0] for name in FILES}))
def test_import_rules(package: str) -> None:
    for name, tree in modules():
        if name.partition(".")[0] == package:
            _check(name, tree)


def _check(name: str, tree: ast.Module) -> None:
    own = room(name)
    for target in imported(tree):
        inner = target.removeprefix("tpctl.")
        if inner != target and room(inner) != own:
            allowed = ("errors", "version", *MAY_IMPORT[own])
            # `checkpoint.cache` grants one module of a room, `kernels` all rooms in it.
            granted = any(within(inner, one) for one in allowed)
            assert granted, f"{name} must not import {inner}"
        if target.partition(".")[0] in ("torch", "transformers", "triton"):
            assert not any(within(name, light) for light in LIGHT), f"{name} must not import {target}"
            heavy = [prefix for prefix in HEAVY if within(name, prefix.rstrip("*"))]
            assert heavy, f"{name} must not import {target}"
    if any(f"{name}*" == prefix for prefix in HEAVY):
        outer = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        assert not [target for target in imported(outer) if target.partition(".")[0] in ("torch", "transformers")]


CHECK = """
import contextlib, io, sys
from tpctl.cli.app import main
for command in sys.argv[1:]:
    sys.argv = ["tpctl", *command.split(), "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main()
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
    assert "Usage:" in said.getvalue(), (command, said.getvalue())
    heavy = {"torch", "transformers", "numpy", "huggingface_hub", "jinja2", "tokenizers"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


def test_help_imports_nothing_heavy() -> None:
    names = ["", *(name for name, _ in commands(typer.main.get_command(app)))]
    assert len(names) > 10
    result = subprocess.run([sys.executable, "-c", CHECK, *names], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_package_is_light_and_its_names_come_when_asked_for() -> None:
    code = """
import sys
import tpctl
heavy = [name for name in {*sys.modules} - {"tpctl.version"} if name.startswith(("tpctl.", "torch", "tokenizers"))]
assert not heavy, heavy
from tpctl import LLM, SamplingParams
assert not {"torch", "transformers"} & set(sys.modules)
assert not hasattr(tpctl, "nothing") and LLM and SamplingParams
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_client_never_imports_torch() -> None:
    """All that chat and batch use in the parent process, tokenizer and template included."""
    names = [
        name for name in FILES if name.partition(".")[0] in ("cli", "chat", "client", "batch", "launch", "sharding")
    ]
    names = [f"tpctl.{name}" for name in names if name != "launch.agent"]
    code = f"import {', '.join(names)}, tokenizers, jinja2, sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
