"""Tables from Arrow, as a hub's data set or a Parquet file holds them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparselora.data.tables import MESSAGE_KEYS, Number, Table, Unread
from sparselora.errors import InputError, plain

if TYPE_CHECKING:
    import pyarrow


def from_arrow(table: pyarrow.Table, source: str) -> Table:
    """The rows of an Arrow table, as a hub's data set or a Parquet file holds them.

    Raises:
        InputError: two columns of one name.
    """
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source} has two columns {plain(twice)!r}; rename one")
    metadata = table.schema.pandas_metadata or {}
    stored = [name for name in metadata.get("index_columns", []) if isinstance(name, str) and name in names]
    rows = table.select(stored).to_pandas().index.to_numpy() if metadata else np.arange(table.num_rows)
    columns = {name: _arrow_cells(table.column(name)) for name in names if name not in stored}
    return Table(source, rows, columns, is_typed=True)


def unread_cell(kind: pyarrow.DataType) -> Unread | None:
    """The cell that stands for every one of a column of type ``kind``; None if they are texts, numbers or the like."""
    import pyarrow as pa

    t = pa.types
    if t.is_dictionary(kind):
        return unread_cell(kind.value_type)
    texts = (t.is_string, t.is_large_string, t.is_string_view, t.is_boolean, t.is_integer, t.is_floating, t.is_decimal)
    if t.is_null(kind) or any(is_kind(kind) for is_kind in texts):
        return None
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return None if _holds_messages(kind.value_type) else Unread("a list")
    if t.is_struct(kind) or t.is_map(kind):
        return Unread("an object")
    if t.is_date(kind) or t.is_timestamp(kind):
        return Unread("a date")
    binary = (t.is_binary, t.is_large_binary, t.is_fixed_size_binary)
    return Unread("bytes" if any(is_kind(kind) for is_kind in binary) else f"of Arrow's type {kind}")


def _holds_messages(kind: pyarrow.DataType) -> bool:
    """Return whether a struct has the keys of a message."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    names = {kind.field(i).name for i in range(kind.num_fields)}
    return any(keys <= names for keys in MESSAGE_KEYS)


def _arrow_cells(column: pyarrow.ChunkedArray) -> list[Any]:
    import pyarrow as pa

    kind = column.type
    unread = unread_cell(kind)
    if unread is not None:
        return [unread] * len(column)
    if pa.types.is_dictionary(kind):
        return [cell for chunk in column.chunks for cell in _dictionary_cells(chunk)]
    if pa.types.is_integer(kind):
        return [None if value is None else Number(value) for value in column.to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if value is None else Number(format(value, "f")) for value in column.to_pylist()]
    if pa.types.is_floating(kind):
        return [_float_cell(value) for value in column.to_numpy()]  # its own precision: 0.1 of float32 is "0.1"
    return list(column.to_pylist())


def _dictionary_cells(chunk: pyarrow.DictionaryArray) -> list[Any]:
    import pyarrow as pa

    values = _arrow_cells(pa.chunked_array([chunk.dictionary]))
    return [None if i is None else values[i] for i in chunk.indices.to_pylist()]


def _float_cell(value: np.floating) -> Number | Unread | None:
    if math.isfinite(value):
        return Number(value)
    return None if math.isnan(value) else Unread("an infinite number")
