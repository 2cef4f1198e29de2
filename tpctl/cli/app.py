"""The ``tpctl`` command: registers one function per command and turns errors into one line and an exit code.

Command modules import only the standard library, Typer and torch-free parts of tpctl at their top, so that
``tpctl --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from tpctl.cli.arguments import USAGE_ERROR, CheckedCommand
from tpctl.cli.signals import end_if_told, is_end, take_signals
from tpctl.cli.streams import CLOSED_PIPE, give_stderr_back, is_closed_pipe, settle_stdout, take_streams
from tpctl.errors import OutputError, TpctlError, printable, shorten
from tpctl.version import __version__

LONGEST = 4000
"""Characters of a message, whatever it repeats of a file."""


class _Commands(TyperGroup):
    """``batch`` is a command with arguments, and ``batch status`` is another one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:2] == ["batch", "status"]:
            args = ["batch status", *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tpctl",
    cls=_Commands,
    help="Shard checkpoints and run tensor-parallel inference.",
    epilog="Converted models and shards that commands make for themselves are kept in TPCTL_CACHE, else in "
    "~/.cache/tpctl; downloads are where the Hub's own tools keep them (HF_HOME).",
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
    from tpctl.cli import (
        batch,
        batch_status,
        bench,
        chat,
        doctor,
        download,
        inspect_shards,
        merge,
        plan,
        replica,
        reshard,
        serve,
        shard,
        upload,
    )

    for name, command, summary in (
        ("download", download.download, "Fetch a model."),
        ("plan", plan.plan, "Say which sizes work and what fits a GPU."),
        ("shard", shard.shard, "Cut a checkpoint into shards."),
        ("upload", upload.upload, "Upload a folder to the Hub."),
        ("inspect-shards", inspect_shards.inspect_shards, "Show, and prove, how every weight was cut."),
        ("merge", merge.merge, "Put shards together again."),
        ("reshard", reshard.reshard, "Cut shards anew for another number of ranks."),
        ("chat", chat.chat, "Chat with a model."),
        ("serve", serve.serve, "Serve a model with OpenAI's interface."),
        ("batch", batch.batch, "Answer every line of a JSONL file."),
        ("batch status", batch_status.batch_status, "Say how far a batch is."),
        ("replica", replica.replica, "Run one engine of a batch, on any host."),
        ("doctor", doctor.doctor, "Report what this machine offers."),
    ):
        app.command(name, cls=CheckedCommand, short_help=summary)(command)
    app.add_typer(bench.bench, name="bench", short_help="Measure speed.")


_register()


def _explain(error: Any) -> str:
    """A usage error of Typer's in one line: what is wrong, the value that was given, and where to look."""
    text = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    if (given := _given(getattr(getattr(error, "param", None), "opts", ()))) is not None and repr(given) not in text:
        text += f" (given: {' '.join(given.split())})"
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


def main() -> None:
    """Entry point of the console script."""
    take_streams()
    take_signals()
    code = _run(_command)
    if sys.stdout is not None and (failed := _run(sys.stdout.flush)):  # else it would fail when Python ends
        code = code or failed
    give_stderr_back()
    sys.exit(code)


def _command() -> None:
    end_if_told()
    # Not app(): it takes the errors of a closed pipe for itself, and ends with another code.
    command = typer.main.get_command(app)
    with command.make_context("tpctl", sys.argv[1:]) as context:
        command.invoke(context)


def _run(work: Callable[[], None]) -> int:
    """Do ``work``, say in one line why it failed if it did, and return the exit code."""
    try:
        work()
    except typer.Exit as error:
        return error.exit_code
    except SystemExit as error:
        if is_end(error):
            _interrupted(getattr(error, "__notes__", ()))
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except USAGE_ERROR as error:
        text = error.format_message()
        if "\n" in text:  # no arguments at all: the help page
            _print(text)
        else:
            _say(f"tpctl: {_explain(error)}")
        return int(error.exit_code)
    except (typer.Abort, EOFError):
        _say("tpctl: aborted")
        return 1
    except TpctlError as error:
        if isinstance(error, OutputError):
            settle_stdout()  # which may be what failed
        _say(shorten(f"tpctl: {error}", LONGEST))
        return error.exit_code
    except KeyboardInterrupt as error:
        _interrupted(error.args)
        return 130
    except OSError as error:  # no command foresaw it, but it is the system's refusal, not a bug
        settle_stdout()  # which may be what failed
        if is_closed_pipe(error):
            return CLOSED_PIPE
        what = error.strerror or " ".join(str(error).split())
        _say(f"tpctl: {error.filename or 'input or output failed'}: {what}")
        return 1
    return 0


def _interrupted(left: Iterable[object]) -> None:
    """``left``: what became of the work."""
    _say("; ".join(["tpctl: interrupted", *map(str, left)]))


def _say(text: str) -> None:
    """One line, whatever is in it."""
    _print(printable(text))


def _print(text: str) -> None:
    with suppress(OSError):  # a full disk, or a reader that is gone: the exit code has to do
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
