"""What every command asks of what it is given, before it runs: nothing is empty, and all of it is text in UTF-8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from tpctl.checkpoint.outputs import require_utf8
from tpctl.errors import SourceError, UsageError

# Typer brings its own copy of Click, or takes the installed one: the class of all usage errors is found by this one's.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

_MODELS = frozenset({"model", "source", "against"})
"""Parameters that may be a path or another name."""
_PATHS = frozenset({"prompts", "output", "folder", "html", "chat_template", "text"})

_OWN_WORDS = frozenset({("chat", "system"), ("chat", "message"), ("chat", "stop"), ("batch", "stop")})
"""Options whose empty value means something, or is refused by the command in better words."""

_OF_VLLM = {
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--data-parallel-size": "--replicas",
    "-dp": "--replicas",
    "--enable-expert-parallel": "--expert-parallel",
    "--kv-cache-memory-bytes": "--kv-cache-memory",
    "--language-model-only": "--text-only",
    "--allowed-origins": "--allowed-origin",
    "--system-prompt": "--system",
    "--quick": "--message",
    "--output-file": "--output",
    "--input-file": "PROMPTS",
    "--model": "MODEL",
}
"""What vLLM calls some options and arguments; what has the same name here needs no help."""


class CheckedCommand(TyperCommand):
    """A command whose arguments and options are looked at as they were typed: ``Path("")`` would be this folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except USAGE_ERROR as error:  # where an option lacks its value, it does not know the command
            error.ctx = error.ctx or ctx
            if (refused := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
                self._tell_own_name(error, refused, typed)
            raise
        _require_folder()
        values, _, _ = self.make_parser(ctx).parse_args(args=typed)
        for parameter in self.params:
            given = values.get(parameter.name or "")
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, str):
                    _check(parameter, value, empty=(self.name, parameter.name) in _OWN_WORDS)
        return rest

    def _tell_own_name(self, error: Any, refused: str, typed: list[str]) -> None:
        """Say what an option of vLLM's is called here, instead of what is spelled like it. ``-tp`` is read as ``-t``
        first."""
        for one in typed:
            name = one.partition("=")[0].replace("_", "-")
            own = _OF_VLLM.get(name)
            if own is None or not (name == refused.replace("_", "-") or (len(refused) == 2 and name[:2] == refused)):
                continue
            known = [*(option for parameter in self.params for option in parameter.opts)]
            if own in known or own.lower() in known:
                error.message = f"no such option: {one.partition('=')[0]}, which is {own} here"
                error.possibilities = None


def _require_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        where = f" ({os.environ['PWD']})" if os.environ.get("PWD") else ""
        raise SourceError(f"the current folder{where} was deleted; change to another one (cd)") from None


def _check(parameter: Any, value: str, *, empty: bool) -> None:
    name = parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()
    if not value and not empty:
        raise UsageError(f"{name} is empty; give it a value{'' if parameter.required else ', or leave it out'}")
    if (parameter.name in _PATHS and value != "-") or (parameter.name in _MODELS and os.path.lexists(value)):
        for path in (value, os.path.realpath(value)):  # and where that is: it goes into caches' keys and settings
            require_utf8(path)
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} holds {value[error.start]!r}, which is no text in UTF-8; write it again") from None
