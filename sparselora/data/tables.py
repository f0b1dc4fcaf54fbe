"""Tables of a user's rows: every cell as the source holds it (`table_files`, `arrow_tables`), and its text.

Nothing is guessed. A string stays the string that it is, a cell of csv or tsv stays as it is written, and only numbers
and truth values, which JSON and Parquet tell from strings, become texts: as JSON writes them. `cell_text` takes a cell
to its text or refuses it; an empty cell of csv or tsv, a null and a NaN are missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, counted, few, plain, suggest

if TYPE_CHECKING:
    import pandas as pd

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


MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
"""Keys of a message: OpenAI's, and ShareGPT's."""


def is_chat(cell: object) -> bool:
    """Return whether a cell is a list that begins with a message of a conversation."""
    if not isinstance(cell, list) or not cell or not isinstance(cell[0], dict):
        return False
    return any(keys <= cell[0].keys() for keys in MESSAGE_KEYS)


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

    def with_columns(self, fields: Iterable[str]) -> Table:
        """The same rows with all of ``fields``: a column that was not there is empty."""
        empty: dict[str, list[Any]] = {field: [None] * len(self) for field in fields}
        return Table(self.source, self.rows, empty | self.columns, self.is_typed)

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


def draw_rows(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return ``count`` rows of ``frame`` drawn by ``seed``, in their order, with a new index; all of them for 0."""
    if count == 0 or count >= len(frame):
        return frame.reset_index(drop=True)
    index = np.random.default_rng(seed).permutation(len(frame))[:count]
    return frame.iloc[np.sort(index)].reset_index(drop=True)
