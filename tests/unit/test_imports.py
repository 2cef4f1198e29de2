"""Who may import whom, read from the source; and that the command line's front stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.unit.test_cli import commands
from tpctl.cli.app import app

ROOT = Path(__file__).parent.parent.parent / "tpctl"
# A module may import those whose dotted names begin with one of these, besides its own package and errors.
# More special names come first and replace their package's entry.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "children": (),
    "partition": (),
    "checkpoint": ("children", "partition"),
    "models.config": ("partition",),
    "models.specs": ("partition",),
    "models.weights": ("partition",),
    "sharding": ("partition", "checkpoint", "models.config", "models.specs", "models.weights"),
    "shared_memory": (),
    "distributed": ("shared_memory",),
    "kernels": (),
    "layers": ("partition", "distributed", "kernels", "models.config"),
    "models": ("partition", "distributed", "kernels", "layers"),
    "engine.config": (),
    "engine.sampling_params": (),
    "launch": ("children", "checkpoint.cache", "engine.config", "engine.sampling_params"),
    "engine": ("partition", "distributed", "kernels", "layers", "models", "launch"),
    "client": ("engine.config", "engine.sampling_params", "launch"),
    "chat": ("client", "engine.sampling_params"),
    "bench": (
        *("partition", "checkpoint", "models.config", "models.weights"),
        *("engine.config", "engine.sampling_params", "launch", "client"),
    ),
    "cli": ("",),
    "start": ("cli",),
    "__main__": ("start",),
    "": (),
}
# Modules that may name torch or transformers at all; those with a star only inside functions.
HEAVY = {"distributed", "shared_memory", "kernels", "layers", "models", "engine", "launch.agent*", "checkpoint.gguf*"}
LIGHT = (
    *("models.config", "models.specs", "models.weights", "engine.config", "engine.sampling_params"),
    *("engine.scheduler", "engine.pacing", "engine.block_manager", "engine.sequence"),
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*module, id=module[0] or "tpctl") for module in modules()])
def test_import_rules(name: str, tree: ast.Module) -> None:
    key = next(key for key in sorted(MAY_IMPORT, key=len, reverse=True) if within(name, key))
    package = name.partition(".")[0]
    for target in imported(tree):
        inner = target.removeprefix("tpctl.")
        if inner != target and not (package and within(inner, package)):
            allowed = ("errors", "__version__", *MAY_IMPORT[key])
            assert any(within(inner, prefix) for prefix in allowed), f"{name} must not import {inner}"
        if target.partition(".")[0] in ("torch", "transformers", "triton"):
            assert name not in LIGHT, f"{name} must not import {target}"
            heavy = [prefix for prefix in HEAVY if within(name, prefix.rstrip("*"))]
            assert heavy, f"{name} must not import {target}"
    if any(f"{name}*" == prefix for prefix in HEAVY):
        outer = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        assert not [target for target in imported(outer) if target.partition(".")[0] in ("torch", "transformers")]


CHECK = """
import sys
sys.argv = ["tpctl", *sys.argv[1:]]
from tpctl.cli.app import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = {"torch", "transformers", "numpy", "huggingface_hub", "jinja2", "tokenizers"} & set(sys.modules)
heavy |= {"prompt_toolkit", "markdown_it"} & set(sys.modules)
assert not heavy, heavy
"""


COMMANDS = [name for name, _ in commands(typer.main.get_command(app))]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    result = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_the_client_never_imports_torch() -> None:
    """All that chat and batch use in the parent process, tokenizer and template included."""
    names = [name for name, _ in modules() if name.partition(".")[0] in ("chat", "cli", "client", "launch", "sharding")]
    names = [f"tpctl.{name}" for name in names if name != "launch.agent"]
    code = f"import {', '.join(names)}, tokenizers, jinja2, sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
