"""Training rows of a file that is larger than memory: read, checked and tokenised when a batch asks for them.

Only where each line of the file begins is held, eight bytes a row, so rows have numbers, an order can be drawn, and a
run is the one that it would be with all rows in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.data.batches import Example
from sparselora.data.table_files import json_lines
from sparselora.data.tables import Table
from sparselora.errors import InputError, one_line

_CHUNK = 1 << 20
"""Bytes that are looked through for ends of lines at a time."""
_SPACES = np.frombuffer(b" \t\r\n", dtype=np.uint8)


@dataclass(frozen=True)
class StreamedRows:
    """The rows of a JSON Lines file, one object a line.

    Attributes:
        path: the file.
        starts: ``(n,)`` byte at which each row's line begins, in the order of the file.
        stops: ``(n,)`` byte at which it ends.
        rows: ``(n,)`` id of each row: its position among the file's rows.
    """

    path: Path
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, path: str) -> StreamedRows:
        """Find the rows of the file ``path``.

        Raises:
            InputError: no such file, one that is not JSON Lines by its name, or one without rows.
        """
        if not path.endswith(".jsonl"):
            raise InputError(f"streaming reads JSON Lines, a file that ends in .jsonl, got {path}; convert it")
        if not Path(path).is_file():
            raise InputError(f"no file {path}; check the path")
        starts, stops = _lines(Path(path))
        if not len(starts):
            raise InputError(f"{path} has no rows; give a file with data")
        return cls(Path(path), starts, stops, np.arange(len(starts)))

    def __len__(self) -> int:
        return len(self.rows)

    def drawn(self, count: int, seed: int) -> StreamedRows:
        """Return ``count`` of the rows as `sparselora.data.tables.draw_rows` draws them; all of them for 0."""
        if count == 0 or count >= len(self):
            return self
        index = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return replace(self, starts=self.starts[index], stops=self.stops[index], rows=self.rows[index])

    def table(self, first: int, count: int = 1) -> Table:
        """Read ``count`` rows from position ``first`` on.

        Raises:
            InputError: a line that is not one JSON object in UTF-8.
        """
        places = range(first, min(first + count, len(self)))
        with self.path.open("rb") as file:
            lines = [self._line(file, i) for i in places]
        for i, line in zip(places, lines):
            if not line.lstrip().startswith("{"):
                raise self._unreadable(i, "it is no object")
        try:
            columns, objects = json_lines("\n".join(lines), self.path)
            if objects != len(lines):
                raise ValueError(f"{objects} objects in {len(lines)} lines")
        except (ValueError, RecursionError) as error:
            if count > 1:
                for i in places:  # one of them is what cannot be read, and has a number
                    self.table(i)
            reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(str(error))[:160]
            raise self._unreadable(first, reason) from None
        return Table(str(self.path), self.rows[first : first + count], columns, is_typed=True)

    def _line(self, file: Any, i: int) -> str:
        file.seek(int(self.starts[i]))
        line = file.read(int(self.stops[i] - self.starts[i]))
        try:
            return str(line.decode("utf-8-sig" if self.starts[i] == 0 else "utf-8"))
        except UnicodeDecodeError:
            raise self._unreadable(i, "it is not in UTF-8") from None

    def _unreadable(self, i: int, reason: str) -> InputError:
        return InputError(
            f"{self.path}: row {self.rows[i]} cannot be read ({reason}); streaming reads JSON Lines, one object a line"
        )


class StreamedExamples(Sequence[Example]):
    """Training examples, each of them made when it is asked for, and not held.

    Args:
        frame: makes the frame of one row, as `sparselora.data.instructions.load_instructions` would.
        encode: makes the examples of a frame.
    """

    def __init__(
        self,
        rows: StreamedRows,
        frame: Callable[[Table], pd.DataFrame],
        encode: Callable[[pd.DataFrame], list[Example]],
    ) -> None:
        self._rows, self._frame, self._encode = rows, frame, encode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        place = int(i) + len(self) if i < 0 else int(i)
        if not 0 <= place < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        (example,) = self._encode(self._frame(self._rows.table(place)))
        return example


def _lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes at which lines that are not blank begin and end, the end of the line left out."""
    ends: list[NDArray[np.int64]] = []
    texts: list[NDArray[np.int64]] = []
    size = open_text = 0  # bytes before the chunk; those of them that are in its first line and no space
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            values = np.frombuffer(chunk, dtype=np.uint8)
            places = np.flatnonzero(values == ord("\n"))
            count = np.cumsum(~np.isin(values, _SPACES))
            if len(places):
                ends.append(places + size)
                texts.append(np.diff(count[places], prepend=-open_text))
                open_text = int(count[-1] - count[places[-1]])
            else:
                open_text += int(count[-1])
            size += len(chunk)
    ends.append(np.array([size]))
    texts.append(np.array([open_text]))
    stops, is_row = np.concatenate(ends), np.concatenate(texts) > 0
    starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1] + 1])
    return starts[is_row], stops[is_row]
