"""Files written whole, and the CSV tables among them.

Every file is written under a temporary name and renamed, so a kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from sparselora.errors import InputError

if TYPE_CHECKING:
    import pandas as pd  # at run time only where a table is read or built: Phase B imports it while it computes

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")


# --- writing ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; renamed onto it when the block ends well, removed when it does not.

    The folder is made where there is none. The file is on the disk before it takes the name, and the name is when this
    returns: a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, where the system has a call for it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such call for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """``frame`` as CSV without its index; floats keep every digit, line ends are ``\\n`` on every system.

    Where the name ends in ``.gz`` it is compressed, and the same table gives the same bytes.
    """
    with replacing(path) as part:
        if path.suffix != ".gz":
            frame.to_csv(part, index=False, lineterminator="\n")
            return
        # Without the time and the name, which is a temporary one, in its header.
        with part.open("wb") as stream, gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as compressed:
            frame.to_csv(compressed, index=False, lineterminator="\n")


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that a killed `replacing` of these files left in ``folder``."""
    for leftover in leftovers(folder, set(names)):
        leftover.unlink(missing_ok=True)


def leftovers(folder: Path, names: set[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    matched = ((entry, _TEMPORARY.fullmatch(entry.name)) for entry in folder.iterdir())
    return [entry for entry, match in matched if match and match["name"] in names and entry.is_file()]


# --- tables -------------------------------------------------------------------------------------------------------


def upsert_row(path: Path, row: Mapping[str, object], key: str = "run_id") -> None:
    """Add ``row`` to the CSV at ``path``, in place of any row with the same ``key``.

    Safe for parallel writers (a file lock, released by the system when its holder dies) and against a kill (the file
    is replaced whole). A sweep's table is small, so rewriting it costs less than a torn last line.

    Raises:
        InputError: the folder cannot be written, or the file is no table with the columns of ``row``, in their order:
            it was not written by this command.
    """
    import pandas as pd

    # Texts in, texts out: rows that other processes wrote pass through this one untouched.
    cells = {name: "" if value is None else str(value) for name, value in row.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            old = read_rows(path, tuple(cells))
            table = pd.concat([old[old[key] != cells[key]], pd.DataFrame([cells])], ignore_index=True)
            # Only the holder of the lock writes: a temporary file here is from a writer that was killed.
            remove_leftovers(path.parent, {path.name})
            write_csv(path, table)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); use another output folder") from None


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The table that `upsert_row` keeps at ``path``, all cells as text; without rows where there is none yet.

    Raises:
        InputError: the file has other columns than ``columns`` in their order, or is no table.
    """
    import pandas as pd

    if path.is_symlink():
        raise InputError(f"{path} is a link, which a table would replace; move it away")
    table = read_texts(path) if path.exists() else pd.DataFrame(columns=list(columns), dtype=str)
    if list(table.columns) != list(columns):
        other = sorted(set(table.columns) ^ set(columns)) or ["the same ones in another order"]
        raise InputError(
            f"{path.name} has other columns than this version writes ({', '.join(other[:5])}); move it away"
        )
    return table


def read_texts(path: Path) -> pd.DataFrame:
    """The CSV table at ``path``, all cells as text.

    Raises:
        InputError: it cannot be read, or is no table: a row with more or fewer cells than the header, a column named
            twice, an open quotation mark, not UTF-8.
    """
    import pandas as pd

    try:
        if not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "there is no such file")
        with path.open(encoding="utf-8", newline="") as stream:
            lines = [line for line in csv.reader(stream, strict=True) if line]
            if any("\0" in cell for line in lines for cell in line):
                raise ValueError("it has a null character")
        if not lines:
            raise ValueError("it is empty")
        header, rows = lines[0], lines[1:]
        if len(set(header)) < len(header):
            raise ValueError("it names a column twice")
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} cells, its header {len(header)}")
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path.name} is not a CSV table ({reason}); move it away") from None
    return pd.DataFrame(rows, columns=header, dtype=str)


def read_table(path: Path, numbers: Iterable[str] = (), texts: Iterable[str] = ()) -> pd.DataFrame:
    """The CSV table at ``path``, with numbers where a column holds nothing else.

    Args:
        numbers: columns that must be there and hold nothing else (empty cells are NaN).
        texts: further columns that must be there.
    Raises:
        InputError: as `read_texts`; or a column is missing, or holds what is no number.
    """
    import pandas as pd

    columns = list(read_texts(path).columns)
    if lacking := [name for name in (*texts, *numbers) if name not in columns]:
        raise InputError(f"{path.name} lacks the columns {', '.join(lacking[:5])}; it was not written by this version")
    try:
        table = pd.read_csv(path, float_precision="round_trip")
    except ValueError as error:
        raise InputError(f"{path.name} is not a CSV table ({' '.join(str(error).split())})") from None
    for name in numbers:
        if len(table) and not (pd.api.types.is_numeric_dtype(table[name]) or pd.api.types.is_bool_dtype(table[name])):
            raise InputError(f"{path.name} has a column {name} that does not hold numbers alone; restore it")
    return table
