"""The commands of a chat, as a table: name, arguments, what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tpctl.chat import settings
from tpctl.chat.prompt import file_names
from tpctl.chat.saved import SavedChat
from tpctl.chat.screen import Screen
from tpctl.client.conversation import Answer, Conversation
from tpctl.errors import RequestError, shorten


@dataclass
class Session:
    """What commands work on.

    Attributes:
        model: as the user named it.
        answer: the last one, if there is one.
        ended: whether the chat is to end.
        answer_anew: shows another answer to the last message.
    """

    conversation: Conversation
    screen: Screen
    model: str
    answer_anew: Callable[[], None]
    answer: Answer | None = None
    ended: bool = False


@dataclass(frozen=True)
class Command:
    """``arguments`` as the help shows them; where there are none, none are taken. ``run`` is given what follows."""

    name: str
    arguments: str
    help: str
    run: Callable[[Session, str], None]
    others: tuple[str, ...] = ()


def run(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says.

    Raises:
        TpctlError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.partition("\n")[0].partition(" ")
    rest = line[len(name) :].strip()
    command = next((one for one in COMMANDS if name in (one.name, *one.others)), None)
    if command is None:
        raise RequestError(f"there is no command {shorten(name)}; /help shows them")
    if rest and not command.arguments:
        raise RequestError(f"{command.name} takes no argument (given: {shorten(rest)}); write {command.name} alone")
    command.run(session, rest)


def completions(before: str) -> Iterator[str]:
    """What the text before the cursor may be completed to."""
    name, space, rest = before.partition(" ")
    if not space:
        named = (one for one in COMMANDS if one.name.startswith(name or " "))
        yield from (f"{one.name} " if one.arguments else one.name for one in named)
    elif name == "/set" and " " not in rest:
        yield from (f"{name} {option} " for option in settings.NAMES if option.startswith(rest))
    elif name in ("/save", "/load"):
        yield from (f"{name} {file}" for file in file_names(rest))


def _help(session: Session, rest: str) -> None:
    rows = [(f"{one.name} {one.arguments}".rstrip(), one.help) for one in COMMANDS] + KEYS
    width = max(len(left) for left, _ in rows)
    session.screen.note("\n".join(f"{left:<{width}}  {right}" for left, right in rows), indent=width + 2)


def _set(session: Session, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if name == "parameter":  # as ollama has it
        name, _, value = value.strip().partition(" ")
    if name == "system":
        return _system(session, value.strip())
    value = value.strip()
    conversation = session.conversation
    if name and value:
        settings.change(conversation, name, value)
    names = [settings.option(name)] if name else settings.NAMES
    return session.screen.note("\n".join(settings.describe(conversation, one) for one in names))


def _system(session: Session, rest: str) -> None:
    if rest:
        text = unquoted(rest)
        session.conversation.set_system(text or None)
    system = session.conversation.system
    session.screen.note("(there is no system prompt)" if system is None else f"(system prompt: {system})")


def _reset(session: Session, rest: str) -> None:
    session.conversation.reset()
    session.answer = None
    session.screen.note("(a new conversation)")


def _regenerate(session: Session, rest: str) -> None:
    session.answer_anew()


def _save(session: Session, rest: str) -> None:
    conversation = session.conversation
    force = rest.split(" ")[0] == "--force"
    file = _file("/save", rest.removeprefix("--force").strip() if force else rest)
    turns = conversation.turns
    SavedChat(session.model, conversation.system, conversation.sampling, [*conversation.stop], turns).save(
        file, force=force
    )
    session.screen.note(f"({_count(turns)} saved to {file})")


def _load(session: Session, rest: str) -> None:
    file = _file("/load", rest)
    saved = SavedChat.load(file)
    try:
        session.conversation.restore(saved.system, saved.messages, saved.sampling, saved.stop)
    except RequestError as error:
        raise RequestError(f"{file} cannot be gone on with: {error}") from None
    session.answer = None
    other = f", from a chat with {shorten(saved.model)}" if saved.model != session.model else ""
    session.screen.note(f"({_count(saved.messages)} and the options of {file}{other})")


_DRAFTED = {"ngram": "looked up in the text (n-gram)", "mtp": "by the model's own layer (MTP)"}
"""Where drafts come from."""


def _stats(session: Session, rest: str) -> None:
    answer = session.answer
    if answer is None:
        raise RequestError("there is no answer yet to tell of")
    used, limit = answer.prompt_tokens + answer.completion_tokens, session.conversation.max_model_len
    speed = answer.tokens_per_second
    rows = [
        ("prompt", f"{answer.prompt_tokens} tokens, {answer.cached_tokens} of them known from before"),
        ("first token", "none" if answer.seconds_to_first is None else f"after {answer.seconds_to_first:.2f} s"),
        ("answer", f"{answer.completion_tokens} tokens" + ("" if speed is None else f", {speed:.1f} tokens/s")),
        ("context", f"{used} of {limit} tokens ({100 * used / limit:.0f}%)"),
    ]
    if (drafts := session.conversation.drafts()) is not None:
        kind, drafted, accepted = drafts
        share = f" ({100 * accepted / drafted:.0f}%)" if drafted else ""
        rows.append(("drafts", f"{accepted} of {drafted} accepted{share}, in all answers; {_DRAFTED[kind]}"))
    session.screen.note("\n".join(f"{left:<12} {right}" for left, right in rows), indent=13)


def _exit(session: Session, rest: str) -> None:
    session.ended = True


def unquoted(text: str) -> str:
    """Without the quotes around it."""
    for quotes in ('"""', '"', "'"):
        if len(text) >= 2 * len(quotes) and text.startswith(quotes) and text.endswith(quotes):
            return text[len(quotes) : -len(quotes)].strip("\n")
    return text


def _file(command: str, text: str) -> Path:
    name = unquoted(text)
    if not name:
        raise RequestError(f"{command} needs a file; write {command} FILE")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody who is unknown
        return Path(name)


def _count(messages: Iterable[object]) -> str:
    count = len(list(messages))
    return f"{count} message{'' if count == 1 else 's'}"


COMMANDS = (
    Command("/help", "", "this list", _help, ("/?",)),
    Command("/set", "[NAME [VALUE]]", "show or change an option of sampling; default undoes it", _set),
    Command("/system", "[TEXT]", 'show or change the system prompt; "" removes it', _system),
    Command("/regenerate", "", "another answer to the last message", _regenerate, ("/regen",)),
    Command("/reset", "", "forget the conversation; keep system prompt and options", _reset, ("/clear",)),
    Command("/save", "[--force] FILE", "write the conversation and its options to a file", _save),
    Command("/load", "FILE", "go on with a conversation from a file", _load),
    Command("/stats", "", "tokens, seconds and context of the last answer, and drafts", _stats),
    Command("/exit", "", "end", _exit, ("/quit", "/bye")),
)

KEYS = [
    ("Enter", 'send; Alt+Enter, Ctrl-J, or Enter behind """: a new line'),
    ("Ctrl-C", "stop an answer or clear a line; on an empty one twice: end"),
    ("Ctrl-D", "end"),
]
