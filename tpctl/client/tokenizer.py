"""Text to token ids and back, from a checkpoint folder's ``tokenizer.json``.

The ``tokenizers`` library reads that file in a tenth of a second; transformers' classes around it take a
second and import torch on some paths. What they add is little and done here: special tokens that only
``tokenizer_config.json`` names. As in transformers 5 the file alone says whether a BOS is put before a text;
``add_bos_token`` of the config is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.client.template import ChatTemplate, Message, read_template
from tpctl.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        backend: the ``tokenizers`` object that does the work.
        special_tokens: ``bos_token``, ``eos_token``, … and the text of each.
    """

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of a checkpoint or shard folder.

        Raises:
            CheckpointError: there is none, or its files cannot be read.
        """
        from tokenizers import Tokenizer as Backend

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json, so text cannot be turned into tokens;"
                " add the file from the model's page"
            )
        try:
            self.backend: Backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer this version can read: {error}") from None
        # The file may ask for the cutting and padding of the training run it comes from.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(self._config) or _special_tokens(
            _read_json(folder / "special_tokens_map.json")
        )
        self._template_source = read_template(folder, self._config)
        self._folder = folder
        try:
            self._add_missing_tokens()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} lists tokens that cannot be added: {error!r}"
            ) from None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for control tokens, which ``decode`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, compiled when first asked for.

        Raises:
            CheckpointError: the model has none.
        """
        if self._template_source is None:
            raise CheckpointError(
                f"{self._folder.name} has no chat template, as base models do not; use an instruct model,"
                ' or `tpctl batch` with {"prompt": …} lines'
            )
        return ChatTemplate(self._template_source, self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokens the model wants around it (usually a first BOS).

        Raises:
            RequestError: it holds half a surrogate pair, as bytes that are not UTF-8 become.
        """
        check_text(text)
        ids: list[int] = self.backend.encode(text).ids
        bos = self.special_tokens.get("bos_token")
        # Text that begins with a BOS of its own must not get a second one.
        if bos and text.startswith(bos) and len(ids) > 1 and ids[0] == ids[1] == self.backend.token_to_id(bos):
            return ids[1:]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's next answer begins.

        Raises:
            CheckpointError: the model has no chat template.
            RequestError: the template refuses these messages, or they hold half a surrogate pair.
        """
        text = self.template.render(messages)
        check_text(text)
        # The template writes every control token itself, BOS included.
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not ids:
            raise RequestError("the model's chat template makes no text of these messages")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def _add_missing_tokens(self) -> None:
        """Add tokens that only ``tokenizer_config.json`` knows, in the order of the ids it gives them."""
        from tokenizers import AddedToken

        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        listed = self._config.get("added_tokens_decoder") or {}
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
                options = {flag: bool(entry[flag]) for flag in flags if flag in entry}
                self.backend.add_tokens([AddedToken(entry["content"], **options)])
                known.add(entry["content"])
        named = [token for token in self.special_tokens.values() if token not in known]
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])


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


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named tokens of a config; each value is text, or a dictionary that holds it as ``content``."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value
