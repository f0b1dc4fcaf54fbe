"""Tables in files: csv, tsv, json, jsonl and Parquet, compressed or not, every cell as the file holds it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparselora.data.arrow_tables import from_arrow, unread_cell
from sparselora.data.tables import Number, Table, Unread
from sparselora.errors import InputError, few, one_line, plain

FILE_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_UNPACKED_RATIO = 50
"""What a compressed table may unpack to, as a multiple of its size. Tables of text: 3 to 12; what gzip can do: 1032."""
_UNPACKED_FREE = 64 << 20
"""Bytes that it may unpack to in any case."""
_CHUNK = 1 << 20


def is_table(path: str) -> bool:
    """Return whether the name ``path`` ends as that of a table does."""
    return path.removesuffix(".gz").endswith(FILE_KINDS)


def table_name(path: str) -> str:
    """The file's name without what says its kind."""
    return Path(path).name.removesuffix(".gz").rpartition(".")[0]


def read_table(path: str | Path, source: str | None = None) -> Table:
    """A csv, tsv, json, jsonl or parquet file, ``.gz`` too, in UTF-8. ``source`` is its name in messages (the path).

    JSON is an array of objects, or objects one after the other (JSON Lines), whatever the file is called. Rows may have
    different fields. In csv and tsv, rows have as many cells as the header, empty lines are skipped, and columns
    without a name are left out. In tsv a quotation mark is a character like any other, unless the names in the header
    are in quotation marks, as R writes them.

    Raises:
        InputError: no such file, not one of these kinds, not UTF-8, one that cannot be parsed or does not say which
            cell belongs to which field, one without rows, or a compressed one that unpacks to far more than a table of
            its size would.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in FILE_KINDS:
        raise InputError(f"{path} is not a table this reads; its name must end in {', '.join(FILE_KINDS)} (.gz too)")
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    try:
        if kind == ".parquet":
            table = _read_parquet(path, source or str(path))
        else:
            text = _text(path)
            columns, count = _READERS[kind](text, path)
            table = Table(source or str(path), np.arange(count), columns, is_typed=kind in (".json", ".jsonl"))
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise _unreadable(path, kind, f"{error.msg}, line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _unreadable(path, kind, "it is nested too deep") from None
    # zlib and csv raise errors of their own, Arrow some that are no ValueError.
    except (ValueError, OSError, EOFError, NotImplementedError, KeyError, MemoryError, zlib.error, csv.Error) as error:
        raise _unreadable(path, kind, str(error)) from None
    if not len(table):
        raise InputError(f"{path} has no rows; give a file with data")
    return table


def _unreadable(path: Path, kind: str, reason: str) -> InputError:
    return InputError(f"{path} cannot be read as {kind[1:]} ({one_line(reason)[:160]}); check the file")


def _content(path: Path, is_text: bool = False) -> bytes:
    """The bytes of a file, unpacked if it is compressed; read in chunks, so that a bomb is refused before it is whole.

    Raises:
        InputError: it unpacks to too much, or is said to be a text and holds zero bytes.
    """
    packed = path.name.endswith(".gz")
    size, chunks = 0, []
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if is_text and b"\0" in chunk:
                raise InputError(f"{path} holds zero bytes, so it is no text in UTF-8 (UTF-16?); save it as UTF-8")
            size += len(chunk)
            if packed:
                _refuse_bomb(path, size)
            chunks.append(chunk)
    return b"".join(chunks)


def _refuse_bomb(path: Path, unpacked: int) -> None:
    limit = max(_UNPACKED_FREE, _UNPACKED_RATIO * path.stat().st_size)
    if unpacked > limit:
        raise InputError(
            f"{path} unpacks to more than {limit >> 20} MB, {_UNPACKED_RATIO} times its size or more, which no table "
            "of texts does; unpack it into a csv or jsonl file if it is one"
        )


def _text(path: Path) -> str:
    content = _content(path, is_text=True)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not in UTF-8 (byte 0x{content[error.start]:02x} in line {line}); save it as UTF-8"
        ) from None


# --- JSON ---------------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]*")


def json_lines(text: str, path: Path) -> tuple[dict[str, list[Any]], int]:
    """Return the columns of JSON rows and their number; ``path`` is their name in messages.

    Raises:
        InputError: a row that is no object, or rows of ever other fields.
        ValueError: text that is no JSON.
    """
    rows: list[dict[str, Any]] = []
    names: dict[str, Any] = {}  # in the order in which rows have them
    for row in _json_rows(text):
        if not isinstance(row, dict):
            kind = "null" if row is None else "a list" if isinstance(row, list) else "a single value"
            raise InputError(
                f"{path}: row {len(rows)} is {kind}, not an object with named fields; give an array of objects, or an "
                "object a line"
            )
        rows.append(row)
        names.update(row)
    if len(rows) == 1 and path.name.removesuffix(".gz").endswith(".json"):
        _refuse_single_object(rows[0], path)
    # Rows with ever other fields would make a table of many times the file's size.
    if len(names) * len(rows) > 4 * sum(map(len, rows)) + 10_000_000:
        raise InputError(f"{path} has {len(names)} different fields in {len(rows)} rows; a table has few, in every row")
    return {name: [row.get(name) for row in rows] for name in names}, len(rows)


def _refuse_single_object(row: dict[str, Any], path: Path) -> None:
    inner = [name for name, value in row.items() if isinstance(value, (list, dict))]
    if inner:
        raise InputError(
            f"{path} is one object with a list or an object in {few(inner, 4)}, not rows; give an array of objects, or "
            "an object a line"
        )


def _json_rows(text: str) -> Iterator[Any]:
    """The items of an array, or values one after the other; numbers come as they are written."""
    decode = json.JSONDecoder(
        parse_int=Number, parse_float=Number, parse_constant=_constant, object_pairs_hook=_object
    ).raw_decode
    place = _after_space(text, 0)
    if not text.startswith("[", place):
        while place < len(text):
            value, place = decode(text, place)
            yield value
            place = _after_space(text, place)
        return
    place = _after_space(text, place + 1)
    has_next = not text.startswith("]", place)
    while has_next:
        value, place = decode(text, place)
        yield value
        place = _after_space(text, place)
        has_next = text.startswith(",", place)
        if not has_next and not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']' delimiter", text, place)
        place = _after_space(text, place + 1) if has_next else place
    place = _after_space(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("more after the end of the array", text, place)


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _constant(name: str) -> Unread | None:
    """NaN, which Python and pandas write for what is missing, or an infinity; JSON has neither."""
    return None if name == "NaN" else Unread("an infinite number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {plain(twice)!r} twice")
    return values


# --- csv and tsv --------------------------------------------------------------------------------------------------


def _read_csv(text: str, path: Path) -> tuple[dict[str, list[Any]], int]:
    before = csv.field_size_limit(len(text) + 1)  # of this process; the default refuses long texts
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            numbered = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise InputError(
                f"{path} cannot be read as csv ({error}, line {reader.line_num}); a cell that begins with a quotation "
                "mark ends with one, and those inside are doubled"
            ) from None
    finally:
        csv.field_size_limit(before)
    return _columns(numbered, path, "csv", "commas", ";\t|")


def _read_tsv(text: str, path: Path) -> tuple[dict[str, list[Any]], int]:
    numbered = [(i, line.removesuffix("\r").split("\t")) for i, line in enumerate(text.split("\n"), start=1)]
    if _is_quoted([row for _, row in numbered]):
        numbered = [(i, [_unquoted(cell) for cell in row]) for i, row in numbered]
    return _columns(numbered, path, "tsv", "tabs", ",;|")


_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def _is_quoted(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the names in the header are in quotation marks, and every cell that has one is quoted whole."""
    header = next((row for row in rows if row != [""]), [])
    if not any(name.startswith('"') for name in header):
        return False
    return all(_QUOTED.fullmatch(cell) for row in rows for cell in row if '"' in cell)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell


def _columns(
    numbered: Sequence[tuple[int, list[str]]], path: Path, kind: str, separator: str, others: str
) -> tuple[dict[str, list[Any]], int]:
    """Columns by name, and the number of rows, of ``(line, cells)`` with the header first.

    ``separator`` is the name of what is between cells, ``others`` are characters that are so in other files.
    """
    filled = [(line, row) for line, row in numbered if len(row) > 1 or (row and row[0].strip())]
    if not filled:
        return {}, 0
    header, rows = filled[0][1], filled[1:]
    other = next((character for character in others if character in header[0]), None)
    if len(header) == 1 and other is not None:
        raise InputError(
            f"{path} has one column, {plain(header[0])!r}; cells of a {kind} are separated by {separator}, not by "
            f"{other!r}"
        )
    for line, row in rows:
        if len(row) != len(header):
            about = "; in a tsv a quotation mark hides no tab and no end of line" if '"' in "".join(row) else ""
            raise InputError(
                f"{path}: line {line} has {len(row)} cells, the header {len(header)}{about if kind == 'tsv' else ''}; "
                f"mend the line{', or write the table as csv or jsonl' if kind == 'tsv' else ''}"
            )
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise InputError(f"{path} has two columns {plain(twice)!r}; rename one")
    cells = zip(*(row for _, row in rows))
    columns = {name: [cell or None for cell in column] for name, column in zip(header, cells) if name}
    return columns if rows else {name: [] for name in named}, len(rows)


# --- Parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, source: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pa.BufferReader(_content(path)) if path.name.endswith(".gz") else path
    with pq.ParquetFile(stored) as file:
        schema, facts = file.schema_arrow, file.metadata
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    _refuse_bomb(path, max(sum(group.total_byte_size for group in groups), 8 * values))
    unread = {field.name: unread_cell(field.type) for field in schema}
    strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    # Strings that repeat are stored once, and are read so: the table is then no larger than what is stored.
    with pq.ParquetFile(stored, read_dictionary=strings) as file:
        table = from_arrow(file.read(columns=[name for name, cell in unread.items() if cell is None]), source)
    _refuse_bomb(path, sum(_text_size(cell) for cells in table.columns.values() for cell in cells))
    columns = {
        name: table.columns[name] if cell is None else [cell] * len(table)
        for name, cell in unread.items()
        if cell is not None or name in table.columns  # a pandas index is no column
    }
    return replace(table, columns=columns)


def _text_size(cell: object) -> int:
    """Characters of a cell: of its texts, where it is a list of messages."""
    if isinstance(cell, str):
        return len(cell)
    return sum(map(_text_size, cell.values() if isinstance(cell, dict) else cell if isinstance(cell, list) else ()))


_READERS = {".csv": _read_csv, ".tsv": _read_tsv, ".json": json_lines, ".jsonl": json_lines}
