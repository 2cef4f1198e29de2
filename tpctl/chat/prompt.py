"""Where the person at the terminal types: prompt_toolkit's editor, or plain lines where the terminal cannot do that.

Enter sends. Alt+Enter and Ctrl-J begin a new line, and so does Enter while quotes are open that three in a row began. A
pasted text of several lines is one message, which waits for Enter; where the terminal does not mark it, it is told by
its speed. Lines that were typed before there was a prompt are sent in their order, one by one. Ctrl-C clears what is
typed; pressed twice where nothing is, it ends the chat, as Ctrl-D does.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tpctl.errors import TpctlError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

QUOTES = '"""'
PROMPT, CONTINUED = ">>> ", "... "
HINT = "Say something, or /help"
AGAIN = "Ctrl-C again, or Ctrl-D, ends the chat"
PASTED = 0.003
"""Seconds in which more follows an Enter that was pasted. Nobody types so fast."""
_EARLY = "typed ahead"
"""What tells an Enter that was pressed before there was a prompt."""


class Prompt(Protocol):
    """Asks for messages."""

    def read(self) -> str:
        """The next message, without spaces and quotes around it; may be empty.

        Raises:
            EOFError: there is none; the chat ends.
            TpctlError: what ``fail`` was told.
        """
        ...

    def fail(self, error: TpctlError) -> None:
        """Let ``read`` raise this, now or when it is next called. May be called by another thread."""
        ...


class TerminalPrompt:
    """The editor.

    Args:
        completions: what may be completed to, given the text before the cursor.
        history: of earlier messages.
    """

    def __init__(
        self,
        completions: Callable[[str], Iterable[str]],
        history: History,
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.shortcuts import CompleteStyle

        self._pasted = float("-inf")  # when the last Enter was seen that more followed at once
        self._warned = False  # Ctrl-C was pressed where nothing was typed
        self._error: TpctlError | None = None
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: " " * width if wrapped else CONTINUED,
            placeholder=self._placeholder,
            key_bindings=self._keys(),
            completer=_completer(completions),
            complete_style=CompleteStyle.READLINE_LIKE,  # which keeps no rows free for a menu
            history=history,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            input=input,
            output=output,
        )

    def read(self) -> str:
        self._warned = False
        if self._error is not None:
            raise self._error
        self._take_typed_ahead()
        try:
            text = self._session.prompt(pre_run=self._fail_if_failed)
        except TpctlError:
            if left := self._session.default_buffer.text.strip():
                self._session.history.append_string(left)
                print("(what was being typed is kept: the Up key of the next chat brings it back)", file=sys.stderr)
            raise
        return message(text)

    def fail(self, error: TpctlError) -> None:
        self._error = error
        if (loop := self._session.app.loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._fail_if_failed)

    def _fail_if_failed(self) -> None:
        app = self._session.app
        if self._error is not None and app.is_running and not app.is_done:
            app.exit(exception=self._error)

    def _take_typed_ahead(self) -> None:
        """Take what was typed before there was a prompt, where the terminal turned Enter into Ctrl-J.

        Each Enter will send its line, however fast the lines come now.
        """
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.key_binding.key_processor import KeyPress
        from prompt_toolkit.keys import Keys

        input = self._session.input
        early: list[KeyPress] = []
        with input.raw_mode():
            while select.select([input.fileno()], [], [], 0)[0] and (keys := input.read_keys()):
                early += keys
        early += input.flush_keys()
        after_escape = [False, *(key.key == Keys.Escape for key in early)]
        for place, key in enumerate(early):
            if key.key in (Keys.ControlM, Keys.ControlJ) and not after_escape[place]:  # with Escape: Alt+Enter
                early[place] = KeyPress(Keys.ControlM, _EARLY)
        store_typeahead(input, get_typeahead(input) + early)

    def _is_pasted(self, event: KeyPressEvent) -> bool:
        """Whether an Enter is one of several that come faster than anybody types; of the last one, too."""
        if event.data == _EARLY:
            return False
        waiting = event.key_processor.input_queue or select.select([self._session.input.fileno()], [], [], PASTED)[0]
        recent = time.monotonic() - self._pasted < 10 * PASTED
        if waiting:
            self._pasted = time.monotonic()
        return bool(waiting) or recent

    def _placeholder(self) -> FormattedText:
        from prompt_toolkit.formatted_text import FormattedText

        if self._session.app.is_done:  # what stays on the screen is what was typed
            return FormattedText()
        return FormattedText([("ansibrightblack", AGAIN if self._warned else HINT)])

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            command = buffer.text.startswith("/") and "\n" not in buffer.text  # never takes what follows as its own
            if is_open(buffer.text) or (not command and self._is_pasted(event)):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("c-j")
        def begin_line(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add("c-c")
        @keys.add(Keys.SIGINT)
        def clear_or_end(event: KeyPressEvent) -> None:
            self._pasted = float("-inf")  # what is typed from here on belongs to no paste
            if event.current_buffer.text:
                event.current_buffer.reset()
                self._warned = False
            elif self._warned:
                event.app.exit(exception=EOFError)
            else:
                self._warned = True

        @keys.add("c-d")
        def delete_or_end(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.delete()
            else:
                event.app.exit(exception=EOFError)

        return keys


class LinePrompt:
    """Lines of stdin, for a terminal that cannot move its cursor, or where answers go to a file."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""  # read, and not asked for yet
        self._error: TpctlError | None = None
        self._woken, self._wake = os.pipe()

    def read(self) -> str:
        try:
            text = self._line(PROMPT)
            while is_open(text):
                text += "\n" + self._line(CONTINUED)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return self._after_interrupt()
        return message(text)

    def fail(self, error: TpctlError) -> None:
        self._error = error
        os.write(self._wake, b"!")

    def _after_interrupt(self) -> str:
        print(f"({AGAIN})", file=sys.stderr)
        try:
            return message(self._line(PROMPT))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise EOFError from None

    def _line(self, prompt: str) -> str:
        sys.stdout.flush()
        print(prompt, end="", file=sys.stderr, flush=True)
        while "\n" not in self._text:
            stdin = sys.stdin.fileno()
            ready, _, _ = select.select([stdin, self._woken], [], [])
            if self._error is not None:
                print(file=sys.stderr)
                raise self._error
            data = os.read(stdin, 65536) if stdin in ready else b""
            if not data:
                if not self._text:
                    raise EOFError
                break
            self._text += self._decode(data)
        line, _, self._text = self._text.partition("\n")
        return line


def is_open(text: str) -> bool:
    """Whether ``text`` begins with quotes that are not closed yet."""
    bare = text.strip()
    return bare.startswith(QUOTES) and (len(bare) < 2 * len(QUOTES) or not bare.endswith(QUOTES))


def message(text: str) -> str:
    """What was typed, without the spaces and the quotes around it."""
    bare = text.strip()
    return bare.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n") if bare.startswith(QUOTES) else bare


def file_names(start: str) -> Iterator[str]:
    """The files that ``start`` may become; folders with a slash."""
    head, _, tail = start.rpartition("/")
    folder = Path(f"{head}/" if head or start.startswith("/") else ".").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except (OSError, RuntimeError, ValueError):
        return
    for entry in entries:
        if entry.name.startswith(tail) and (tail or not entry.name.startswith(".")):
            yield f"{start[: len(start) - len(tail)]}{entry.name}{'/' if entry.is_dir() else ''}"


def _completer(completions: Callable[[str], Iterable[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Words(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            before = document.text_before_cursor
            if "\n" in before:
                return
            for text in completions(before):
                yield Completion(text, -len(before), display=text.rpartition(" ")[2])

    return Words()
