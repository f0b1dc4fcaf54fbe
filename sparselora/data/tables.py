"""Tables of a user's rows, from csv, tsv, json, jsonl and parquet files or Arrow: every cell as the source holds it.

Nothing is guessed. A string stays the string that it is, a cell of csv or tsv stays as it is written, and only numbers
and truth values, which JSON and Parquet tell from strings, become texts: as JSON writes them. `cell_text` takes a cell
to its text or refuses it; an empty cell of csv or tsv, a null and a NaN are missing.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, counted, few, one_line, plain, suggest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

FILE_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

HELD_OUT_EVERY = 5
"""Without evaluation rows of their own, every fifth row of a table is held out."""

EVAL_SUBSET_SEED = 0
"""Draws the evaluation rows of every run, so that runs with different seeds can be compared row by row."""


class Number(str):
    """A number of JSON, as it is written there, or of Parquet, as JSON would write it."""


@dataclass(frozen=True)
class Unread:
    """A cell of a kind that is never a text (a list, bytes, a date): read no further than that."""

    kind: str


def cell_text(cell: object, where: str) -> str:
    """The text of a cell that is not missing; ``where`` names it in messages.

    Raises:
        InputError: a list, an object, bytes or another cell that is no text, or one that no tokenizer can encode.
    """
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if not isinstance(cell, str):
        kind, has_messages = kind_of(cell)
        advice = (
            "it holds chat messages, which are read from one column: messages, conversations, or the prompt_field"
            if has_messages
            else "give a string or a number, or name another field"
        )
        raise InputError(f"{where} is {kind}, not a text; {advice}")
    text = str(cell)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])[1:-1]
            raise InputError(
                f"{where} holds {half}, one half of a surrogate pair, which is no character; mend the text"
            ) from None
    return text


def kind_of(cell: object) -> tuple[str, bool]:
    """Kind of a cell that is no text, and whether it holds chat messages."""
    if isinstance(cell, Unread):
        return cell.kind, False
    parts = cell if isinstance(cell, list) else [cell]
    return ("a list" if isinstance(cell, list) else "an object"), is_chat(parts)


_MESSAGE = ({"role", "content"}, {"from", "value"})
"""Keys of a message: OpenAI's, and ShareGPT's."""


def is_chat(cell: object) -> bool:
    """Return whether a cell is a list that begins with a message of a conversation."""
    if not isinstance(cell, list) or not cell or not isinstance(cell[0], dict):
        return False
    return any(keys <= cell[0].keys() for keys in _MESSAGE)


@dataclass(frozen=True)
class Table:
    """Rows of named cells.

    Attributes:
        source: name of where they come from, for messages.
        rows: ``(n,)`` the id of each row in its source: its position, unless Parquet holds a pandas index.
        columns: field → its n cells; None is missing.
        is_typed: the source tells numbers from strings, which csv and tsv do not.
    """

    source: str
    rows: NDArray[Any]
    columns: dict[str, list[Any]]
    is_typed: bool

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, mask: NDArray[np.bool_], source: str) -> Table:
        """The rows of ``mask (n,)``, under the name ``source``."""
        positions = np.flatnonzero(mask).tolist()
        columns = {field: [cells[i] for i in positions] for field, cells in self.columns.items()}
        return Table(source, self.rows[mask], columns, self.is_typed)

    def held_out(self) -> tuple[Table, Table]:
        """The rows to train on, and every fifth row, held out from them.

        Raises:
            InputError: there are fewer than five rows.
        """
        held = np.arange(len(self)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        if not held.any():
            raise InputError(
                f"{self.source} has {counted(len(self), 'row')}, too few to hold out every fifth (the evaluation rows "
                "would be empty); give more, or an --eval_file"
            )
        return self.take(~held, self.source), self.take(held, f"the held-out rows of {self.source}")

    def where(self, field: str, i: int) -> str:
        """Name of the cell of ``field`` in the row at position ``i``, for messages."""
        return f"{self.source}: {plain(field)} of row {self.rows[i]}"

    def cells(self, field: str) -> list[Any]:
        """The cells of ``field``, none of them missing.

        Raises:
            InputError: there is no such field, or a row without it.
        """
        if field not in self.columns:
            raise InputError(
                f"{self.source} has no column {field!r}{suggest(field, self.columns)}; "
                f"its columns are {few(self.columns)}"
            )
        cells = self.columns[field]
        missing = [i for i, cell in enumerate(cells) if cell is None]
        if missing:
            raise InputError(
                f"{self.source} has {counted(len(missing), 'row')} without {field!r}, the first is row "
                f"{self.rows[missing[0]]}; remove them"
            )
        return cells

    def texts(self, field: str) -> list[str]:
        """The texts of ``field``.

        Raises:
            InputError: there is no such field, a row without it, or a cell that `cell_text` refuses.
        """
        return [
            cell if type(cell) is str and cell.isascii() else cell_text(cell, self.where(field, i))
            for i, cell in enumerate(self.cells(field))
        ]

    def texts_or_empty(self, field: str) -> list[str]:
        """The texts of ``field``, empty where a row has none.

        Raises:
            InputError: a cell that `cell_text` refuses.
        """
        return [
            "" if cell is None else cell_text(cell, self.where(field, i)) for i, cell in enumerate(self.columns[field])
        ]


# --- files --------------------------------------------------------------------------------------------------------

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


def _read_json(text: str, path: Path) -> tuple[dict[str, list[Any]], int]:
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


_READERS = {".csv": _read_csv, ".tsv": _read_tsv, ".json": _read_json, ".jsonl": _read_json}


# --- Arrow --------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, source: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pa.BufferReader(_content(path)) if path.name.endswith(".gz") else path
    with pq.ParquetFile(stored) as file:
        schema, facts = file.schema_arrow, file.metadata
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    _refuse_bomb(path, max(sum(group.total_byte_size for group in groups), 8 * values))
    unread = {field.name: _unread(field.type) for field in schema}
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


def _unread(kind: pyarrow.DataType) -> Unread | None:
    """The cell that stands for every one of a column of type ``kind``; None if they are texts, numbers or the like."""
    import pyarrow as pa

    t = pa.types
    if t.is_dictionary(kind):
        return _unread(kind.value_type)
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
    return any(keys <= names for keys in _MESSAGE)


def _arrow_cells(column: pyarrow.ChunkedArray) -> list[Any]:
    import pyarrow as pa

    kind = column.type
    unread = _unread(kind)
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


def draw_rows(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return ``count`` rows of ``frame`` drawn by ``seed``, in their order, with a new index; all of them for 0."""
    if count == 0 or count >= len(frame):
        return frame.reset_index(drop=True)
    index = np.random.default_rng(seed).permutation(len(frame))[:count]
    return frame.iloc[np.sort(index)].reset_index(drop=True)
