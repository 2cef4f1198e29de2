"""Tokens that a checkpoint adds in other files than ``tokenizer.json``, by transformers' rules for reading them.

``tokenizer_config.json`` lists all added tokens in ``added_tokens_decoder``, and nothing else counts. Where it has no
such list, ``special_tokens_map.json`` goes over it, and ``added_tokens.json`` holds the list, with no more than ids.
Named tokens (``bos_token``, …) and ``extra_special_tokens`` (once ``additional_special_tokens``) that are in none of
the lists come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpctl.errors import CheckpointError
from tpctl.errors import shown as _shown
from tpctl.json_file import read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_LIST = "added_tokens_decoder"
_NAMED = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenFiles:
    """What the files beside ``tokenizer.json`` say.

    Attributes:
        config: all of ``tokenizer_config.json``.
        special_tokens: ``bos_token``, ``eos_token``, … and the text of each.
        split_special_tokens: whether special tokens in a text are taken apart, as other text is.
        shown: what messages call the folder.
    """

    config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    split_special_tokens: bool
    shown: str
    _values: Mapping[str, Any]
    _extra: tuple[Any, ...]
    _listed: Mapping[str, int] | None

    @classmethod
    def read(cls, folder: Path, shown: str | None = None) -> TokenFiles:
        """Read them; each may be missing.

        Raises:
            CheckpointError: one cannot be read, holds no JSON object, or something else in a token's place.
        """
        name = shown or str(folder)
        config = _object(folder, CONFIG, name)
        values, listed, origin = dict(config), None, dict.fromkeys(config, CONFIG)
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        if _LIST not in config:
            special = _object(folder, SPECIAL_MAP, name)
            given = {key: value for key, value in special.items() if value is not None}
            values, origin = values | given, origin | dict.fromkeys(given, SPECIAL_MAP)
            extra = _joined(extra, special.get("extra_special_tokens") or special.get("additional_special_tokens"))
            listed = _object(folder, ADDED, name)
        split = values.get("split_special_tokens", False)
        if not isinstance(split, bool):
            raise CheckpointError(f"{name}: split_special_tokens is {_shown(split)}, but must be true or false")
        named = {key: value for key, value in values.items() if key.endswith("_token")}
        if not isinstance(extra, dict | list | None):
            raise CheckpointError(f"{name}: extra_special_tokens is {_shown(extra)}, but must be a list of tokens")
        _check_list(config.get(_LIST), f"{name}/{CONFIG}")
        if isinstance(extra, dict):
            named, extra = {**named, **extra}, ()
        for key in _NAMED & named.keys():
            _check_token(named[key], f"{name}/{origin[key]}: {key}")
        for token in extra or ():
            _check_token(token, f"{name}: a token of extra_special_tokens")
        texts = {key: _text(value) for key, value in named.items()}
        special_tokens = {key: text for key, text in texts.items() if isinstance(text, str)}
        return cls(config, special_tokens, split, name, named, tuple(extra or ()), listed)

    def add_to(self, backend: Tokenizer, most: int) -> None:
        """Add what ``backend`` does not know, and give what it does know the flags that stand here.

        Args:
            most: bytes of a token at most.

        Raises:
            CheckpointError: an entry is none, or its token cannot have the id that stands beside it.
        """
        where = CONFIG if self._listed is None else ADDED
        try:
            listed = self._from_config() if self._listed is None else self._from_added()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.shown}/{where} lists tokens that cannot be added: {error!r}") from None
        try:
            known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(listed)
            added = [token for _, token in sorted(listed.values(), key=lambda item: item[0])]
            unlisted = self._unlisted(known)
            longest = max((len(token.content.encode()) for token in added + unlisted), default=0)
            if longest > most:
                raise CheckpointError(
                    f"{self.shown}/{where} adds a token of {longest:,} bytes, but at most {most:,} are read"
                )
            backend.add_tokens(added)
            backend.add_tokens(unlisted)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.shown}/{CONFIG} names tokens that cannot be added: {error!r}") from None
        for text, (id, _) in listed.items():
            given = backend.token_to_id(text)
            if text and given != id:
                raise CheckpointError(
                    f"{self.shown}/{where} gives {_shown(text)} the id {id}, but behind the tokens of tokenizer.json "
                    f"it would get {given}; correct one of the two files"
                )

    def _from_config(self) -> dict[str, tuple[int, AddedToken]]:
        return {
            entry["content"]: (int(id), _token(entry, special=entry["content"] in self.special_tokens.values()))
            for id, entry in (self.config[_LIST] or {}).items()
        }

    def _from_added(self) -> dict[str, tuple[int, AddedToken]]:
        from tokenizers import AddedToken

        special = {text for name, text in self.special_tokens.items() if name in _NAMED} | set(map(_text, self._extra))
        found = {}
        for text, id in (self._listed or {}).items():
            if isinstance(id, bool) or not isinstance(id, int):
                raise TypeError(f"the id of {_shown(text)} is {_shown(id)}")
            found[text] = (id, AddedToken(text, special=text in special, normalized=text not in special))
        return found

    def _unlisted(self, known: set[str]) -> list[AddedToken]:
        from tokenizers import AddedToken

        found = []
        for value, named in [*((value, True) for value in self._values.values()), *((v, False) for v in self._extra)]:
            text = _text(value)
            if not isinstance(text, str) or not text or text in known:
                continue
            known.add(text)
            plain = isinstance(value, str)
            found.append(
                AddedToken(text, special=True) if plain else _token(value, special=named or "__type" not in value)
            )
        return found


def _object(folder: Path, file: str, shown: str) -> dict[str, Any]:
    """What stands in ``file``, which may be missing."""
    return read_object(folder / file, default={}, where=f"{shown}/{file}")


def _check_token(value: Any, what: str) -> None:
    if value is not None and not isinstance(_text(value), str):
        raise CheckpointError(
            f'{what} is {_shown(value)}, but must be a text, or an object whose "content" is one; correct it'
        )


def _check_list(entries: Any, where: str) -> None:
    """Raise ``CheckpointError`` unless ``entries`` is an object of tokens by id, or nothing."""
    if entries is not None and not isinstance(entries, dict):
        raise CheckpointError(f"{where}: {_LIST} is {_shown(entries)}, but must be an object of tokens by id")
    for id, entry in (entries or {}).items():
        if not (id.isascii() and id.isdigit()):
            raise CheckpointError(f"{where}: {_LIST} has {_shown(id)} in an id's place, which must be a whole number")
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f'{where}: {_LIST} has {_shown(entry)} for the id {id}, but needs an object with a text as "content"'
            )
        for flag in _FLAGS:
            if not isinstance(entry.get(flag, False), bool):
                raise CheckpointError(
                    f"{where}: {_LIST} says {flag} {_shown(entry[flag])} of the id {id}, but it must be true or false"
                )


def _text(value: Any) -> Any:
    """The text of a token, which is itself or a dictionary's ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def _token(entry: Mapping[str, Any], *, special: bool) -> AddedToken:
    from tokenizers import AddedToken

    flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
    if special:
        flags["special"] = True
    return AddedToken(entry["content"], **flags)


def _joined(first: Any, second: Any) -> Any:
    """Two collections of tokens as one, if both are lists; else the second, as elsewhere in that file."""
    if not second or not first:
        return first or second
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *(token for token in second if token not in first)]
    return second
