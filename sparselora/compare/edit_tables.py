"""Tables of a comparison of edits: runs, adapters, configurations, the selection, and how well ΔL was predicted.

An edit's report already pairs it, row by row, with its unedited adapter and with random draws. Here the configurations
are compared over adapters; the best is chosen on one half of the held-out rows and reported on the other; and the
second-order prediction of the change is held against the measured one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.compare.edits import EditRun, Edits
from sparselora.compare.pairing import NAN, add_holm, mean_over_clusters
from sparselora.compare.runs import PairedValues, check_endpoint, unknown_side
from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError
from sparselora.spectral.request import SGD_STEPS, sgd_name
from sparselora.spectral.verdict import BETTER, WORSE, compare

ENDPOINTS = ("loss_change", "null_gap")
"""The changes that are tested: against the unedited adapter and against the mean of its null's draws."""
HALVES = SELECTION, REPORTING = ("selection", "reporting")
_DESCRIBED = (
    "accuracy_change", "predicted_second", "calibration_change", "signed_change", "signed_calibration_change",
)  # fmt: skip
"""Means that come with an interval but are not tested."""

EDITED = ("edit", "signed", "draw")
"""The kinds of variants that change the adapter, and so have a prediction."""
PREDICTED = "predicted_second"
MEASURED = {"calibration": "calibration_change", "held_out": "loss_change"}
"""Where a change is measured → its column in a report."""
FITS = tuple(f"{place}_{quantity}" for place in MEASURED for quantity in ("correlation", "slope"))
ALL_EDITS, DRAWS_ALONE, ALL_MODES = "all", "draws", "all modes"

Array = NDArray[np.float64]


# --- runs ---------------------------------------------------------------------------------------------------------


def run_table(edits: Edits, bootstrap: Callable[[int], np.random.Generator]) -> pd.DataFrame:
    """Return a row per run: the edit, its loss against the unedited adapter and against its null, the verdict, how the
    signed mode does, and how well ΔL was predicted (`FITS`).

    Args:
        bootstrap: seed → the generator with which the run's own report was made, so that the intervals are its own.
    """
    return pd.DataFrame([run.columns | _run_row(run, bootstrap(run.seed)) for run in edits.runs])


def _run_row(run: EditRun, rng: np.random.Generator) -> dict[str, Any]:
    try:
        report = compare(run.items, run.variants, rng)
    except InputError as error:
        raise InputError(f"{run.name}: {error}") from None
    by_kind = report.table.drop_duplicates("kind").set_index("kind")
    edit, unedited = by_kind.loc["edit"], by_kind.loc["unedited"]
    control = by_kind.loc["no_lora" if "no_lora" in by_kind.index else "base"]
    row: dict[str, Any] = {"mode": run.mode, "seed": run.seed, "n_rows": report.n}
    row |= {"unedited_loss": unedited["loss"], "adapter_gain": control["loss_change"]}
    row |= {name: edit[name] for name in ("loss_change", "ci_low", "ci_high", "bootstrap_p")}
    verdict = report.verdict
    row |= {"null_gap": verdict.gap.mean, "null_ci_low": verdict.gap.low, "null_ci_high": verdict.gap.high}
    row |= {"rank_p": verdict.better_p, "rank_p_worse": verdict.worse_p, "draws": verdict.draws}
    row["accuracy_change"] = edit["accuracy"] - unedited["accuracy"] if report.classifies else NAN
    row |= {"predicted_first": edit["predicted_first"], "predicted_second": edit["predicted_second"]}
    # What was measured on the calibration rows is in the report alone.
    points = points_of(run)
    measured = points.drop_duplicates("kind").set_index("kind").reindex(["edit", "signed"])
    row["calibration_change"] = measured.loc["edit", "calibration_change"]
    row["signed_change"] = measured.loc["signed", "loss_change"]
    row["signed_calibration_change"] = measured.loc["signed", "calibration_change"]
    return row | fits(points) | {"verdict": verdict.word}


# --- adapters and configurations ----------------------------------------------------------------------------------


def over_adapters(runs: pd.DataFrame, name: str, tested: bool = True) -> dict[str, float]:
    """Return `mean_over_clusters` of a column over adapters: those of one adapter share its held-out rows."""
    return mean_over_clusters(runs, name, "adapter", tested)


def adapter_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per configuration, study and adapter: means over its runs, each run with equal weight.

    Args:
        runs: of `run_table`.
    """
    groups = runs.groupby(["study", "config", "adapter"], sort=False)
    means = groups[[*ENDPOINTS, *_DESCRIBED, *FITS]].mean()
    means.insert(0, "n_runs", groups.size())
    return means.reset_index()


def config_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per configuration and study.

    Runs (calibration seeds) are averaged within their adapter first; means, Student's-t 95 % intervals and p of no
    change are over adapters, each with equal weight, p also adjusted by Holm over all rows. How many runs there are,
    and how many are better and worse than their null.

    With one adapter there is neither interval nor p (NaN). An adapter without a value (no draws, no signed mode) does
    not count for it: ``NAME_n`` says how many do.

    Args:
        runs: of `run_table`.
    """
    rows = []
    for (study, config), part in runs.groupby(["study", "config"], sort=False):
        row: dict[str, Any] = {"study": study, "config": config, "mode": part["mode"].iloc[0], "n_runs": len(part)}
        row |= {"n_adapters": part["adapter"].nunique(), "n_seeds": part["seed"].nunique()}
        for name in ENDPOINTS:
            row |= over_adapters(part, name)
        for name in _DESCRIBED:
            row |= over_adapters(part, name, tested=False)
        row |= {"better": int((part["verdict"] == BETTER).sum()), "worse": int((part["verdict"] == WORSE).sum())}
        rows.append(row)
    table = pd.DataFrame(rows)
    add_holm(table, [f"{name}_p" for name in ENDPOINTS])
    return table


# --- selection ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def half_of(row: object) -> str:
    """Return the half of the held-out rows that a row is in: by a hash of its id alone, so the same for every run."""
    return SELECTION if hashlib.sha256(f"row {row}".encode()).digest()[0] % 2 else REPORTING


def half_changes(run: EditRun, half: str) -> dict[str, float]:
    """Return the number of rows in ``half``, and on these the loss of the edit minus that of the unedited adapter and
    minus the mean of the draws, nats per label; NaN without rows or draws."""
    ids = run.items["row"].unique()
    items = run.items[run.items["row"].isin([row for row in ids if half_of(row) == half])]
    kinds = run.variants.set_index("variant")["kind"]
    labels = items["tokens"] if "tokens" in items else pd.Series(1.0, index=items.index)
    sums = pd.DataFrame({"loss": items["loss"], "labels": labels}).groupby(items["variant"]).sum()
    loss = (sums["loss"] / sums["labels"]).groupby(kinds.reindex(sums.index)).mean()
    edit = loss.get("edit", NAN)
    return {
        "n_rows": int((items["variant"] == kinds.index[kinds == "edit"][0]).sum()),
        "loss_change": edit - loss.get("unedited", NAN),
        "null_gap": edit - loss.get("draw", NAN),
    }


def contrast_values(edits: Edits, contrast: Contrast) -> PairedValues:
    """Return the mean losses of both sides of a contrast by adapter; see `EditComparison.paired_values`.

    Raises:
        InputError: no such configuration or endpoint; runs of several studies, of which ``where`` names none.
    """
    check_endpoint(contrast, ("loss",))
    study = contrast.settings.get("study")
    names = sorted({run.study for run in edits.runs})
    if set(contrast.settings) - {"study"} or study not in (names if len(names) > 1 else [*names, None]):
        raise InputError(
            f"contrast {contrast.first} against {contrast.second}: where must name one study of "
            f"{', '.join(map(repr, names))}, as {{study: NAME}}"
        )
    runs = [run for run in edits.runs if study in (None, run.study)]
    labels = sorted({run.label for run in runs})
    if contrast.first not in labels:
        raise unknown_side(contrast, contrast.first, labels, "configuration")
    references = {"unedited": ("kind", "unedited"), "null": ("kind", "draw"), "oracle": ("kind", "oracle")}
    references |= {f"sgd_{steps}": ("variant", sgd_name(steps)) for steps in SGD_STEPS}
    if contrast.second not in (*labels, *references):
        raise unknown_side(contrast, contrast.second, [*labels, *references], "configuration")

    def by_adapter(label: str, column: str, value: str) -> pd.Series:
        losses = pd.DataFrame(
            [
                {"adapter": run.adapter, "loss": run.variants.loc[run.variants[column] == value, "loss"].mean()}
                for run in runs
                if run.label == label
            ]
        )
        return losses.groupby("adapter")["loss"].mean()

    first = by_adapter(contrast.first, "kind", "edit")
    if contrast.second in references:  # of the same runs
        second = by_adapter(contrast.first, *references[contrast.second])
    else:
        second = by_adapter(contrast.second, "kind", "edit")
    both = pd.concat([first, second], axis=1, join="inner").dropna()
    return PairedValues(both.iloc[:, 0].tolist(), both.iloc[:, 1].tolist(), "adapter", is_lower_better=True)


def selection_table(edits: Edits) -> pd.DataFrame:
    """Return a row per study: the configuration with the lowest mean loss change on the selection half (the first of
    equals), and how it does on the reporting half.

    Both means are over adapters, runs averaged within each first, and so are the latter's Student's-t 95 % interval
    and p (NaN with one adapter). Only configurations with as many adapters as the most have, and among these as many
    runs, can be chosen: a mean over other runs is another quantity.
    """
    halves = pd.DataFrame(
        [run.columns | {"half": half, **half_changes(run, half)} for run in edits.runs for half in HALVES]
    )
    rows = []
    for study, part in halves.groupby("study", sort=False):
        selection, reporting = (part[part["half"] == half] for half in HALVES)
        means = _comparable_means(selection)
        if means.empty or not reporting["n_rows"].min():
            continue
        best = str(means.idxmin())
        best_runs = reporting[reporting["config"] == best]
        row: dict[str, Any] = {"study": study, "config": best, "n_configs": len(means), "n_runs": len(best_runs)}
        row["n_adapters"] = best_runs["adapter"].nunique()
        row |= {"selection_rows": int(selection["n_rows"].max()), "reporting_rows": int(reporting["n_rows"].max())}
        row["selection_change"] = means[best]
        for name in ENDPOINTS:
            row |= over_adapters(best_runs, name)
        rows.append(row)
    return pd.DataFrame(rows)


def _comparable_means(runs: pd.DataFrame) -> pd.Series:
    """Return the mean loss change over adapters of each configuration that can be chosen and has one."""
    by_config = runs.groupby("config", sort=False)
    size = pd.DataFrame({"adapters": by_config["adapter"].nunique(), "runs": by_config.size()})
    size = size[size["adapters"] == size["adapters"].max()]
    full = size.index[size["runs"] == size["runs"].max()]
    means = pd.Series(
        {config: over_adapters(by_config.get_group(config), "loss_change")["loss_change"] for config in full}
    )
    return means.dropna()


# --- prediction ---------------------------------------------------------------------------------------------------


def points_of(run: EditRun) -> pd.DataFrame:
    """Return a row per edited variant of a run: ``variant``, ``kind``, `PREDICTED` and the columns of `MEASURED`."""
    table = run.variants[run.variants["kind"].isin(EDITED)]
    return table.reindex(columns=["variant", "kind", PREDICTED, *MEASURED.values()]).reset_index(drop=True)


def prediction_points(edits: Edits) -> pd.DataFrame:
    """Return `points_of` every run, with its columns, ``mode`` and ``seed`` in front."""
    parts = []
    for run in edits.runs:
        points = points_of(run)
        front = pd.DataFrame(run.columns | {"mode": run.mode, "seed": run.seed}, index=points.index)
        parts.append(pd.concat([front, points], axis=1))
    return pd.concat(parts, ignore_index=True)


def fits(points: pd.DataFrame) -> dict[str, float]:
    """Return `FITS` of the points of a run: correlation of predicted and measured change, slope of measured on
    predicted."""
    row: dict[str, float] = {}
    predicted = points[PREDICTED].to_numpy(dtype=float)
    for place, column in MEASURED.items():
        correlation, slope = fit(predicted, points[column].to_numpy(dtype=float))
        row |= {f"{place}_correlation": correlation, f"{place}_slope": slope}
    return row


def fit(x: Array, y: Array) -> tuple[float, float]:
    """Return Pearson's correlation and the least-squares slope of ``y (n,)`` on ``x (n,)``, over the finite pairs.

    NaN of fewer than three pairs or where all x are equal; the correlation also where all y are.
    """
    is_finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    if len(x) < 3 or np.ptp(x) == 0:
        return NAN, NAN
    from_x, from_y = x - x.mean(), y - y.mean()
    products, squares = float(from_x @ from_y), float(from_x @ from_x)
    correlation = NAN if np.ptp(y) == 0 else products / float(np.sqrt(squares * (from_y @ from_y)))
    return correlation, products / squares


def prediction_table(edits: Edits) -> pd.DataFrame:
    """Return rows per study and mode, and of all modes where a study has several: `FITS` of each run, averaged within
    its adapter, their means over adapters with Student's-t 95 % interval.

    Each twice: over ``all`` edits of a run (the edit, the signed mode, the draws) and over its ``draws`` alone, where
    neither of the others can carry the correlation as a point far from the rest.
    """
    rows = []
    for (study, mode), part in _with_all_modes(_run_fits(edits)).groupby(["study", "mode"], sort=False):
        for over, runs in part.groupby("over", sort=False):
            row = {"study": study, "mode": mode, "over": over, "n_runs": len(runs)}
            row |= {"n_adapters": runs["adapter"].nunique(), "n_points": int(runs["n_points"].sum())}
            for name in FITS:
                row |= over_adapters(runs, name, tested=False)
            rows.append(row)
    return pd.DataFrame(rows)


def _run_fits(edits: Edits) -> pd.DataFrame:
    """Return two rows per run: `FITS` over all its edits and over its draws alone."""
    rows = []
    for run in edits.runs:
        points = points_of(run)
        for over, part in ((ALL_EDITS, points), (DRAWS_ALONE, points[points["kind"] == "draw"])):
            row = {"study": run.study, "mode": run.mode, "adapter": run.adapter, "over": over}
            rows.append({**row, "n_points": len(part), **fits(part)})
    return pd.DataFrame(rows)


def _with_all_modes(runs: pd.DataFrame) -> pd.DataFrame:
    several = runs.groupby("study")["mode"].transform("nunique") > 1
    return pd.concat([runs, runs[several].assign(mode=ALL_MODES)], ignore_index=True)
