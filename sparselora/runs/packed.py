"""A packed study: the folders of many runs as one table of runs and a few compressed tables, without loss.

``runs.csv`` has a row a run. Its columns:

- ``run``, the name of the run's folder, and ``provenance``, in words, how far ``commit`` identifies the code that ran;
- the fields of its ``run.json``, those of a nested object joined by dots (``arguments.sparsity.mode``). A cell is JSON,
  or a plain text where that is no JSON; it is empty where the run has no such field. The ``result`` of a run with a
  ``summary.csv`` repeats that table and is left out;
- after ``TABLE/``, the cells of those tables that have one row in each run (``summary/eval_loss``), and the row of a
  sweep's ``results.csv``.

Tables of more rows are in ``TABLE.csv.gz``. Where all runs have the same evaluation rows, each of these stands there
once and a run has columns of its own (``dense_s0/loss``); else the rows of the runs stand below one another, after a
column ``run``. Cells are the texts that the run wrote, so a number reads back as it was.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, shown
from sparselora.runs.files import read_texts, replacing, write_json, write_text
from sparselora.runs.folder import RECORD, read_record
from sparselora.runs.user_files import parse_json, read_json_object

RUNS = "runs.csv"
TABLES = ("summary", "eval", "predictions", "gate", "metrics", "report", "report_items")
"""Tables of a run that comparisons read."""
_SWEEP = "results"
_SETTINGS = "run_args"
_ROW = ("row", "label", "tokens")
"""Columns that describe an evaluation row: the same for every run on the same data."""
_NO_COLUMN = "(no column)"
"""Cell of a run whose table lacks the column that other runs have."""
_LARGEST_BYTES = 2**30
"""Limit on an uncompressed table: a small file may not fill the disk."""


@dataclass(frozen=True)
class Table:
    """A CSV table as texts."""

    header: list[str]
    rows: list[list[str]]

    @classmethod
    def read(cls, path: Path) -> Table:
        frame = read_texts(path)
        return cls(list(frame.columns), frame.to_numpy(dtype=object).tolist())

    def text(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return stream.getvalue()


# --- packing ------------------------------------------------------------------------------------------------------


def pack(source: Path, packed: Path) -> list[Path]:
    """Write the runs whose folders lie in ``source`` as a packed study; return the files.

    Args:
        source: folder of run folders, or of a sweep (``results.csv`` and the folders of its cells).
        packed: new or empty folder, or an earlier packed study, which is replaced.
    Raises:
        InputError: ``source`` holds no run, a table cannot be read, or ``packed`` holds something else.
    """
    rows = _sweep_rows(source)
    folders = [source / name for name in rows] if rows else _run_folders(source)
    if not folders:
        raise InputError(f"{source} holds no run; name a folder of run folders")
    if packed.exists() and not is_packed(packed) and (not packed.is_dir() or any(packed.iterdir())):
        raise InputError(f"{packed} exists and is no packed study; name a new folder")
    cells: dict[str, dict[str, str]] = {folder.name: {"run": folder.name} for folder in folders}
    for folder in folders:
        record = read_record(folder) or {}
        if record:
            cells[folder.name]["provenance"] = provenance(record.get("commit"))
        if (folder / "summary.csv").exists():
            record = {name: value for name, value in record.items() if name != "result"}
        cells[folder.name] |= _flat(record)
        if (folder / f"{_SETTINGS}.json").exists():
            arguments = read_json_object(
                folder / f"{_SETTINGS}.json", f"{folder.name}/{_SETTINGS}.json", allow_nan=True
            )
            cells[folder.name] |= _flat(arguments, f"{_SETTINGS}/")
    large: dict[str, Table] = {}
    for name in TABLES:
        tables = {folder.name: Table.read(path) for folder in folders if (path := folder / f"{name}.csv").exists()}
        if tables and all(len(table.rows) == 1 for table in tables.values()):
            _add_columns(cells, name, tables)
        elif tables:
            large[name] = _side_by_side(tables) or _below_one_another(tables)
    if rows:
        _add_columns(cells, _SWEEP, rows)
    header = _merged([list(row) for row in cells.values()])
    runs = Table(header, [[row.get(name, "") for name in header] for row in cells.values()])
    packed.mkdir(parents=True, exist_ok=True)
    for name in set(TABLES) - set(large):
        (packed / f"{name}.csv.gz").unlink(missing_ok=True)
    for name, table in large.items():
        with replacing(packed / f"{name}.csv.gz") as part:
            part.write_bytes(gzip.compress(table.text().encode(), 9, mtime=0))
    write_text(packed / RUNS, runs.text())
    return [packed / RUNS, *(packed / f"{name}.csv.gz" for name in large)]


def provenance(commit: object) -> str:
    """Say in words how far the ``commit`` of a record identifies the code that ran."""
    if not isinstance(commit, str) or not commit:
        return "commit not recorded: made outside a git checkout; only date and package versions are known"
    if commit.endswith("+"):
        return f"commit {commit[:-1]} with uncommitted changes: the code that ran is not in that commit"
    return f"commit {commit}"


def _run_folders(source: Path) -> list[Path]:
    entries = sorted(source.iterdir()) if source.is_dir() else []
    return [folder for folder in entries if read_record(folder) is not None]


def _sweep_rows(source: Path) -> dict[str, Table]:
    """Return the row of each cell in the ``results.csv`` of a sweep, by its ``run_dir``; empty if there is none."""
    path = source / f"{_SWEEP}.csv"
    if not path.exists():
        return {}
    table = Table.read(path)
    if "run_dir" not in table.header:
        raise InputError(f"{path} has no column run_dir; give the folder of a sweep of prune_finetune_lora.py")
    place = table.header.index("run_dir")
    names = [_run_name(row[place], path) for row in table.rows]
    if len(set(names)) < len(names):
        raise InputError(f"{path} names a run_dir twice; keep one of them")
    return {name: Table(table.header, [row]) for name, row in zip(names, table.rows)}


def _run_name(name: str, path: Path) -> str:
    if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
        raise InputError(f"{path} names a run {shown(name)}; it must be the name of a folder")
    return name


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested objects as cells. An object whose keys would be ambiguous in a name stays whole."""
    cells: dict[str, str] = {}
    for name, item in value.items():
        if _is_ambiguous(name):
            raise InputError(f"{RECORD} has a field {shown(name)}; a name with . or / cannot be packed")
        if isinstance(item, dict) and item and not any(map(_is_ambiguous, item)):
            cells |= _flat(item, f"{prefix}{name}.")
        else:
            cells[f"{prefix}{name}"] = _cell(item)
    return cells


def _is_ambiguous(name: str) -> bool:
    return not name or "." in name or "/" in name


def _cell(value: Any) -> str:
    """Return a value as JSON, a text as it is unless it would read back as something else."""
    return value if isinstance(value, str) and _value(value) == value else json.dumps(value, ensure_ascii=False)


def _value(cell: str) -> Any:
    """Return the value that `_cell` wrote; None for an empty cell."""
    if cell in ("", "null"):
        return None
    try:
        return parse_json(cell, allow_nan=True)
    except InputError:
        return cell


def _add_columns(cells: Mapping[str, dict[str, str]], name: str, tables: Mapping[str, Table]) -> None:
    """Add the one row of each run's table, where a run lacks the table or a column `_NO_COLUMN`."""
    for column in _merged([table.header for table in tables.values()]):
        for run, row in cells.items():
            table = tables.get(run)
            has_column = table is not None and column in table.header
            row[f"{name}/{column}"] = table.rows[0][table.header.index(column)] if table and has_column else _NO_COLUMN


def _side_by_side(tables: Mapping[str, Table]) -> Table | None:
    """Return one table with the evaluation rows once; None if the runs do not have the same ones in one order."""
    first = next(iter(tables.values()))
    n = len([name for name in first.header if name in _ROW])
    keys = [row[:n] for row in first.rows]
    for table in tables.values():
        if table.header[:n] != first.header[:n] or "row" not in table.header[:n] or len(table.header) == n:
            return None
        if [row[:n] for row in table.rows] != keys:
            return None
    columns = [(run, table, i) for run, table in tables.items() for i in range(n, len(table.header))]
    header = first.header[:n] + [f"{run}/{table.header[i]}" for run, table, i in columns]
    return Table(header, [[*key, *(table.rows[j][i] for _, table, i in columns)] for j, key in enumerate(keys)])


def _below_one_another(tables: Mapping[str, Table]) -> Table:
    header = _merged([table.header for table in tables.values()])
    rows = []
    for run, table in tables.items():
        places = {name: i for i, name in enumerate(table.header)}
        rows += [[run, *(row[places[n]] if n in places else _NO_COLUMN for n in header)] for row in table.rows]
    return Table(["run", *header], rows)


def _merged(headers: Iterable[Sequence[str]]) -> list[str]:
    """Return all names of several lists once, a new name behind the one that it follows in its list."""
    merged: list[str] = []
    seen: set[str] = set()
    for header in headers:
        place = 0
        for name in header:
            if name in seen:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                seen.add(name)
                place += 1
    return merged


# --- reading ------------------------------------------------------------------------------------------------------


def is_packed(path: Path) -> bool:
    """Return whether ``path`` is the folder of a packed study."""
    try:
        with (path / RUNS).open(encoding="utf-8", newline="") as stream:
            header = next(csv.reader(stream), [])
    except (OSError, ValueError, csv.Error):
        return False
    return header[:2] == ["run", "provenance"]


@contextlib.contextmanager
def unpacked(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Give run folders in place of packed studies, in a temporary folder for as long as the block runs.

    A path of a packed study becomes a folder with the folders of its runs; the path of a run in it
    (``PACKED/dense_s0``), the folder of that run; any other path stays as it is. Errors name the packed study.
    """
    with tempfile.TemporaryDirectory(prefix="sparselora-") as temporary:
        folders: dict[Path, Path] = {}

        def folder_of(packed: Path) -> Path:
            if packed not in folders:
                folders[packed] = Path(temporary) / str(len(folders)) / packed.resolve().name
                unpack(packed, folders[packed])
            return folders[packed]

        try:
            yield [
                folder_of(path)
                if is_packed(path)
                else folder_of(path.parent) / path.name
                if is_packed(path.parent) and not path.exists()
                else path
                for path in paths
            ]
        except InputError as error:
            message = str(error)
            for packed, folder in folders.items():
                message = message.replace(str(folder), str(packed))
            raise InputError(message) from error


def unpack(packed: Path, folder: Path) -> None:
    """Write the runs of a packed study as the folders that they were: ``run.json`` and the tables of each.

    Raises:
        InputError: a table of the study cannot be read, or names a run that is not in ``runs.csv``.
    """
    runs = Table.read(packed / RUNS)
    names = [_run_name(row[0], packed / RUNS) for row in runs.rows]
    if len(set(names)) < len(names):
        raise InputError(f"{packed / RUNS} names a run twice; restore it")
    folder.mkdir(parents=True)
    sweep: list[Table] = []
    for name, row in zip(names, runs.rows):
        (folder / name).mkdir()
        cells = dict(zip(runs.header[2:], row[2:]))
        record = _nested({column: cell for column, cell in cells.items() if "/" not in column})
        if record:
            write_json(folder / name / RECORD, record)
        for table in (*TABLES, _SWEEP):
            columns = {
                column.partition("/")[2]: cell for column, cell in cells.items() if column.startswith(f"{table}/")
            }
            columns = {column: cell for column, cell in columns.items() if cell != _NO_COLUMN}
            if columns and table == _SWEEP:
                sweep.append(Table(list(columns), [list(columns.values())]))
            elif columns:
                write_text(folder / name / f"{table}.csv", Table(list(columns), [list(columns.values())]).text())
        arguments = _nested({c.partition("/")[2]: cell for c, cell in cells.items() if c.startswith(f"{_SETTINGS}/")})
        if arguments:
            write_json(folder / name / f"{_SETTINGS}.json", arguments)
    if sweep:
        write_text(folder / f"{_SWEEP}.csv", Table(sweep[0].header, [table.rows[0] for table in sweep]).text())
    for table in TABLES:
        if (path := packed / f"{table}.csv.gz").exists():
            for run, content in _split(_decompressed(path, folder), path).items():
                if run not in names:
                    raise InputError(f"{path} has a run {shown(run)} that its {RUNS} lacks; restore them")
                write_text(folder / run / f"{table}.csv", content.text())


def _nested(cells: Mapping[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for column, cell in cells.items():
        if cell == "":
            continue
        *parents, name = column.split(".")
        place = record
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InputError(f"{RUNS} has a column {column} inside a value; restore it")
        place[name] = _value(cell)
    return record


def _decompressed(path: Path, folder: Path) -> Table:
    try:
        with gzip.open(path) as stream:
            data = stream.read(_LARGEST_BYTES + 1)
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it") from None
    if len(data) > _LARGEST_BYTES:
        raise InputError(f"{path} has more than {_LARGEST_BYTES:,} bytes uncompressed; restore it")
    plain = folder / path.name.removesuffix(".gz")
    plain.write_bytes(data)
    table = Table.read(plain)
    plain.unlink()
    return table


def _split(table: Table, path: Path) -> dict[str, Table]:
    """Return the tables of the runs in one of the two layouts, by run."""
    header = table.header
    if header[0] == "run":
        rows: dict[str, list[list[str]]] = {}
        for row in table.rows:
            rows.setdefault(row[0], []).append(row[1:])
        return {run: _without_lacking(header[1:], part) for run, part in rows.items()}
    n = sum("/" not in name for name in header)
    if any("/" not in name for name in header[n:]):
        raise InputError(f"{path} mixes columns of rows and of runs; restore it")
    places: dict[str, list[int]] = {}
    for i, name in enumerate(header[n:], n):
        places.setdefault(name.partition("/")[0], []).append(i)
    return {
        run: Table(
            header[:n] + [header[i].partition("/")[2] for i in of_run],
            [row[:n] + [row[i] for i in of_run] for row in table.rows],
        )
        for run, of_run in places.items()
    }


def _without_lacking(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    places = [i for i in range(len(header)) if rows[0][i] != _NO_COLUMN]
    return Table([header[i] for i in places], [[row[i] for i in places] for row in rows])
