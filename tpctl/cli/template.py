"""The chat template of ``chat`` and ``batch``: compiled and tried as soon as the model's files are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.cli.options import TemplateOptions
from tpctl.errors import CheckpointError, RequestError, UsageError

if TYPE_CHECKING:
    from tpctl.checkpoint.sources import ResolvedSource
    from tpctl.client.template import ChatTemplate
    from tpctl.client.tokenizer import Tokenizer

GREETING: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "Hello"},)
"""What a template is tried with where nothing has been said yet."""


class TemplateAtHand:
    """What the options say of the template, and the model's own; make it first, since its process takes time to start.

    Attributes:
        shown: what messages call the model's folder, once that is known.
    """

    def __init__(self, options: TemplateOptions) -> None:
        """Read what the options name.

        Raises:
            UsageError: the variables are no JSON object.
            CheckpointError: the file cannot be read.
        """
        from tpctl.client.template import read_text
        from tpctl.client.template_pool import TemplateProcesses

        self._file = options.chat_template
        self._variables = options.variables()
        self._text = None if self._file is None else read_text(self._file, str(self._file))
        self._process = TemplateProcesses()
        self._template: ChatTemplate | None = None
        self._looked = False
        self.shown: str | None = None

    @property
    def given(self) -> bool:
        return self._text is not None or bool(self._variables)

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, by the options' names; empty if none was given."""
        found: dict[str, Any] = {}
        if self._text is not None:
            found["chat_template"] = f"{self._file} (SHA-256 {sha256(self._text.encode()).hexdigest()[:12]})"
        if self._variables:
            found["chat_template_kwargs"] = self._variables
        return found

    def look(
        self, source: ResolvedSource, messages: Sequence[Mapping[str, Any]] | None, *, demanded: bool = True
    ) -> None:
        """Compile the template, and try it with ``messages``; see that there is a tokenizer.

        Args:
            demanded: whether nothing goes without one.

        Raises:
            CheckpointError: there is none, it does not compile, or the model has no tokenizer.
            RequestError: it refuses the messages, or fails.
            UsageError: it does not read a variable that was given.
        """
        from tpctl.client.template import no_template
        from tpctl.client.tokenizer import tokenizer_file

        self.shown = source.id
        self._find(source.folder, source.id)
        if self._template is None and demanded:
            raise no_template(source.id)
        if self._template is not None and messages is not None:
            self._template.render(messages)
        tokenizer_file(source.folder, source.id)

    def tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer of a folder of that model's shards, with this template."""
        from tpctl.client.tokenizer import Tokenizer

        if not self._looked:
            self._find(folder, str(folder))
        return Tokenizer(folder, shown=self.shown, template=self._template)

    def _find(self, folder: Path, shown: str) -> None:
        from tpctl.client.added_tokens import TokenFiles
        from tpctl.client.template import ChatTemplate, read_template, template_name

        files = TokenFiles.read(folder, shown)
        text, name = self._text, str(self._file)
        if text is None:
            text, name = read_template(folder, files.config, shown), template_name(folder, shown)
        self._looked = True
        if text is not None:
            self._template = ChatTemplate(
                text, files.special_tokens, name=name, process=self._process, variables=self._variables
            )
        elif self._variables:
            raise UsageError(f"--chat-template-kwargs are for a chat template, and {shown} has none; leave them out")


def look_ahead(at_hand: TemplateAtHand, source: ResolvedSource, *, needed: bool) -> None:
    """``look`` for a batch, whose lines may say what a greeting does not.

    Args:
        needed: whether there are lines for the template; without, it may be wrong.

    Raises:
        CheckpointError, UsageError: the template can render no line, or the model has no tokenizer.
    """
    from tpctl.client.template import TemplateRefusal
    from tpctl.client.tokenizer import tokenizer_file

    tokenizer_file(source.folder, source.id)
    try:
        at_hand.look(source, GREETING if needed else None, demanded=False)
    except TemplateRefusal:
        return
    except RequestError as error:
        raise CheckpointError(str(error)) from None
    except CheckpointError:
        if needed or at_hand.given:
            raise
