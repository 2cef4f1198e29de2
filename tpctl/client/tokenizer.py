"""Text to token ids and back, from a checkpoint folder's ``tokenizer.json``.

The ``tokenizers`` library reads that file in a tenth of a second; transformers' classes around it take a
second and import torch on some paths. What they add is little and done here and in ``added_tokens``: tokens that
other files name. As in transformers 5 the file alone says whether a BOS is put before a text; ``add_bos_token`` of the
config is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.client.added_tokens import TokenFiles
from tpctl.client.chat_messages import Message
from tpctl.client.panics import guarded
from tpctl.client.reasoning import Form, find_form
from tpctl.client.template import ChatTemplate, no_template, read_template, template_name
from tpctl.client.text_growth import check_steps, check_text_growth, most_added, read_steps
from tpctl.client.token_bound import most_characters
from tpctl.client.tools.find import find_form as find_tool_form
from tpctl.client.tools.forms import ToolForm
from tpctl.errors import CheckpointError, RequestError, TooLongError, again
from tpctl.json_file import is_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE = "tokenizer.json"
_LONG = 1 << 16  # characters of a text about which it is worth to look through the vocabulary
_LAST_WORD = 1000  # tokens that a text cut in its last word may have more
_QUICK = 2000  # characters that are tokenised in a millisecond or two
MOST_BYTES = 256 << 20
"""Longest ``tokenizer.json``. The largest in use, of 260,000 tokens, have 34 MB; read, they take several times that."""


def tokenizer_file(folder: Path, shown: str) -> Path:
    """The tokenizer's file in ``folder``, which messages call ``shown``.

    Raises:
        CheckpointError: it is not there, or no regular file.
    """
    if not is_file(folder / FILE, f"{shown}/{FILE}"):
        raise CheckpointError(
            f"{shown} has no tokenizer.json, so text cannot be turned into tokens; add the file from the model's page"
        )
    return folder / FILE


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        backend: the ``tokenizers`` object that does the work.
        special_tokens: ``bos_token``, ``eos_token``, … and the text of each.
        shared: other threads must go on while a long text is tokenised: the library then lets go of Python's lock.
        whole_texts: of tokens that are whole characters, as far as a detokenizer has met them.
    """

    def __init__(self, folder: Path, *, shown: str | None = None, template: ChatTemplate | None = None) -> None:
        """Read the tokenizer of a checkpoint or shard folder.

        Args:
            shown: what messages call the folder, where it is a copy that its user does not know.
            template: the chat template to use, if not the folder's.

        Raises:
            CheckpointError: there is none, or its files cannot be read.
        """
        from tokenizers import Tokenizer as Backend

        self._shown = shown or str(folder)
        self._file = f"{self._shown}/{FILE}"
        file = tokenizer_file(folder, self._shown)
        if (size := file.stat().st_size) > MOST_BYTES:
            raise CheckpointError(f"{self._file} has {size} bytes, but a tokenizer has at most {MOST_BYTES}")
        self._growth = check_steps(read_steps(file.read_bytes(), self._file), self._file)
        self.backend: Backend = guarded(
            lambda: Backend.from_file(str(file)),
            lambda said: CheckpointError(f"{self._file} is not a tokenizer this version can read: {said}"),
        )
        # The file may ask for the cutting and padding of the training run it comes from.
        self.backend.no_truncation()
        self.backend.no_padding()
        files = TokenFiles.read(folder, self._shown)
        # What is written like a control token is then text, even where the chat template wrote it.
        self.backend.encode_special_tokens = files.split_special_tokens
        self.special_tokens = files.special_tokens
        self.shared = False
        self.whole_texts: dict[int, str] = {}
        self._template = template
        self._template_source = read_template(folder, files.config, self._shown) if template is None else None
        self._template_name = template_name(folder, self._shown)
        self._template_error: CheckpointError | None = None
        guarded(
            lambda: files.add_to(self.backend, most_added(self._growth)),
            lambda said: CheckpointError(f"{self._shown}: the tokens it adds cannot be added: {said}"),
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for control tokens, which ``decode`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def reasoning(self) -> Form | None:
        """How answers in a chat mark what was thought before them, if the model does that."""
        source = self.template_source
        return None if source is None else find_form(source, self.added_ids)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How answers in a chat mark calls of tools, if the model's template knows any, in a form that is known."""
        source = self.template_source
        return None if source is None else find_tool_form(source, self.added_ids)

    @cached_property
    def added_ids(self) -> dict[str, int]:
        """Ids of the tokens that are added to the vocabulary, by their text."""
        return {token.content: id for id, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def marks(self) -> frozenset[int]:
        """Ids of the tokens that are added to the vocabulary."""
        return frozenset(self.added_ids.values())

    @property
    def template_source(self) -> str | None:
        """The chat template's program; ``None``: there is none."""
        return self._template_source if self._template is None else self._template.source

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None or self._template_source is not None

    @property
    def template(self) -> ChatTemplate:
        """The chat template, compiled when first asked for.

        Raises:
            CheckpointError: the model has none, or one that does not compile.
        """
        if self._template_error is not None:
            raise again(self._template_error)
        if self._template is None:
            if self._template_source is None:
                raise no_template(self._shown)
            try:
                self._template = ChatTemplate(self._template_source, self.special_tokens, name=self._template_name)
            except CheckpointError as error:
                self._template_error = again(error)  # a second try would take as long, and fail as well
                raise
        return self._template

    def interrupt(self) -> None:
        """End what other threads have the chat template do, and what they wait for; they get a ``BusyError``."""
        if self._template is not None:
            self._template.interrupt()

    def encode(self, text: str, *, most: int | None = None) -> list[int]:
        """Token ids of plain text, with the tokens the model wants around it (usually a first BOS).

        Args:
            most: how many there may be; a text that has more for certain is not tokenised, one that has more in fact
                is the caller's to refuse.

        Raises:
            TooLongError: it has more than ``most`` tokens.
            RequestError: it holds half a surrogate pair, as bytes that are not UTF-8 become, or the tokenizer fails.
        """
        ids = self._encode(text, most, add_special_tokens=True)
        bos = self.special_tokens.get("bos_token")
        # Text that begins with a BOS of its own must not get a second one.
        if bos and text.startswith(bos) and len(ids) > 1 and ids[0] == ids[1] == self.backend.token_to_id(bos):
            return ids[1:]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's next answer begins.

        Args:
            variables: what the template is given besides.
            most: as ``encode`` takes it.

        Raises:
            CheckpointError: the model has no chat template.
            TooLongError: they have more than ``most`` tokens.
            RequestError: the template refuses these messages, or they hold half a surrogate pair.
        """
        return self.encode_rendered(self.template.render(messages, variables=variables), most=most)

    def encode_rendered(self, text: str, *, most: int | None = None) -> list[int]:
        """Token ids of what the chat template made of a conversation.

        Raises:
            RequestError: as ``encode_chat``.
        """
        # The template writes every control token itself, BOS included.
        ids = self._encode(text, most, add_special_tokens=False)
        if not ids:
            raise RequestError("the model's chat template makes no text of these messages")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens.

        Raises:
            CheckpointError: the tokenizer fails.
        """
        return guarded(
            lambda: str(self.backend.decode(ids, skip_special_tokens=skip_special)),
            lambda said: CheckpointError(f"{self._file} cannot decode what the model wrote: {said}"),
            quiet=False,
        )

    @cached_property
    def _most_characters(self) -> int | None:
        return most_characters(self.backend)

    def _encode(self, text: str, most: int | None, *, add_special_tokens: bool) -> list[int]:
        check_text(text)
        if most is not None and len(text) > max(_LONG, most):
            self._check_room(text, most)
        return self._ids(text, add_special_tokens=add_special_tokens)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        def encoded() -> list[int]:
            check_text_growth(self.backend, text, self._growth, self._file)
            if self.shared and len(text) > _QUICK:  # ``encode`` holds the lock, seconds for a book
                (found,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return list(found.ids)
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

        return guarded(encoded, lambda said: RequestError(f"{self._file} cannot turn this text into tokens: {said}"))

    def _check_room(self, text: str, most: int) -> None:
        """Refuse a long text that has more than ``most`` tokens, without making all of them.

        Where it is not known how many characters a token has at most, its beginning tells: what follows changes no more
        than the last word's tokens.
        """
        if each := self._most_characters:
            fewest, said = -(-len(text) // each), f"has {len(text):,} characters"
        elif len(text) > 2 * (begin := _LONG + 16 * most):
            fewest = len(self._ids(text[:begin], add_special_tokens=False)) - _LAST_WORD
            said = f"has {len(text):,} characters, of which the first {begin:,} were looked at,"
        else:
            return
        if fewest > most:
            raise TooLongError(
                f"the text {said} and so at least {fewest:,} tokens, but at most {most:,} leave room for an answer; "
                "shorten it, or raise --max-model-len, or --kv-cache-memory if that is the limit"
            )


def check_text(text: str, what: str = "text") -> None:
    """Refuse what JSON's ``\\ud800`` and bytes that are not UTF-8 become in Python: half of a surrogate pair.

    Raises:
        RequestError: ``what`` holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the {what} is not valid Unicode: it holds {text[error.start]!r}, half of a surrogate pair; use UTF-8"
        ) from None
