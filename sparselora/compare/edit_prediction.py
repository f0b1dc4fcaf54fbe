"""How well the second-order ΔL of an edit foretells the measured change, on the calibration and on held-out rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.compare.edit_runs import EditRun, Edits
from sparselora.compare.over_adapters import over_adapters

EDITED = ("edit", "signed", "draw")
"""The kinds of variants that change the adapter, and so have a prediction."""
PREDICTED = "predicted_second"
MEASURED = {"calibration": "calibration_change", "held_out": "loss_change"}
"""Where a change is measured → its column in a report."""
FITS = tuple(f"{place}_{what}" for place in MEASURED for what in ("correlation", "slope"))
ALL_EDITS, DRAWS_ALONE, ALL_MODES = "all", "draws", "all modes"

Array = NDArray[np.float64]


def points_of(run: EditRun) -> pd.DataFrame:
    """A row an edited variant of a run: ``variant``, ``kind``, `PREDICTED` and the columns of `MEASURED`."""
    table = run.table[run.table["kind"].isin(EDITED)]
    return table.reindex(columns=["variant", "kind", PREDICTED, *MEASURED.values()]).reset_index(drop=True)


def prediction_points(edits: Edits) -> pd.DataFrame:
    """`points_of` every run, with ``name``, ``study``, ``config``, ``adapter``, ``mode`` and ``seed`` in front."""
    parts = []
    for run, study, config, adapter in zip(edits.runs, edits.studies, edits.configs, edits.adapters):
        front: dict[str, object] = {"name": run.name, "study": study, "config": config, "adapter": adapter}
        front |= {"mode": run.arguments["mode"], "seed": run.seed}
        part = points_of(run)
        parts.append(pd.concat([pd.DataFrame(front, index=part.index), part], axis=1))
    return pd.concat(parts, ignore_index=True)


def fits(points: pd.DataFrame) -> dict[str, float]:
    """`FITS` of the points of one run: correlation of predicted and measured change, slope of measured on predicted."""
    row: dict[str, float] = {}
    predicted = points[PREDICTED].to_numpy(dtype=float)
    for place, column in MEASURED.items():
        found = fit(predicted, points[column].to_numpy(dtype=float))
        row |= {f"{place}_correlation": found[0], f"{place}_slope": found[1]}
    return row


def fit(x: Array, y: Array) -> tuple[float, float]:
    """Pearson's correlation and the least-squares slope of ``y`` on ``x``, of the pairs that are known.

    NaN of fewer than three pairs or where all x are equal; the correlation also where all y are.
    """
    known = np.isfinite(x) & np.isfinite(y)
    nan = float("nan")
    if known.sum() < 3 or np.ptp(x[known]) == 0:
        return nan, nan
    from_x, from_y = x[known] - x[known].mean(), y[known] - y[known].mean()
    together, squares = float(from_x @ from_y), float(from_x @ from_x)
    correlation = nan if np.ptp(y[known]) == 0 else together / float(np.sqrt(squares * (from_y @ from_y)))
    return correlation, together / squares


def prediction_table(edits: Edits) -> pd.DataFrame:
    """Rows a study and mode, and of all modes where a study has several: `FITS` of each run, averaged within its
    adapter, their means over adapters with Student's-t 95 % interval.

    Each twice: over ``all`` edits of a run (the edit, the signed mode, the draws) and over its ``draws`` alone, where
    neither of the others can carry the correlation as a point far from the rest.
    """
    rows = []
    for (study, mode), part in _with_all_modes(_run_fits(edits)).groupby(["study", "mode"], sort=False):
        for over, own in part.groupby("over", sort=False):
            row = {"study": study, "mode": mode, "over": over, "n_runs": len(own)}
            row |= {"n_adapters": own["adapter"].nunique(), "n_points": int(own["n_points"].sum())}
            for name in FITS:
                found = over_adapters(own, name)
                del found[f"{name}_p"]
                row |= found
            rows.append(row)
    return pd.DataFrame(rows)


def _run_fits(edits: Edits) -> pd.DataFrame:
    """Two rows a run: `FITS` over all its edits and over its draws alone."""
    rows = []
    for run, study, adapter in zip(edits.runs, edits.studies, edits.adapters):
        points = points_of(run)
        for over, own in ((ALL_EDITS, points), (DRAWS_ALONE, points[points["kind"] == "draw"])):
            row = {"study": study, "mode": run.arguments["mode"], "adapter": adapter, "over": over}
            rows.append({**row, "n_points": len(own), **fits(own)})
    return pd.DataFrame(rows)


def _with_all_modes(runs: pd.DataFrame) -> pd.DataFrame:
    several = runs.groupby("study")["mode"].transform("nunique") > 1
    return pd.concat([runs, runs[several].assign(mode=ALL_MODES)], ignore_index=True)
