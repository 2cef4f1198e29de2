"""``tpctl chat``: talk with a model at the terminal, or get one answer in a script."""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import note, status
from tpctl.cli.engine import describe, interrupts, prepare
from tpctl.cli.options import MODEL_HELP, EngineOptions, SamplingOptions, TemplateOptions, grouped
from tpctl.cli.template import GREETING, TemplateAtHand
from tpctl.errors import EngineError, RequestError

if TYPE_CHECKING:
    from tpctl.client.conversation import Answer, Conversation

HELP = """/help    this list
/reset   forget the conversation
/exit    end (as Ctrl-D does)
Ctrl-C stops an answer, and ends the chat when pressed again"""
_HISTORY_LINES = 1000
# What a model prints must not steer the terminal: no control characters but tab and newline.
_CONTROLS = dict.fromkeys([*(code for code in range(32) if code not in (9, 10)), *range(127, 160)])


@grouped
def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "demo",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    message: Annotated[
        str | None,
        typer.Option("-m", "--message", help="Say this, print the answer to stdout and end."),
    ] = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    template: TemplateOptions,
) -> None:
    """Chat with a model. It is downloaded and sharded first if need be.

    Sampling defaults to what the model's generation_config.json recommends, else temperature 0.7, top-p 0.95,
    and an answer may fill the context. Text piped in without -m is taken as one message.
    """
    from tpctl.client.conversation import Conversation, recommended_sampling
    from tpctl.client.engine_client import EngineClient

    sampling.check()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 are refused with the text, not on reading
        sys.stdin.reconfigure(errors="surrogateescape")
    if message is not None and not message.strip():
        raise typer.BadParameter("the message is empty", param_hint="-m")
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise typer.BadParameter("there is no message: stdin is empty", param_hint="-m")
    at_hand = TemplateAtHand(template)
    first = {"role": "user", "content": message} if message is not None else GREETING[0]
    begun = [first] if system is None else [{"role": "system", "content": system}, first]
    config = prepare(model, engine, look=lambda source: at_hand.look(source, begun))
    with EngineClient(config) as client:
        tokenizer = at_hand.tokenizer(config.shard_dir)
        recommended = recommended_sampling(config.shard_dir, sampling.given(), at_hand.shown)
        values = {"seed": secrets.randbits(63), **recommended}
        conversation = Conversation(client, tokenizer, system=system, sampling=values, stop=sampling.stop or ())
        tokenizer.template  # noqa: B018 — a model without one should fail before its weights are read
        with status(f"loading {model}"):
            info = client.wait_ready()
        if message is not None:
            _answer_once(conversation, message)
        else:
            _talk(conversation, f"{model} is ready ({describe(info)}).")


def _answer_once(conversation: Conversation, message: str) -> None:
    answer = conversation.ask(message, _print)
    if not answer.text.endswith("\n"):
        print()


def _talk(conversation: Conversation, greeting: str) -> None:
    note(f"{greeting} /help shows the commands, Ctrl-D ends.")
    stopped = False  # the last thing that happened was a Ctrl-C; another one ends the chat
    with _line_editing():
        while True:
            try:
                line = input(">>> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if stopped:
                    return
                stopped = True
                note("(Ctrl-C again, or Ctrl-D, ends the chat)")
                continue
            stopped = False
            if not line:
                continue
            if line.startswith("/"):
                if line in ("/exit", "/quit"):
                    return
                if line == "/reset":
                    conversation.reset()
                elif line == "/help":
                    note(HELP)
                else:
                    note(f"there is no command {line.split()[0]}; /help shows them")
                continue
            try:
                stopped = _turn(conversation, line)
            except RequestError as error:
                note(f"tpctl: {error}")


def _turn(conversation: Conversation, line: str) -> bool:
    """Show the answer to ``line``; whether it was stopped."""
    with interrupts() as noted:
        try:
            answer = conversation.ask(line, _print, lambda: noted)
        except EngineError:
            print()  # the error begins a line of its own
            raise
    print()
    if remark := _remark(answer):
        note(remark)
    return bool(noted)


def _remark(answer: Answer) -> str | None:
    if answer.finish_reason == "abort":
        return "(stopped)"
    if answer.finish_reason == "length":
        return f"(cut after {answer.completion_tokens} tokens: --max-tokens or the end of the context)"
    return None


def _print(piece: str) -> None:
    sys.stdout.write(piece.translate(_CONTROLS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


@contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history of prompts, kept from one chat to the next, where the system has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from tpctl.checkpoint.cache import cache_root

    history = cache_root() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(history)
