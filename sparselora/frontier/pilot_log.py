"""Finished pilot runs of a search: two tables, in the order of the search, on file as soon as each run has ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import pandas as pd

from sparselora.frontier.pilot_pool import PilotTask
from sparselora.frontier.pilots import PilotResult
from sparselora.frontier.request import PILOT_ROWS, PILOTS
from sparselora.runs.files import read_table, write_csv
from sparselora.runs.folder import RunFolder

BASE = "base"
"""The model before its first step, in the table of held-out rows, where its rung is -1."""
_PILOT_COLUMNS = (
    "candidate", "seed", "rung", "steps", "lr", "rows_seen", "train_seconds", "loss", "loss_base", "finished",
)  # fmt: skip
_ROW_COLUMNS = ("candidate", "seed", "rung", "row", "loss", "labels")


class PilotLog:
    """The tables of pilot runs and of their held-out rows.

    Attributes:
        pilots: a row a pilot run, as ``pilots.csv``.
        rows: a row a held-out row of a pilot run, as ``pilots_rows.csv.gz``.

    Args:
        folder: of the search; entered before anything is added.
        order: names of the candidates, in which the tables are sorted, whatever the order in which pilot runs end.
    """

    def __init__(self, folder: RunFolder, order: Sequence[str]) -> None:
        self._folder = folder
        self._places = {name: place for place, name in enumerate((BASE, *order))}
        self.pilots = pd.DataFrame(columns=list(_PILOT_COLUMNS))
        self.rows = pd.DataFrame(columns=list(_ROW_COLUMNS))

    def read(self) -> None:
        """Read the pilot runs that are on file; rows of one that was killed before its line was written are none."""
        pilots, rows = self._folder.path(PILOTS), self._folder.path(PILOT_ROWS)
        if not rows.is_file():
            return
        if pilots.is_file():
            self.pilots = read_table(pilots, numbers=_PILOT_COLUMNS[1:-1], texts=("candidate", "finished"))
        table = pd.read_csv(rows, float_precision="round_trip")
        finished = set(self.pilots[["candidate", "seed", "rung"]].itertuples(index=False, name=None))
        places = table[["candidate", "seed", "rung"]].itertuples(index=False, name=None)
        self.rows = table[[place[0] == BASE or place in finished for place in places]].reset_index(drop=True)

    def rows_of(self, name: str, seed: int, rung: int) -> pd.DataFrame:
        """Return the held-out rows of a pilot run; none where it has not ended."""
        rows = self.rows
        return rows[(rows["candidate"] == name) & (rows["seed"] == seed) & (rows["rung"] == rung)]

    def pilot(self, name: str, seed: int, rung: int) -> pd.Series | None:
        """Return the line of a pilot run; None where it has not ended."""
        pilots = self.pilots
        lines = pilots[(pilots["candidate"] == name) & (pilots["seed"] == seed) & (pilots["rung"] == rung)]
        return lines.iloc[0] if len(lines) else None

    def add(self, task: PilotTask, result: PilotResult, loss_base: float) -> None:
        """Put a pilot run on file.

        Args:
            loss_base: nats per label of the model before training.
        """
        self._add_rows(task.name, task.seed, task.rung, result.rows)
        row = (
            task.name, task.seed, task.rung, result.steps, task.config.lr, result.rows_seen, result.train_seconds,
            result.loss, loss_base, datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        self.pilots = self._with(self.pilots, pd.DataFrame([row], columns=list(_PILOT_COLUMNS)))
        self._write()

    def add_base(self, seed: int, rows: pd.DataFrame) -> None:
        """Put the held-out rows of the model before training on file."""
        self._add_rows(BASE, seed, -1, rows)
        write_csv(self._folder.path(PILOT_ROWS), self.rows)

    def forget_later(self, task: PilotTask) -> None:
        """Remove the pilot runs of the same candidate and rung with later seeds."""
        self.pilots, self.rows = (
            table[(table["candidate"] != task.name) | (table["rung"] != task.rung) | (table["seed"] <= task.seed)]
            for table in (self.pilots, self.rows)
        )
        self._write()

    def _add_rows(self, name: str, seed: int, rung: int, rows: pd.DataFrame) -> None:
        table = rows.assign(candidate=name, seed=seed, rung=rung)[list(_ROW_COLUMNS)]
        self.rows = self._with(self.rows, table)

    def _with(self, table: pd.DataFrame, addition: pd.DataFrame) -> pd.DataFrame:
        table = pd.concat([table, addition], ignore_index=True) if len(table) else addition
        keyed = table.assign(place=table["candidate"].map(self._places))
        return keyed.sort_values(["rung", "seed", "place"], kind="stable", ignore_index=True).drop(columns="place")

    def _write(self) -> None:
        """Write the rows first: those of a pilot run without a line are none."""
        write_csv(self._folder.path(PILOT_ROWS), self.rows)
        write_csv(self._folder.path(PILOTS), self.pilots)
