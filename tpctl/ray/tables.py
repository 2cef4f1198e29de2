"""Batches as ``map_batches`` gives them, read and added to in their own form: NumPy columns, pandas, or Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpctl.errors import UsageError


def columns_of(batch: Any) -> list[str]:
    """The names of a batch's columns.

    Raises:
        UsageError: it is no batch of a known form.
    """
    if isinstance(batch, Mapping):
        return list(batch)
    names = getattr(batch, "column_names", None)  # Arrow
    if names is None:
        names = getattr(batch, "columns", None)  # pandas
    if names is None:
        raise UsageError(f"a batch is a {type(batch).__name__}, but must be of NumPy, pandas or pyarrow")
    return list(names)


def column(batch: Any, name: str) -> list[Any]:
    """A column's values as JSON knows them, null for what is missing."""
    values = batch[name]
    values = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    return [plain(value) for value in values]


def plain(value: Any) -> Any:
    """A value of a table as JSON knows it. Fields that are null are left out: Arrow gives each struct of a column the
    fields of all."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value != value:
        return None  # what pandas has where nothing is
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def with_columns(batch: Any, texts: Mapping[str, Sequence[str | None]], numbers: Mapping[str, Sequence[int]]) -> Any:
    """A batch and more columns, of texts and of whole numbers, in the form that it has."""
    if isinstance(batch, Mapping):
        objects = {name: np.array(values, dtype=object) for name, values in texts.items()}
        return {**batch, **objects, **{name: np.array(values, dtype=np.int64) for name, values in numbers.items()}}
    if hasattr(batch, "column_names"):
        import pyarrow

        for name, values in texts.items():
            batch = batch.append_column(name, pyarrow.array(values, pyarrow.string()))
        for name, counts in numbers.items():
            batch = batch.append_column(name, pyarrow.array(counts, pyarrow.int64()))
        return batch
    import pandas

    objects = {name: pandas.Series(values, index=batch.index, dtype=object) for name, values in texts.items()}
    return batch.assign(**objects, **numbers)
