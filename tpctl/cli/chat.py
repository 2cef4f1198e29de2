"""``tpctl chat``: talk with a model at the terminal, or get one answer in a script."""

from __future__ import annotations

import io
import os
import secrets
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import note, status
from tpctl.cli.engine import describe, lend_ranks, prepare, say_context, say_nodes
from tpctl.cli.options import (
    CHAT_CPU_TOKENS,
    MODEL_HELP,
    SPECULATE,
    EngineOptions,
    NodeOptions,
    SamplingOptions,
    Speculate,
    TemplateOptions,
    grouped,
)
from tpctl.cli.template import GREETING, TemplateAtHand

if TYPE_CHECKING:
    from tpctl.chat.prompt import Prompt
    from tpctl.client.conversation import Conversation
    from tpctl.client.engine_client import EngineClient

MOST_PIPED = 16 << 20
"""Characters of a message on stdin at most: several times what any model's context holds."""


@grouped
def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "demo",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    message: Annotated[
        str | None,
        typer.Option("-m", "--message", help="Say this, print the answer to stdout and end."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as the model writes them, not Markdown.")
    ] = False,
    speculate: Annotated[Speculate, SPECULATE] = Speculate.auto,
    *,
    engine: EngineOptions,
    node: NodeOptions,
    sampling: SamplingOptions,
    template: TemplateOptions,
) -> None:
    """Chat with a model. It is downloaded and sharded first if need be.

    Sampling defaults to what the model's generation_config.json recommends, else temperature 0.7, top-p 0.95,
    and an answer may fill the context. Text piped in without -m is taken as one message.

    A model that fits no host runs on several: the same command on each, with --nnodes, --node-rank and --rdzv-endpoint.
    The first host talks; the others lend their ranks until it ends.
    """
    from tpctl.client.conversation import Conversation, recommended_sampling
    from tpctl.client.engine_client import EngineClient
    from tpctl.client.tokenizer import check_text

    sampling.check()
    nodes = node.nodes()
    if nodes.rank > 0:
        lend_ranks(prepare(model, engine, cpu_tokens=CHAT_CPU_TOKENS, nodes=nodes, speculate=speculate), nodes)
        return
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 are refused with the text, not on reading
        sys.stdin.reconfigure(errors="surrogateescape")
    if message is not None and not message.strip():
        raise typer.BadParameter("the message is empty", param_hint="-m")
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read(MOST_PIPED + 1).strip()
        if len(message) > MOST_PIPED:
            raise typer.BadParameter(
                f"stdin has more than {MOST_PIPED} characters, which are no message", param_hint="-m"
            )
        if not message:
            raise typer.BadParameter("there is no message: stdin is empty", param_hint="-m")
        check_text(message, "message")
    at_hand = TemplateAtHand(template)
    first = {"role": "user", "content": message} if message is not None else GREETING[0]
    begun = [first] if system is None else [{"role": "system", "content": system}, first]
    look = partial(at_hand.look, messages=begun)
    config = prepare(model, engine, look=look, cpu_tokens=CHAT_CPU_TOKENS, nodes=nodes, speculate=speculate)
    with EngineClient(config, nodes=nodes) as client:
        say_nodes(config, nodes)
        tokenizer = at_hand.tokenizer(config.text_dir)
        recommended = recommended_sampling(config.text_dir, sampling.given(), at_hand.shown)
        values = {"seed": secrets.randbits(63), **recommended}
        conversation = Conversation(client, tokenizer, system=system, sampling=values, stop=sampling.stop or ())
        tokenizer.template  # noqa: B018 — a model without one should fail before its weights are read
        if message is not None:
            with status(f"loading {model}") as told:
                info = client.wait_ready(told)
            say_context(info)
            _answer_once(conversation, message, plain=plain)
        else:
            wanted = speculate is not Speculate.off
            _talk(client, conversation, model, plain=plain, drafts_wanted=wanted)


def _answer_once(conversation: Conversation, message: str, *, plain: bool = False) -> None:
    from tpctl.chat.repl import cut
    from tpctl.chat.thoughts import Aside

    aside = Aside(plain=plain)

    def show(piece: str) -> None:
        aside.close()
        _print(piece)

    try:
        answer = conversation.ask(message, show, think=aside.push)
    finally:
        aside.close()
    if not answer.text.endswith("\n"):
        print()
    if answer.note is not None and (remark := cut(answer)):
        note(remark)


def _print(piece: str) -> None:
    from tpctl.chat.streams import safe

    sys.stdout.write(safe(piece))
    sys.stdout.flush()


def _talk(client: EngineClient, conversation: Conversation, model: str, *, plain: bool, drafts_wanted: bool) -> None:
    from tpctl.chat.repl import Repl
    from tpctl.chat.screen import Screen
    from tpctl.chat.terminal import quiet

    screen = Screen(plain=plain)
    with quiet(), status(f"loading {model}") as told:
        info = client.wait_ready(told)
    say_context(info)
    screen.note(
        f"{model} is ready ({describe(info, drafts_wanted=drafts_wanted)}). /help shows the commands, Ctrl-D ends."
    )
    Repl(client, conversation, screen, make_prompt(), model).run()


def make_prompt() -> Prompt:
    """What asks for messages, for the terminal that this is."""
    from tpctl.chat.prompt import LinePrompt, TerminalPrompt

    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return LinePrompt()
    from tpctl.chat.commands import completions
    from tpctl.chat.history import ChatHistory
    from tpctl.checkpoint.cache import cache_root

    # Earlier versions kept lines of readline's in ``chat_history``.
    return TerminalPrompt(completions, ChatHistory(cache_root() / "chat_messages", cache_root() / "chat_history"))
