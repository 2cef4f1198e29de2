"""Chat templates: Jinja programs that come with a model and turn messages into the text it was trained on.

The program is somebody else's, so it runs in Jinja's sandbox. What it may use (filters, globals, block trimming) is
what transformers documents for chat templates; the rendered text must equal transformers' byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tpctl.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else a model's template reads."""


class ChatTemplate:
    """A compiled template with the model's special tokens bound to it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile.

        Args:
            special_tokens: names as templates use them (``bos_token``, ``eos_token``, …) and the tokens'
                text.

        Raises:
            CheckpointError: the template is not valid Jinja.
        """
        from jinja2 import TemplateSyntaxError

        try:
            self._template: Template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            line = f"line {error.lineno}: {error.message}"
            raise CheckpointError(f"the model's chat template does not compile, {line}") from None
        except RecursionError as error:
            raise CheckpointError(f"the model's chat template does not compile: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, ready for the model to go on.

        Raises:
            RequestError: the template refuses these messages (roles that do not alternate, no system role,
                …).
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # somebody else's program may raise anything
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A checkpoint folder's template: ``chat_template.jinja``, else the one in ``tokenizer_config.json``.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several by name; the one for plain chat is called "default"
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}`` marks an answer, for training; here just its body."""

        tags = {"generation"}  # noqa: RUF012 — as Jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which a model was never shown.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
