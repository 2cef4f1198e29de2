"""Which columns of a table a batch reads: the prompt, the id, and those that are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpctl.client.forms import ALL, OwnForm, finite, refused_name
from tpctl.errors import SourceError, shown

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Chosen:
    """Columns of a table.

    Attributes:
        prompt: of texts, or of ``messages``.
        id: ``None``: rows have their numbers.
        kept: that go into the answers' rows.
        read: what lines are made of; ``all``: what a batch depends on.
    """

    prompt: str
    id: str | None
    kept: tuple[str, ...]
    messages: bool
    read: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.read, *self.kept)))

    def compare(self, first: pa.Schema, other: pa.Schema, path: str, first_path: str) -> None:
        """Raise ``SourceError`` if another file has one of them not, or as something else."""
        for name in self.all:
            if name not in other.names:
                raise SourceError(_missing(name, other, path))
            if (one := first.field(name).type) != (two := other.field(name).type):
                raise SourceError(f"column {shown(name)} is {two} in {path}, and {one} in {first_path}")


def choose(schema: pa.Schema, asked: OwnForm, path: str, *, carried: bool) -> Chosen:
    """The columns of a file.

    Args:
        path: what messages call it.
        carried: kept columns must have a form in JSON.

    Raises:
        SourceError: it has not what is asked for, or as something that cannot be used.
    """
    names = list(schema.names)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{path} has two columns that are called {shown(repeated[0])}")
    prompt = asked.prompt_field or _prompt(schema, path)
    id = asked.id_of or ("id" if "id" in names else None)
    kept = [name for name in names if name != "id" or id != "id"] if asked.keep == ALL else list(asked.keep)
    kept = [name for name in dict.fromkeys(kept) if not name == id == "id"]
    for name in (prompt, *([] if id is None else [id]), *kept):
        if name not in names:
            raise SourceError(_missing(name, schema, path))
    if taken := sorted(asked.taken.intersection(kept)):
        raise SourceError(f"column {refused_name(taken[0])}")
    messages = _is_messages(prompt, schema.field(prompt).type, path)
    if id is not None and not (_is_text(schema.field(id).type) or _is_whole(schema.field(id).type)):
        raise SourceError(f"column {shown(id)} of {path} is {schema.field(id).type}; ids are texts or whole numbers")
    for name in kept if carried else ():
        if not _has_json(schema.field(name).type):
            raise SourceError(
                f"column {shown(name)} of {path} is {schema.field(name).type}, which JSON has no form for; write "
                "Parquet (-o FILE.parquet), or leave it out of --keep-columns"
            )
    read = (prompt, *([] if id is None else [id]), *(kept if carried else ()))
    return Chosen(prompt, id, tuple(kept), messages, tuple(dict.fromkeys(read)))


def as_json(row: dict[str, Any]) -> bytes:
    """A row as a line; numbers that JSON knows no form of are null."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(row := finite(row), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # of ``values``: whoever reads the line refuses it
        return json.dumps(row).encode()


def values(column: Any) -> list[Any]:
    """A column's values. A text that is no UTF-8, which files may hold all the same, has halves of surrogate pairs, so
    that its row is refused, and no other."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(one) for one in column]
    return found


def _value(one: Any) -> Any:
    try:
        return one.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object).decode("utf-8", "surrogateescape")


def _prompt(schema: pa.Schema, path: str) -> str:
    found = [name for name in ("prompt", "messages") if name in schema.names]
    if len(found) == 1:
        return found[0]
    has = "neither a column prompt nor one of messages" if not found else "a column prompt and one of messages"
    raise SourceError(f"{path} has {has}; say with --prompt-column which to take of {_listed(schema.names)}")


def _missing(name: str, schema: pa.Schema, path: str) -> str:
    return f"{path} has no column {shown(name)}; it has {_listed(schema.names)}"


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _is_messages(name: str, kind: pa.DataType, path: str) -> bool:
    """Whether a column of prompts has messages; ``False``: texts."""
    import pyarrow as pa

    if _is_text(kind):
        return False
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_struct(inner) and {"role", "content"} <= {inner.field(at).name for at in range(len(inner))}:
            return True
    raise SourceError(
        f"column {shown(name)} of {path} is {kind}; prompts are texts, or lists of messages with a role and a content"
    )


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_whole(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind))


def _has_json(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind):
        return all(_has_json(kind.field(at).type) for at in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _has_json(kind.value_type)
    return bool(
        _is_text(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )
