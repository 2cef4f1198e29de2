"""The loop of a chat: a message, its answer, the next one."""

from __future__ import annotations

from collections.abc import Callable

from tpctl.chat import commands
from tpctl.chat.prompt import Prompt
from tpctl.chat.screen import Screen, Shown
from tpctl.chat.terminal import noted_interrupts, quiet
from tpctl.client.conversation import Answer, Conversation, Show
from tpctl.client.engine_client import EngineClient
from tpctl.errors import OutputError, RequestError


class Repl:
    """A conversation of a person at a terminal with a model.

    Args:
        model: as the user named it.
    """

    def __init__(
        self, client: EngineClient, conversation: Conversation, screen: Screen, prompt: Prompt, model: str
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._screen = screen
        self._prompt = prompt
        self._session = commands.Session(conversation, screen, model, self._answer_anew)

    def run(self) -> None:
        """Until the person ends it.

        Raises:
            EngineError: the workers failed, while an answer was made or between two.
        """
        self._client.on_failure(self._failed)
        while not self._session.ended:
            try:
                self._turn()
            except KeyboardInterrupt:  # in a command, or between two things
                self._screen.note("(interrupted)")
            except EOFError:
                return

    def _failed(self, *_: object) -> None:
        """Called by the thread that saw the workers fail."""
        if (error := self._client.failure_now()) is not None:
            self._prompt.fail(error)

    def _turn(self) -> None:
        line = self._prompt.read()
        if not line:
            return
        try:
            if line.startswith("/"):
                commands.run(self._session, line)
            else:
                self._answer(lambda *show: self._conversation.ask(line, *show))
        except (RequestError, OutputError) as error:
            self._screen.note(f"tpctl: {error}")

    def _answer_anew(self) -> None:
        if self._conversation.begun and self._conversation.sampling.get("temperature", 0) == 0:
            self._screen.note("(temperature is 0, so the answer will be the same; /set temperature 0.7 makes it vary)")
        self._answer(self._conversation.regenerate)

    def _answer(self, make: Callable[[Show, Callable[[], object], Show], Answer]) -> None:
        """Show an answer, and what was thought before it. Ctrl-C stops it; what is typed meanwhile is kept for the
        prompt."""
        with quiet(), noted_interrupts() as noted, self._screen.waiting("computing the prompt") as end_waiting:
            shown = Shown(self._screen, end_waiting)
            try:
                answer = make(shown, lambda: noted, shown.think)
            finally:
                shown.close()
        self._session.answer = answer
        if answer.finish_reason == "abort":
            taken_back = "" if answer.completion_tokens else ": nothing was said yet"
            self._screen.note(f"(stopped{taken_back})")
        elif remark := cut(answer):
            self._screen.note(remark)
        elif not shown.begun:
            self._screen.note("(the answer is empty)")


def cut(answer: Answer) -> str | None:
    """What cut an answer short, unless it ended by itself or was stopped."""
    if answer.finish_reason != "length":
        return None
    return f"(cut after {answer.completion_tokens} tokens: {answer.note or '--max-tokens'})"
