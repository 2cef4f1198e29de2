"""A Parquet file: opened, with one line for what keeps it from being read; its row groups' stored bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tpctl.batch.formats.files import Found, said
from tpctl.errors import SourceError, UsageError, printable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_STEP = 1 << 20  # bytes that are hashed at once


def arrow() -> Any:
    """``pyarrow``, with its ``parquet``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow, which is not installed; `pip install 'tpctl[data]'`") from None
    return pyarrow


@contextmanager
def opened(files: Found, path: str) -> Iterator[pq.ParquetFile]:
    """A file whose end can be read.

    Raises:
        SourceError: it cannot.
    """
    pa = arrow()
    with reading(path):
        stream = files.system.open(path, "rb")
    with stream:
        with reading(path):
            file = pa.parquet.ParquetFile(path if files.local else stream)
        with file:
            yield file


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what keeps a file from being read into one line."""
    pa = arrow()
    try:
        yield
    except pa.ArrowException as error:
        raise SourceError(f"{path} is no Parquet file, or a damaged one: {printable(said(error))}") from None
    except (OSError, ValueError) as error:  # also of pages that cannot be unpacked
        what = "cannot read" if getattr(error, "errno", None) else "damaged Parquet file"
        raise SourceError(f"{what} {path}: {printable(said(error))}") from None


def chunks_of(group: Any, names: Sequence[str]) -> Iterator[Any]:
    """What a row group has of some columns; nested ones have several chunks."""
    inner = tuple(f"{name}." for name in names)
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema in names or chunk.path_in_schema.startswith(inner):
            yield chunk


def hash_chunk(file: Any, chunk: Any, total: Any) -> None:
    """Add a column chunk's stored bytes."""
    start = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None and chunk.has_dictionary_page:
        start = min(start, chunk.dictionary_page_offset)
    left = chunk.total_compressed_size
    file.seek(start)
    while left > 0 and (data := file.read(min(left, _STEP))):
        total.update(data)
        left -= len(data)
