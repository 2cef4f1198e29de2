"""The ``tpctl`` command: registers one function per command and turns errors into one line and an exit code.

Command modules import only the standard library, Typer and torch-free parts of tpctl at their top, so that
``tpctl --help`` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

from tpctl import __version__
from tpctl.errors import TpctlError

app = typer.Typer(
    name="tpctl",
    help="Shard checkpoints and run tensor-parallel inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tpctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def _register() -> None:
    from tpctl.cli import batch, bench, chat, doctor, download, inspect_shards, merge, plan, reshard, shard, upload

    for name, command, summary in (
        ("download", download.download, "Fetch a model."),
        ("plan", plan.plan, "Say which sizes work and what fits a GPU."),
        ("shard", shard.shard, "Cut a checkpoint into shards."),
        ("upload", upload.upload, "Upload a folder to the Hub."),
        ("inspect-shards", inspect_shards.inspect_shards, "Show, and prove, how every weight was cut."),
        ("merge", merge.merge, "Put shards together again."),
        ("reshard", reshard.reshard, "Cut shards anew for another number of ranks."),
        ("chat", chat.chat, "Chat with a model."),
        ("batch", batch.batch, "Answer every line of a JSONL file."),
        ("doctor", doctor.doctor, "Report what this machine offers."),
    ):
        app.command(name, short_help=summary)(command)
    app.add_typer(bench.bench, name="bench", short_help="Measure speed.")


_register()


# Typer brings its own copy of Click, or takes the installed one: the class of all usage errors is found by this one's.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _explain(error: Any) -> str:
    """A usage error of Typer's in one line: what is wrong, the value that was given, and where to look."""
    text = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    if (given := _given(getattr(getattr(error, "param", None), "opts", ()))) is not None and repr(given) not in text:
        text += f" (given: {given})"
    where = error.ctx.command_path if error.ctx is not None else "tpctl"
    return f"{text[0].lower()}{text[1:]}; see `{where} --help`"


def _given(options: Sequence[str]) -> str | None:
    """The value that the command line gives one of ``options``."""
    names = [name for name in options if name.startswith("-")]
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        for name in names:
            if argument == name:
                return following
            if argument.startswith(f"{name}="):
                return argument.removeprefix(f"{name}=")
    return None


def _exit_tidily(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as an exception, so that workers are stopped and files are closed on the way out


def main() -> None:
    """Entry point of the console script."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell (``<&-``); a file opened later would take its number
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets a "?" for it
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_tidily)
    try:
        sys.exit(app(prog_name="tpctl", standalone_mode=False))
    except _UsageError as error:
        text = error.format_message()
        if "\n" in text:  # no arguments at all: the help page
            print(text, file=sys.stderr)
        else:
            print(f"tpctl: {_explain(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        print("tpctl: aborted", file=sys.stderr)
        sys.exit(1)
    except TpctlError as error:
        print(f"tpctl: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        print("; ".join(["tpctl: interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output is gone (``tpctl … | head``); keep the interpreter from complaining about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # no command foresaw it, but it is the system's refusal, not a bug
        what = error.strerror or " ".join(str(error).split())
        print(f"tpctl: {error.filename or 'input or output failed'}: {what}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
