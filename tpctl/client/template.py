"""Chat templates: Jinja programs that come with a model and turn messages into the text it was trained on.

The program runs in a process of its own (``template_worker``). Here is what it gets, and what is said when it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tpctl.client.chat_messages import Message, Uses, prepared, refuse_unread, suited, thought_parts
from tpctl.client.fields import UnreadVariable
from tpctl.client.template_pool import TemplateProcesses
from tpctl.client.template_process import LIMITS, TemplateProcess
from tpctl.errors import CheckpointError, RequestError, UsageError, shorten
from tpctl.errors import shown as _shown
from tpctl.json_file import is_file, read_bytes

_RESERVED = ("messages", "add_generation_prompt")
_PROBE = "any text at all"

MOST_BYTES = 1 << 20
"""Longest template. The longest in use have 30 KB."""


class TemplateRefusal(RequestError):
    """The template itself refuses the messages, with ``raise_exception``."""


class ChatTemplate:
    """A compiled template with the model's special tokens bound to it.

    Attributes:
        name: the file it is from, as messages call it.
        source: the program.
        uses: what it reads.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        name: str = "of this model",
        process: TemplateProcess | TemplateProcesses | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Compile.

        Args:
            special_tokens: names as templates use them (``bos_token``, ``eos_token``, …) and the tokens'
                text.
            process: where it runs; by default processes of its own.
            variables: what it is given with every conversation, as ``render`` may add to.

        Raises:
            CheckpointError: the template is not valid Jinja, or compiling it takes too long or too much memory.
            UsageError: ``variables`` names one that it does not read.
        """
        self.name = name
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._process = process or TemplateProcesses()
        answer = self._process.compile(source)
        if failed := answer.get("failed"):
            said = f" {LIMITS[failed]}" if failed in LIMITS else f" does not compile, {_line(answer)}"
            raise CheckpointError(f"the chat template {name}{said}")
        self.uses = Uses.from_dict(answer)
        self._common = {"tools": None, "documents": None, **special_tokens, **(variables or {})}
        try:
            self._check_variables(variables or {})
        except RequestError as error:
            raise UsageError(f"--chat-template-kwargs: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, ready for the model to go on.

        Args:
            variables: what the template is given besides, over what it is given every time.

        Raises:
            RequestError: the template refuses these messages (roles that do not alternate, no system role, …), fails
                or takes too much, or does not read a field of them or one of ``variables``.
            BusyError: it was at work for others for too long.
        """
        return self._text(self._inputs(messages, variables, add_generation_prompt))

    def render_all(self, conversations: Sequence[tuple[Sequence[Message], Mapping[str, Any]]]) -> list[str | None]:
        """The texts of several conversations and their variables, as ``render`` makes them, at the cost of one.

        Where one fails there is ``None``; where one takes too much, for all.
        """
        inputs: list[dict[str, Any] | None] = []
        for messages, variables in conversations:
            try:
                inputs.append(self._inputs(messages, variables, True))
            except RequestError:
                inputs.append(None)
        ready = [own for own in inputs if own is not None]
        try:
            answer = self._process.render(self.source, self._common, ready)
        except RecursionError:
            answer = {}
        texts = iter(answer.get("texts") or [None] * len(ready))
        return [None if own is None else next(texts) for own in inputs]

    def interrupt(self) -> None:
        """End what other threads have it do, and what they wait for; they get a ``BusyError``."""
        self._process.interrupt()

    def _inputs(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None, add_prompt: bool
    ) -> dict[str, Any]:
        """Variables of one conversation."""
        self._check_variables(variables or {})
        messages = suited(messages, self.uses)
        refuse_unread(messages, self.uses)
        ready = prepared(
            messages, self.uses, lambda: self._takes_parts, lambda: self._takes_thoughts, lambda: self._wants_texts
        )
        return {**(variables or {}), "messages": ready, "add_generation_prompt": add_prompt}

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content may be a list of parts, tried with one."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            messages = [{"role": "user", "content": parts}]
            text = self._text({"messages": messages, "add_generation_prompt": True})
        except RequestError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    @cached_property
    def _takes_thoughts(self) -> bool:
        """Whether what was thought may be a part of an answer's content, tried with one."""
        if "thinking" not in self.uses.names:
            return False
        user = {"role": "user", "content": "?"}
        messages = [user, {"role": "assistant", "content": thought_parts(_PROBE, "!")}, user]
        try:
            text = self._text({"messages": messages, "add_generation_prompt": True})
        except RequestError:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    @cached_property
    def _wants_texts(self) -> bool:
        """Whether the arguments of a tool's call must be text, tried with one: some templates join them to others."""

        def fails(arguments: Any) -> bool:
            call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": arguments}}
            asked = {"role": "user", "content": "?"}
            messages = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                self._text({"messages": messages, "add_generation_prompt": False})
            except RequestError:
                return True
            return False

        return fails({"probe": 1}) and not fails('{"probe": 1}')

    def _text(self, own: Mapping[str, Any]) -> str:
        try:
            answer = self._process.render(self.source, self._common, [own])
        except RecursionError:
            raise RequestError("the messages are nested too deeply") from None
        match answer.get("failed"):
            case None:
                text: str = answer["texts"][0]
                return text
            case "refused":
                raise TemplateRefusal(f"the model's chat template refuses these messages: {_line(answer)}")
            case "length":
                raise RequestError(f"the chat template {self.name} makes a text of {_line(answer)}")
            case failed if failed in LIMITS:
                raise RequestError(f"the chat template {self.name} {LIMITS[failed]}")
        raise RequestError(f"the chat template {self.name} fails on these messages: {_line(answer)}")

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in _RESERVED:
                raise RequestError(f"chat_template_kwargs may not set {shorten(repr(name))}, which tpctl sets itself")
            if name not in self.uses.variables:
                others = sorted({*self.uses.variables} - {*_RESERVED, *self._special_tokens})
                read = f"it reads {', '.join(others)}" if others else "it reads none"
                said = f"chat_template_kwargs has {shorten(repr(name))}, which the chat template does not read; {read}"
                raise UnreadVariable(said, name)


def read_template(folder: Path, tokenizer_config: Mapping[str, Any], shown: str | None = None) -> str | None:
    """A checkpoint folder's template: ``chat_template.jinja``, else the one in ``tokenizer_config.json``.

    Args:
        shown: what messages call ``folder``.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    file = folder / "chat_template.jinja"
    name = f"{shown or folder}/chat_template.jinja"
    if is_file(file, name):
        return read_text(file, name)
    template = tokenizer_config.get("chat_template")
    if not isinstance(template, str | list | dict | None):
        raise CheckpointError(
            f"{shown or folder}/tokenizer_config.json: chat_template is {_shown(template)}, but must be a text"
        )
    if isinstance(template, list):  # several by name; the one for plain chat is called "default"
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def template_name(folder: Path, shown: str) -> str:
    """What messages call the template's file in ``folder``."""
    return f"{shown}/{'chat_template.jinja' if (folder / 'chat_template.jinja').is_file() else 'tokenizer_config.json'}"


def no_template(shown: str) -> CheckpointError:
    """What to say of a model that has none."""
    return CheckpointError(
        f"{shown} has no chat template, as base models do not; use an instruct model, --chat-template FILE,"
        ' or `tpctl batch` with {"prompt": …} lines'
    )


def read_text(file: Path, shown: str) -> str:
    """The text of a template's file, which messages call ``shown``.

    Raises:
        CheckpointError: it is not there, no regular file, longer than ``MOST_BYTES``, or not UTF-8.
    """
    try:
        return read_bytes(file, MOST_BYTES, where=shown).decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{shown} cannot be read: No such file or directory") from None
    except ValueError as error:
        raise CheckpointError(f"{shown} cannot be read: {error}") from None


def _line(answer: Mapping[str, Any]) -> str:
    return shorten(" ".join(str(answer["message"]).split()), 300)
