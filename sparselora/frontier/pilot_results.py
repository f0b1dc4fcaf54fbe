"""Finished pilots of a search, from the files of its folder, with their times; and the lengths of dense among them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.frontier.candidates import DENSE
from sparselora.frontier.equal_time import Values
from sparselora.frontier.request import CANDIDATES, PILOT_ROWS, PILOTS, PLAN, TIMES
from sparselora.runs.files import read_table
from sparselora.runs.user_files import read_json

_AMOUNT_OF_DATA = frozenset({"train_samples", "epochs", "max_steps"})
"""Settings that make a dense run longer or shorter, and no other run of it."""
_ONE_LENGTH = 1.15
"""Ratio below which two lengths of dense training are one: a chord between them would be the noise of two runs. Lengths
that the search plans differ by a third."""


@dataclass(frozen=True)
class PilotResults:
    """Finished pilots of a search, from the files of its folder.

    Attributes:
        candidates: indexed by name: settings (mapping), lr, control, stage, reason.
        times: indexed by name: seconds_per_step, q25, q75, tokens_per_s, peak_gb, setup_seconds.
        pilots: columns candidate, rung, seed, steps, rows_seen, train_seconds, loss, loss_base, and ``seconds``: the
            steps at the time of the interleaved steps, with the share of the set-up.
        rows: (candidate, rung, seed) → a table indexed by held-out row with columns loss (summed over its labels) and
            labels.
        full_steps: optimizer steps of the run that the search is for.
    """

    candidates: pd.DataFrame
    times: pd.DataFrame
    pilots: pd.DataFrame
    rows: Mapping[tuple[str, int, int], pd.DataFrame] = field(repr=False)
    full_steps: int

    def is_dense(self, name: str) -> bool:
        """Return whether a candidate is dense training, on all rows or on fewer."""
        return _without_amount(self.candidates.loc[name, "settings"]) == _without_amount(
            self.candidates.loc[DENSE, "settings"]
        )

    @functools.cached_property
    def _groups(self) -> dict[tuple[str, int], pd.DataFrame]:
        groups = self.pilots.groupby(["candidate", "rung"])
        return {(str(name), int(rung)): pilots.set_index("seed").sort_index() for (name, rung), pilots in groups}

    def at(self, name: str, rung: int) -> pd.DataFrame:
        """Return the pilots of a candidate at a rung, indexed by seed in ascending order."""
        return self._groups[name, rung]

    def rungs(self, name: str) -> list[int]:
        """Return the rungs at which a candidate and dense have a pilot of one seed, ascending."""
        rungs = sorted(rung for other, rung in self._groups if other == name and (DENSE, rung) in self._groups)
        return [rung for rung in rungs if len(self.at(name, rung).index.intersection(self.at(DENSE, rung).index))]

    def dense_points(self, seeds: Sequence[int]) -> list[DensePoint]:
        """Return the lengths at which dense has a pilot, and one of each of ``seeds``, from the shortest on."""
        runs = [
            DensePoint(float(pilots["seconds"].median()), ((name, rung),))
            for (name, rung), pilots in self._groups.items()
            if self.is_dense(name) and set(seeds) <= set(pilots.index)
        ]
        points: list[DensePoint] = []
        for run in sorted(runs, key=lambda run: run.seconds):
            if points and run.seconds < _ONE_LENGTH * points[-1].seconds:
                points[-1] = points[-1].merged(run)
            else:
                points.append(run)
        return points


def _without_amount(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _AMOUNT_OF_DATA}


@dataclass(frozen=True)
class DensePoint:
    """A length of dense training.

    Attributes:
        seconds: its time.
        runs: (candidate, rung) of its pilots; more than one where half of the rows of a rung are those of another.
    """

    seconds: float
    runs: tuple[tuple[str, int], ...]

    def merged(self, other: DensePoint) -> DensePoint:
        """Return the two as one length, at the mean of their log times."""
        counts = len(self.runs), len(other.runs)
        log_time = np.average(np.log([self.seconds, other.seconds]), weights=counts)
        return DensePoint(float(np.exp(log_time)), (*self.runs, *other.runs))

    def loss(self, results: PilotResults, seed: int) -> float:
        return float(np.mean([results.at(name, rung).loc[seed, "loss"] for name, rung in self.runs]))

    def row_losses(self, results: PilotResults, seed: int, rows: pd.Index) -> Values:
        """Return the loss of each of ``rows``, summed over its labels ``(rows,)``."""
        return np.mean([results.rows[name, rung, seed].loc[rows, "loss"] for name, rung in self.runs], axis=0)


def read_results(folder: Path) -> PilotResults:
    """Return the finished pilots in the folder of a results.

    Raises:
        InputError: a table is damaged.
    """
    texts = ("candidate", "settings", "control", "stage", "reason")
    candidates = read_table(folder / CANDIDATES, numbers=("lr",), texts=texts)
    candidates["settings"] = [json.loads(text) for text in candidates["settings"]]
    candidates["reason"] = candidates["reason"].fillna("")
    times = read_table(folder / TIMES, numbers=("seconds_per_step", "q25", "q75", "tokens_per_s", "peak_gb"))
    times = times.set_index("candidate")
    pilots = read_table(folder / PILOTS, numbers=("seed", "rung", "steps", "train_seconds", "loss"))
    pilots = pilots[pilots["finished"].notna()].reset_index(drop=True)
    full_steps = int(read_json(folder / PLAN)["plan"]["full_steps"])
    pilots["seconds"] = pilot_seconds(pilots, times, full_steps)
    rows = pd.read_csv(folder / PILOT_ROWS, float_precision="round_trip")
    by_pilot = {
        (str(name), int(rung), int(seed)): table.set_index("row")[["loss", "labels"]]
        for (name, rung, seed), table in rows.groupby(["candidate", "rung", "seed"])
    }
    return PilotResults(candidates.set_index("candidate"), times, pilots, by_pilot, full_steps)


def pilot_seconds(pilots: pd.DataFrame, times: pd.DataFrame, full_steps: int) -> Values:
    """Return the time of each pilot by the interleaved steps ``(pilots,)``, in seconds.

    Set-up (calibration, factors) is paid once in a run, so a pilot bears the share of it that its steps are of the
    ``full_steps`` of the whole run.
    """
    step = times["seconds_per_step"].reindex(pilots["candidate"]).to_numpy(dtype=float)
    setup = times["setup_seconds"].reindex(pilots["candidate"]).to_numpy(dtype=float)
    steps = pilots["steps"].to_numpy(dtype=float)
    return steps * (step + setup / full_steps)
